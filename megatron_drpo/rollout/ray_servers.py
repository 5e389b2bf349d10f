"""Rollout servers on the nodes of a Ray cluster (`rollout.fleet.placement=ray`; the extra `ray`).

Each server is the child of an actor, which holds its GPUs: so Ray chooses a node that has them, and the
server is gone when the actor, its node, or the process that owns the fleet is. A restart is a new actor, on
whichever node has room by then. Every node needs this package, the model and SGLang's environment at the same
paths.
https://docs.ray.io/en/latest/ray-core/actors.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from megatron_drpo.config import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.server_process import (
    ServedModel,
    ServerProcess,
    generates,
    server_name,
    start_embedded,
    start_sglang,
)

_CALL_TIMEOUT_S = 10.0
_POLL_S = 1.0
"""Between two questions whether a server runs."""
_LOST = -1
"""Exit code of a server whose actor or node is gone."""

Launch = Callable[[RolloutConfig, int, Path], ServerProcess]


class ServerHost:
    """The actor: starts one server on its node and looks after the process."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None

    def start(self, launch: Launch, config: RolloutConfig, index: int, log_path: str) -> tuple[str, int, str]:
        """Endpoint, process id and node of the server, which does not answer yet."""
        node = ray.util.get_node_ip_address()
        config = dataclasses.replace(
            config,
            sglang=dataclasses.replace(config.sglang, host=node),
            embedded=dataclasses.replace(config.embedded, host=node),
        )
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        self._server = launch(config, index, Path(log_path))
        return self._server.endpoint, self._server.pid, node

    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._server is None else self._server.exit_code()

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        return "" if self._server is None else self._server.log_tail()

    def kill(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.kill()


class RayServer:
    """A server on some node, as `Fleet` sees it: see `server_process.Server`."""

    def __init__(self, name: str, endpoint: str, pid: int, node: str, actor: Any) -> None:
        self.name = name
        self.endpoint = endpoint
        self.pid = pid
        self._node = node
        self._actor = actor
        self._exit_code: int | None = None
        self._asked = 0.0

    def exit_code(self) -> int | None:
        """None while it runs; asked about once a second. A node that does not answer may only be slow:
        whether its server generates is found out elsewhere."""
        if self._exit_code is None and time.monotonic() - self._asked >= _POLL_S:
            with contextlib.suppress(GetTimeoutError):
                try:
                    self._exit_code = ray.get(self._actor.exit_code.remote(), timeout=_CALL_TIMEOUT_S)
                except RayActorError:
                    self._exit_code = _LOST
            self._asked = time.monotonic()
        return self._exit_code

    def generates(self, *, timeout_s: float, api_key: str | None = None) -> bool:
        return generates(self.endpoint, timeout_s=timeout_s, api_key=api_key)

    def log_tail(self) -> str:
        try:
            tail: str = ray.get(self._actor.log_tail.remote(), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            return f"its log is on node {self._node}, which does not answer ({type(error).__name__})"
        return f"on node {self._node}, {tail}"

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.get(self._actor.kill.remote(), timeout=_CALL_TIMEOUT_S)
        with contextlib.suppress(RayError):
            ray.kill(self._actor)


class RayStart:
    """Starts servers on the nodes of a cluster; see `server_process.StartServer`."""

    def __init__(self, config: RolloutConfig, launch: Launch, *, on_cpu: bool) -> None:
        """
        Args:
            launch: starts one on the node where it is called.

        Raises:
            RolloutError: no cluster at rollout.fleet.ray_address.
        """
        self._config = config
        self._launch = launch
        size = config.sglang.tensor_parallel_size
        self._resources = {"num_cpus": float(size)} if on_cpu else {"num_cpus": 1.0, "num_gpus": float(size)}
        address = config.fleet.ray_address
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), _CALL_TIMEOUT_S).close()
            ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise RolloutError(
                f"rollout.fleet.ray_address={address}: no Ray cluster answers ({error}); "
                "`ray start --head` starts one"
            ) from error

    def __call__(self, index: int, log_path: Path) -> RayServer:
        """
        Raises:
            RolloutError: no node has room, or the server cannot be started there.
        """
        options = {**self._resources, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor: Any = ray.remote(ServerHost).options(**options).remote()
        limit_s = self._config.startup_timeout_s
        started = actor.start.remote(self._launch, self._config, index, str(log_path.absolute()))
        try:
            endpoint, pid, node = ray.get(started, timeout=limit_s)
        except GetTimeoutError:
            ray.kill(actor)
            needs = ", ".join(
                f"{count:g} {name.removeprefix('num_')}" for name, count in self._resources.items()
            )
            raise RolloutError(
                f"no node of the Ray cluster had {needs} free within rollout.startup_timeout_s={limit_s:g}"
            ) from None
        except RayError as error:
            ray.kill(actor)
            raise RolloutError(f"the Ray cluster could not start it: {error}") from error
        return RayServer(server_name(index), endpoint, pid, node, actor)


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchSGLang:
    """`start_sglang` on the GPUs that Ray has given to the actor, which are all that it sees."""

    model: ServedModel
    on_cpu: bool

    def __call__(self, config: RolloutConfig, index: int, log_path: Path) -> ServerProcess:
        return start_sglang(config, self.model, 0, log_path, first_gpu=None if self.on_cpu else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchEmbedded:
    """`start_embedded`."""

    model: ServedModel

    def __call__(self, config: RolloutConfig, index: int, log_path: Path) -> ServerProcess:
        return start_embedded(config, self.model, index, log_path)
