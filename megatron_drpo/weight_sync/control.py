"""Global rank 0's command of the fleet: who is there, who has which weights, who is fenced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from megatron_drpo.config.schema import RolloutConfig, WeightSyncConfig
from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.fleet.state import announce_update, read_fleet
from megatron_drpo.rollout.time_limits import startup_limit_s
from megatron_drpo.weight_sync.client import MemoryTag
from megatron_drpo.weight_sync.path import Absence
from megatron_drpo.weight_sync.push import NamedTensors, WeightPusher
from megatron_drpo.weight_sync.server_memory import ServerMemory

_FIRST_PAUSE_S = 1.0
_MAX_PAUSE_S = 60.0
_POLL_S = 0.2
_ANNOUNCE_EVERY_S = 5.0


class ServerDirectory(Protocol):
    """The servers that exist at present."""

    def endpoints(self) -> list[str]:
        """Of the servers that generate.

        Raises:
            RolloutError: no server is left.
        """
        ...


class StaticServers:
    """rollout.endpoints: servers that others run."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = list(endpoints)

    def endpoints(self) -> list[str]:
        return self._endpoints


class FleetFile:
    """rollout.fleet_file: what the owner of a fleet says."""

    def __init__(self, path: str) -> None:
        self._path = path

    def endpoints(self) -> list[str]:
        fleet = read_fleet(self._path)
        if fleet.is_lost:
            told = "\n".join(
                f"{server.name}: {server.last_error}; log: {server.log}" for server in fleet.servers
            )
            raise RolloutError(f"no rollout server is left:\n{told}")
        return fleet.endpoints


def build_directory(config: RolloutConfig) -> ServerDirectory:
    """The one that the configuration names."""
    if config.fleet_file is not None:
        return FleetFile(config.fleet_file)
    return StaticServers(config.endpoints)


class FleetControl:
    """Gives servers weights. A server is fenced, that is in nobody's list, until it has the current
    version."""

    def __init__(
        self,
        config: RolloutConfig,
        pusher: WeightPusher,
        memory: ServerMemory | None = None,
        *,
        step_limit_s: float = WeightSyncConfig.timeout_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            memory: with rollout.colocated.
            step_limit_s: of the longest step of an update.
            clock: seconds, for the pauses of fenced servers.
        """
        self._clock = clock
        self._step_limit_s = step_limit_s
        self._config = config
        self._memory = memory
        self._pusher = pusher
        self._directory = build_directory(config)
        self.current: list[str] = []
        """Endpoints that have the current weights."""
        self.num_fenced = 0
        """Pushes to a server that failed, since the run began."""
        self.messages: list[str] = []
        """What a person should hear; whoever shows it clears the list."""
        self._retry_at: dict[str, float] = {}
        self._num_failures: dict[str, int] = {}
        """In a row, by endpoint."""
        self._num_refusals: dict[str, int] = {}
        """Those of them that were no absence: for a server that is away, whoever samples waits
        rollout.no_server_timeout_s."""

    def push(self, tensors: NamedTensors, policy_version: int) -> None:
        """Give every server that is there these weights, as a new version; see `current`.

        Raises:
            WeightSyncError: no server took them; names each one's reason.
            RolloutError: no server came up within rollout.startup_timeout_s.
        """
        self.current = []
        self._push_to(self._wait_for_servers(), tensors, policy_version)

    def repair(self, tensors: NamedTensors, policy_version: int) -> None:
        """Give servers that lack the current weights another chance; see `current`."""
        self._push_to(self._behind(), tensors, policy_version)

    def wants_repair(self) -> bool:
        """Whether a server is there that lacks the current weights and is due for another chance."""
        return bool(self._behind())

    def release_memory(self) -> None:
        """With rollout.colocated: every server lets go of its memory. One that does not is fenced, as no
        server has current weights from now on."""
        assert self._memory is not None
        self.current = []
        self._memory.announce()
        for endpoint, reason in self._memory.release(self._directory.endpoints()).items():
            self.messages.append(f"{endpoint} keeps its memory: {reason}")

    def resume_memory(self) -> None:
        """With rollout.colocated: every server takes its memory back, to be given weights by another run."""
        assert self._memory is not None
        for tag in MemoryTag:
            self._memory.resume(self._memory.released, tag)
        self._memory.end()

    def resume_cache(self) -> None:
        """With rollout.colocated: servers that have the current weights can generate again."""
        assert self._memory is not None
        self._fence(self._memory.resume(self.current, MemoryTag.cache), "cannot take its cache back")
        self._memory.end()

    def close(self) -> None:
        self._pusher.close()

    def _behind(self) -> list[str]:
        now = self._clock()
        there = self._directory.endpoints()
        self.current = [endpoint for endpoint in self.current if endpoint in there]
        return [e for e in there if e not in self.current and self._retry_at.get(e, 0.0) <= now]

    def _push_to(self, endpoints: list[str], tensors: NamedTensors, policy_version: int) -> None:
        if self._memory is not None:
            refused = self._memory.resume(endpoints, MemoryTag.weights)
            self._fence(refused, "cannot take its memory back")
            endpoints = [endpoint for endpoint in endpoints if endpoint not in refused]
        try:
            report = self._pusher.push(self._announced(tensors, endpoints), policy_version, endpoints)
        finally:
            self._announce(endpoints, 0.0)
        self.current += report.updated
        for endpoint in report.updated:
            self._num_failures.pop(endpoint, None)
            self._num_refusals.pop(endpoint, None)
            self._retry_at.pop(endpoint, None)
        self.messages += report.notes
        self._fence(report.failed, f"is fenced until it has weights {policy_version}")
        worst = max(self._num_refusals.values(), default=0)
        if not self.current and worst >= self._config.fleet.max_failures:
            reasons = "\n".join(f"{endpoint}: {reason}" for endpoint, reason in report.failed.items())
            raise WeightSyncError(f"no rollout server could be given weights {policy_version}:\n{reasons}")

    def _announced(self, tensors: NamedTensors, endpoints: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors. While they are taken, and for one more step, the fleet's owner knows that these
        servers are given weights, and may generate nothing."""
        said_at = -_ANNOUNCE_EVERY_S
        for item in tensors:
            if time.monotonic() - said_at >= _ANNOUNCE_EVERY_S:
                self._announce(endpoints, self._step_limit_s)
                said_at = time.monotonic()
            yield item
        self._announce(endpoints, self._step_limit_s)

    def _announce(self, endpoints: list[str], for_s: float) -> None:
        if self._config.fleet_file is None:
            return
        try:
            announce_update(self._config.fleet_file, endpoints, time.time() + for_s)
        except OSError as error:
            self.messages.append(f"the fleet's owner cannot be told of a weight update: {error}")

    def _fence(self, failures: Mapping[str, str], what: str) -> None:
        """These servers do not have the current weights; they get another chance after a pause."""
        for endpoint, reason in failures.items():
            self.messages.append(f"{endpoint} {what}: {reason}")
            self.num_fenced += 1
            if not isinstance(reason, Absence):
                self._num_refusals[endpoint] = self._num_refusals.get(endpoint, 0) + 1
            count = self._num_failures[endpoint] = self._num_failures.get(endpoint, 0) + 1
            self._retry_at[endpoint] = self._clock() + min(_FIRST_PAUSE_S * 2 ** (count - 1), _MAX_PAUSE_S)
        self.current = [endpoint for endpoint in self.current if endpoint not in failures]

    def _wait_for_servers(self) -> list[str]:
        limit_s = startup_limit_s(self._config)
        deadline = time.monotonic() + limit_s
        while not (endpoints := self._directory.endpoints()):
            if self._memory is not None:
                self._memory.end()  # or the fleet's owner would start none
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"no rollout server came up within rollout.startup_timeout_s={limit_s:g}; "
                    "`megatron-drpo fleet status` shows their errors"
                )
            time.sleep(_POLL_S)
        return endpoints
