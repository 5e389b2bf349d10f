"""One machine's run: checks everything, starts the rollout servers and the ranks, and cleans up."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_drpo.config.io import to_yaml
from megatron_drpo.config.schema import Config, Mode
from megatron_drpo.errors import ConfigError, DrpoError, RankError
from megatron_drpo.fleet.build import build_fleet, starts_fleet
from megatron_drpo.launch.check import check_config, refuse_problems
from megatron_drpo.launch.resolve import resolve_config
from megatron_drpo.runtime.process_end import SUPERVISOR_PID, Terminated, ends_in_order_on_sigterm

_LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""For which torch's launcher installs handlers that stay."""


def supervise(config: Config) -> None:
    """Run to the end; servers and ranks are gone whichever way it returns.

    Raises:
        ConfigError: anything wrong that can be known beforehand; nothing was started or written then.
        RolloutError: a server did not start or died.
        RankError: a rank failed; it has printed why.
        Terminated, KeyboardInterrupt: by a signal; a note says what is kept.
    """
    resolve_config(config)
    refuse_problems(config, check_config(config))
    with ends_in_order_on_sigterm(lambda: _what_is_kept(config)):
        _run(config)


def _run(config: Config) -> None:
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
    _silence_launcher()
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
    previous = {number: signal.getsignal(number) for number in _LAUNCHER_SIGNALS}
    try:
        elastic_launch(launch, sys.executable)(*arguments, *overrides)
    except ChildFailedError as error:
        failed = ", ".join(str(rank) for rank in sorted(error.failures))
        raise RankError(
            f"rank {failed} stopped with an error, see above; logs: {config.run_dir}/logs"
        ) from None
    except SignalException as error:  # what torch makes of these signals once the ranks run
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise Terminated(error.sigval) from None
    finally:
        os.environ.pop(SUPERVISOR_PID, None)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _silence_launcher() -> None:
    """What it logs about a rank's end is in the message of ours. Each of its modules sets its own level."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _what_is_kept(config: Config) -> str:
    latest = Path(config.run_dir) / "checkpoints" / "latest"
    try:
        checkpoint = latest.parent / latest.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return f"{config.run_dir} has no complete checkpoint"
    return f"{checkpoint} is kept" + (
        "; the same command goes on from it" if config.checkpoint.resume else ""
    )
