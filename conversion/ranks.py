"""Runs a function on several ranks of this machine, over gloo."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_drpo.errors import ConversionError
from megatron_drpo.runtime.process_end import die_with_parent
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings

_POLL_S = 1.0


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 3600.0) -> Any:
    """Call `function(*args)` on every rank, in processes of their own; what rank 0 returns.

    Args:
        function: of a module; picklable, like its arguments.
        timeout_s: for all of it; a hang is an error.

    Raises:
        ConversionError: a rank failed (with its traceback), or the time is over.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks: Any = mp.spawn(
            _run_rank,
            args=(world_size, folder, timeout_s, os.getpid(), function, args),
            nprocs=world_size,
            join=False,
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not ranks.join(timeout=_POLL_S):
                if time.monotonic() > deadline:
                    raise ConversionError(
                        f"{function.__name__} on {world_size} ranks: no end in {timeout_s} s"
                    )
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise ConversionError(f"{function.__name__} on {world_size} ranks failed: {error}") from error
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        return torch.load(Path(folder) / "result", weights_only=True)


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    parent: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    die_with_parent(parent)
    ignore_expected_warnings()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    result = function(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()  # nobody closes its connections while another rank still uses them
    dist.destroy_process_group()
