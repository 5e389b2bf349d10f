"""`megatron-drpo fleet up` and `fleet down`: servers that outlive a run, or serve several."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psutil
from rich.console import Console

from megatron_drpo.config.schema import Config
from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.fleet.build import build_fleet, starts_fleet
from megatron_drpo.fleet.state import FLEET_FILE, ServerState, find_owner, read_fleet
from megatron_drpo.rollout.time_limits import startup_limit_s, weights_bytes
from megatron_drpo.runtime.process_end import ends_in_order_on_sigterm

_POLL_S = 0.5
_STOP_TIMEOUT_S = 30.0


def up(config: Config, stop: threading.Event | None = None) -> None:
    """Run the fleet of this configuration until Ctrl-C, SIGTERM or `fleet down`.

    Args:
        stop: ends it as well.

    Raises:
        ConfigError: the configuration names servers that others run, or its fleet runs already.
        RolloutError: a server did not start, or none is left.
    """
    stop = stop or threading.Event()
    if not starts_fleet(config):
        raise ConfigError(
            "fleet up: rollout.endpoints or rollout.fleet_file names servers that exist; leave both out"
        )
    path = Path(config.run_dir) / FLEET_FILE
    if path.exists() and find_owner(read_fleet(path)) is not None:
        raise ConfigError(f"fleet up: {path} belongs to a fleet that runs; `megatron-drpo fleet down {path}`")
    config.rollout.startup_timeout_s = startup_limit_s(
        config.rollout, weights_bytes(config.policy.model_path)
    )
    with ends_in_order_on_sigterm(lambda: "its servers have ended, too"):
        _run(config, path, stop)


def _run(config: Config, path: Path, stop: threading.Event) -> None:
    console = Console(highlight=False)
    rollout = config.rollout
    what = f"starting {rollout.fleet.num_servers} x {rollout.engine} ({config.policy.model_path})"
    console.print(what, soft_wrap=True)
    with build_fleet(config) as fleet:
        for endpoint in fleet.endpoints:
            console.print(f"  [green]up[/] {endpoint}", soft_wrap=True)
        console.print(f"train with rollout.fleet_file={path}; Ctrl-C ends the servers", soft_wrap=True)
        if threading.current_thread() is threading.main_thread():  # `fleet down` is no interruption
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
        seen: dict[str, str] = {}
        while not stop.wait(_POLL_S):
            for server in fleet.servers:
                _report(console, server, seen)
            fleet.check()
    console.print("the fleet has ended")


def down(target: str) -> None:
    """End the fleet of a run folder, or of a fleet.json, and wait until it is gone.

    Raises:
        RolloutError: there is no fleet, or its owner does not end.
    """
    path = Path(target) / FLEET_FILE if Path(target).is_dir() else Path(target)
    fleet = read_fleet(path)
    owner = find_owner(fleet)
    if owner is None:
        path.unlink(missing_ok=True)
        raise RolloutError(
            f"{path}: its owner, process {fleet.pid}, does not run any more, nor do its servers"
        )
    with ends_in_order_on_sigterm(lambda: f"process {owner.pid} was told to end, and does"):
        owner.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise RolloutError(f"{path}: process {owner.pid} has not ended within {_STOP_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)


def _report(console: Console, server: ServerState, seen: dict[str, str]) -> None:
    """A line for each change."""
    line = f"{server.state} {server.endpoint}" + (f": {server.last_error}" if server.last_error else "")
    if seen.setdefault(server.name, line) != line:
        seen[server.name] = line
        console.print(f"{time.strftime('%H:%M:%S')} {server.name} {line}", soft_wrap=True)
