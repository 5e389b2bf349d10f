"""One rank of a distributed test: run by the `run_distributed` fixture, see conftest.py.

The fixture sets the global `JOB` to the folder of the job and `RANK` to the rank of this process. A rank
writes `rank_<n>.log` (its output and traceback) and, when its function returned, `rank_<n>.result`.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import nccl_like


def load_function(path: str, module_name: str, function_name: str) -> Callable[..., Any]:
    """A function of a test file, loaded under the name pytest gave the file: its objects unpickle by it."""
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return getattr(module, function_name)


def redirect_output(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_rank(folder: Path, rank: int) -> None:
    os.setpgrp()  # so that the fixture can end this rank together with the processes it starts
    redirect_output(folder / f"rank_{rank}.log")
    job = pickle.loads((folder / "job").read_bytes())
    faulthandler.dump_traceback_later(job["timeout_s"], exit=True)
    world_size: int = job["world_size"]
    os.environ.clear()
    os.environ.update(job["environ"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    function = load_function(*job["function"])
    args = pickle.loads(job["args"])
    store = dist.FileStore(str(folder / "store"), world_size)
    limit = timedelta(seconds=job["timeout_s"])
    nccl_like.register()
    dist.init_process_group(job["backend"], store=store, rank=rank, world_size=world_size, timeout=limit)
    result = function(*args)
    (folder / f"rank_{rank}.result").write_bytes(pickle.dumps(result))
    dist.barrier()  # nobody closes its connections while another rank still uses them
    dist.destroy_process_group()


# An exception ends the process at once (os._exit in multiprocessing): a rank that failed does not wait for
# collectives that the others never join.
run_rank(Path(globals()["JOB"]), globals()["RANK"])
