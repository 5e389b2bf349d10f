"""One machine's run: checks everything, starts the rollout servers and the ranks, and cleans up."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_drpo.check import check_config, refuse_problems
from megatron_drpo.config import Config, Mode
from megatron_drpo.config_io import to_yaml
from megatron_drpo.errors import ConfigError, DrpoError, RankError
from megatron_drpo.lifetime import SUPERVISOR_PID
from megatron_drpo.rollout.launch import build_fleet, starts_fleet


def supervise(config: Config) -> None:
    """Run to the end; servers and ranks are gone whichever way it returns.

    Raises:
        ConfigError: anything wrong that can be known beforehand; nothing was started or written then.
        RolloutError: a server did not start or died.
        RankError: a rank failed; it has printed why.
    """
    refuse_problems(config, check_config(config))
    run_dir = Path(config.run_dir)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir}: cannot be written: {error}") from error
    with ExitStack() as stack:
        fleet = None
        if config.train.mode is Mode.rl and starts_fleet(config):
            fleet = stack.enter_context(build_fleet(config, num_trainer_gpus=config.parallel.world_size))
        try:
            _run_ranks(config, [] if fleet is None else [f"rollout.fleet_file={fleet.path}"])
        except DrpoError:
            if fleet is not None:
                fleet.check()
            raise


def _run_ranks(config: Config, overrides: list[str]) -> None:
    """torchrun's own API on this machine; rank 0 speaks to the terminal, the others to files."""
    num_ranks = config.parallel.world_size
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[SUPERVISOR_PID] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logs = DefaultLogsSpecs(
        log_dir=str(Path(config.run_dir) / "logs"),
        redirects=dict.fromkeys(range(1, num_ranks), Std.OUT),
    )
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"megatron_drpo_{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=logs,
    )
    arguments = ["-m", "megatron_drpo.train", f"config={config.run_dir}/config.yaml"]
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        elastic_launch(launch, sys.executable)(*arguments, *overrides)
    except ChildFailedError as error:
        failed = ", ".join(str(rank) for rank in sorted(error.failures))
        raise RankError(
            f"rank {failed} stopped with an error, see above; logs: {config.run_dir}/logs"
        ) from None
    except SignalException:  # what torch makes of SIGINT, SIGTERM, SIGHUP and SIGQUIT once the ranks run
        raise KeyboardInterrupt from None
    finally:
        os.environ.pop(SUPERVISOR_PID, None)
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
