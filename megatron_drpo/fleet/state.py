"""fleet.json: what the process that owns the servers tells everybody else of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from megatron_drpo.errors import RolloutError

FLEET_FILE = "fleet.json"
_YIELD_FILE = "servers_yield"
_UPDATE_FILE = "servers_update.json"
_UPDATE_KEPT_S = 3600.0
"""For how long an update that is over is remembered."""


def yield_file(fleet_file: str | Path) -> Path:
    """While this file is there the trainer has the servers' devices (rollout.colocated): the owner of the
    fleet starts none and asks none to generate."""
    return Path(fleet_file).with_name(_YIELD_FILE)


def update_file(fleet_file: str | Path) -> Path:
    """Where the trainer says which servers are given weights."""
    return Path(fleet_file).with_name(_UPDATE_FILE)


def announce_update(fleet_file: str | Path, endpoints: Iterable[str], until: float) -> None:
    """Tell the fleet's owner that these servers are given weights until some time: they may generate nothing
    until then. Their update is over when that time has come.

    Args:
        until: Unix seconds.

    Raises:
        OSError: the file cannot be written.
    """
    known = {e: end for e, end in read_updates(fleet_file).items() if end > time.time() - _UPDATE_KEPT_S}
    _replace(update_file(fleet_file), known | dict.fromkeys(endpoints, until))


def read_updates(fleet_file: str | Path) -> dict[str, float]:
    """Endpoint -> Unix seconds when the latest update of its weights is, or was, over."""
    try:
        values = json.loads(update_file(fleet_file).read_text())
        return {str(endpoint): float(end) for endpoint, end in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # there was none, or it is not ours
        return {}


class ServerStatus(StrEnum):
    """Of one server, as its owner sees it."""

    starting = "starting"
    """The process runs, but does not generate yet."""
    up = "up"
    """It generates. Whether it has current weights is the trainer's to know."""
    restarting = "restarting"
    """It failed and waits for its next start."""
    left = "left"
    """It failed too often and is not started again."""


@dataclass(slots=True, kw_only=True)
class ServerState:
    """One member of the fleet. Each start has an endpoint of its own, so that nobody takes a server that has
    just started, with old weights, for the one that was there before."""

    name: str
    endpoint: str = ""
    state: ServerStatus = ServerStatus.starting
    num_failures: int = 0
    """In a row."""
    num_restarts: int = 0
    last_error: str = ""
    log: str = ""
    pid: int = 0
    since: float = 0.0
    """Unix seconds of the latest change of state."""
    last_healthy: float = 0.0
    """Unix seconds of the latest generation; 0: none yet."""


@dataclass(slots=True, kw_only=True)
class FleetState:
    """All members."""

    pid: int
    """Of the owner."""
    updated: float = 0.0
    """Unix seconds."""
    servers: list[ServerState] = field(default_factory=list)

    @property
    def endpoints(self) -> list[str]:
        """Of the servers that are up, in order."""
        return [server.endpoint for server in self.servers if server.state is ServerStatus.up]

    @property
    def is_lost(self) -> bool:
        """No server is left, and none will come back."""
        return all(server.state is ServerStatus.left for server in self.servers)

    def write(self, path: str | Path) -> None:
        """Replace the file at once: a reader sees the old or the new state."""
        self.updated = time.time()
        _replace(Path(path), asdict(self))


def _replace(path: Path, values: Mapping[str, object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(path)


def find_owner(fleet: FleetState) -> psutil.Process | None:
    """The process that owns a fleet, if it runs on this machine and its number has not gone to another
    program."""
    try:
        owner = psutil.Process(fleet.pid)
        return owner if any("megatron" in argument for argument in owner.cmdline()) else None
    except psutil.Error:
        return None


def read_fleet(path: str | Path) -> FleetState:
    """
    Raises:
        RolloutError: there is no such file, or it is not of this form.
    """
    try:
        values = json.loads(Path(path).read_text())
        servers = [ServerState(**server) for server in values["servers"]]
        for server in servers:
            server.state = ServerStatus(server.state)
        return FleetState(pid=values["pid"], updated=values["updated"], servers=servers)
    except OSError as error:
        raise RolloutError(
            f"{path} cannot be read: {error.strerror}. `megatron-drpo fleet up` writes it, and so does a run "
            "that starts its own servers"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RolloutError(f"{path} does not describe a fleet: {error}") from error
