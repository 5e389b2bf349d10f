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
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.server_process import (
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
    """A server on some node, or one that waits for a node with room; see `server_process.Server`."""

    def __init__(self, name: str, actor: Any, started: Any, needs: str) -> None:
        """
        Args:
            actor: of `ServerHost`.
            started: the reference of its `start`.
            needs: resources of the actor, in words.
        """
        self.name = name
        self.endpoint = ""
        """Empty until it has a node."""
        self.pid = 0
        self._node = ""
        self._actor = actor
        self._started = started
        self._needs = needs
        self._failure = ""
        self._exit_code: int | None = None
        self._asked = 0.0

    def exit_code(self) -> int | None:
        """None while it runs; asked about once a second. A node that does not answer may only be slow:
        whether its server generates is found out elsewhere."""
        if self._exit_code is None and time.monotonic() - self._asked >= _POLL_S:
            with contextlib.suppress(GetTimeoutError):
                try:
                    if self._has_node():
                        self._exit_code = ray.get(self._actor.exit_code.remote(), timeout=_CALL_TIMEOUT_S)
                except RayError as error:
                    self._failure = str(error)
                    self._exit_code = _LOST
            self._asked = time.monotonic()
        return self._exit_code

    def generates(self, *, timeout_s: float, api_key: str | None = None) -> bool:
        return bool(self.endpoint) and generates(self.endpoint, timeout_s=timeout_s, api_key=api_key)

    def log_tail(self) -> str:
        if not self._node:
            return self._failure or f"no node of the Ray cluster has {self._needs} free"
        try:
            tail: str = ray.get(self._actor.log_tail.remote(), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            return f"its log is on node {self._node}, which does not answer ({type(error).__name__})"
        return f"on node {self._node}, {tail}"

    def kill(self) -> None:
        if self._node:
            with contextlib.suppress(RayError):
                ray.get(self._actor.kill.remote(), timeout=_CALL_TIMEOUT_S)
        with contextlib.suppress(RayError):
            ray.kill(self._actor)

    def _has_node(self) -> bool:
        if not self._node and ray.wait([self._started], timeout=0)[0]:
            self.endpoint, self.pid, self._node = ray.get(self._started)
        return bool(self._node)


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
            with _keep_sigterm_handler():
                ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise RolloutError(
                f"rollout.fleet.ray_address={address}: no Ray cluster answers ({error}); "
                "`ray start --head` starts one"
            ) from error

    def __call__(self, index: int, log_path: Path) -> RayServer:
        options: dict[str, Any] = {**self._resources, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if self._config.api_key_env is not None:  # the node has it as little as this package's other settings
            options["runtime_env"] = {"env_vars": {self._config.api_key_env: self._config.api_key}}
        actor: Any = ray.remote(ServerHost).options(**options).remote()
        started = actor.start.remote(self._launch, self._config, index, str(log_path.absolute()))
        needs = ", ".join(f"{count:g} {name.removeprefix('num_')}" for name, count in self._resources.items())
        return RayServer(server_name(index), actor, started, needs)


@contextlib.contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """`ray.init` installs one of its own, when it is called in the main thread."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


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
