"""The servers of a run: started, watched by real generations, restarted, and gone in every way out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_drpo.config.schema import FleetConfig, RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.server_process import Server, StartServer, server_name
from megatron_drpo.fleet.state import (
    FLEET_FILE,
    FleetState,
    ServerState,
    ServerStatus,
    read_updates,
    update_file,
    yield_file,
)
from megatron_drpo.rollout.time_limits import startup_limit_s

_POLL_S = 0.1
_START_POLL_S = 0.5


class Fleet:
    """Owns `rollout.fleet.num_servers` servers and writes what they do to run_dir/fleet.json.

    A context manager: entering starts all servers and waits until they generate. From then on each has a
    thread that restarts it when it dies or hangs, with a pause that doubles, until it has failed too often in
    a row. Should this process be killed, the kernel ends the servers.
    """

    def __init__(self, config: RolloutConfig, start_server: StartServer, run_dir: str | Path) -> None:
        """
        Args:
            run_dir: each server's output goes to logs/rollout_server_N.log below it.
        """
        self._config = config
        self.path = Path(run_dir) / FLEET_FILE
        self._lock = threading.Lock()
        self._state = FleetState(pid=os.getpid())
        self._keepers = [
            _Keeper(index, start_server, run_dir, config, self._publish)
            for index in range(config.fleet.num_servers)
        ]
        self._state.servers = [keeper.state for keeper in self._keepers]

    @property
    def endpoints(self) -> list[str]:
        """Of the servers that are up, in order."""
        return self._state.endpoints

    @property
    def servers(self) -> list[ServerState]:
        """The state of each, as in fleet.json."""
        return self._state.servers

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all servers and wait until they generate.

        Raises:
            RolloutError: one died or did not answer within rollout.startup_timeout_s; shows the end of its
                log. None is left running then.
        """
        (self.path.parent / "logs").mkdir(parents=True, exist_ok=True)
        self._forget_announcements()
        try:
            for keeper in self._keepers:
                keeper.start()
            for keeper in self._keepers:
                keeper.wait_until_up()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """
        Raises:
            RolloutError: no server is left; shows the end of each log.
        """
        if self._state.is_lost:
            raise RolloutError(
                "no rollout server is left:\n" + "\n".join(keeper.failure for keeper in self._keepers)
            )

    def stop(self) -> None:
        """End all servers; harmless when there are none."""
        for keeper in self._keepers:
            keeper.stop()
        for keeper in self._keepers:
            keeper.join()
        self.path.unlink(missing_ok=True)
        self._forget_announcements()

    def _forget_announcements(self) -> None:
        for announcement in (yield_file(self.path), update_file(self.path)):
            announcement.unlink(missing_ok=True)

    def _publish(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            self._state.write(self.path)


class _Keeper:
    """One server and the thread that looks after it.

    The same thread starts all its processes and outlives them: the kernel ends a child when the thread that
    started it ends (`lifetime.die_with_parent`).
    """

    def __init__(
        self,
        index: int,
        start_server: StartServer,
        run_dir: str | Path,
        config: RolloutConfig,
        publish: Callable[[Callable[[], None]], None],
    ) -> None:
        name = server_name(index)
        log_path = Path(run_dir) / "logs" / f"{name.replace(' ', '_')}.log"
        self._index = index
        self._fleet_file = Path(run_dir) / FLEET_FILE
        self._yield_file = yield_file(self._fleet_file)
        self.state = ServerState(name=name, log=str(log_path))
        self.failure = ""
        """The latest failure, with the end of the log."""
        self._start_server = start_server
        self._log_path = log_path
        self._config = config
        self._publish = publish
        self._was_up = threading.Event()
        self._stopping = threading.Event()
        self._server: Server | None = None
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_until_up(self) -> None:
        """
        Raises:
            RolloutError: the first start failed.
        """
        while self._thread.is_alive():
            if self._was_up.wait(_POLL_S):
                return
        if not self._was_up.is_set():
            raise RolloutError(self.failure)

    def stop(self) -> None:
        self._stopping.set()
        server = self._server
        if server is not None:
            server.kill()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    # -------------------------------------------------------------------------------- in the thread

    def _keep(self) -> None:
        fleet = self._config.fleet
        while not self._stopping.is_set():
            self._wait_for_devices()
            started = time.monotonic()
            problem = self._run_server()
            if self._stopping.is_set():
                return
            lasted = time.monotonic() - started
            num_failures = 1 if lasted > fleet.failure_memory_s else self.state.num_failures + 1
            leaves = num_failures >= fleet.max_failures or not self._was_up.is_set()
            self._change(
                ServerStatus.left if leaves else ServerStatus.restarting,
                num_failures=num_failures,
                last_error=problem,
            )
            if leaves:
                return
            self._stopping.wait(_backoff_s(fleet, num_failures))
            self.state.num_restarts += 1

    def _wait_for_devices(self) -> None:
        """Until the trainer does not have them; from then on it waits for this server (`ServerMemory`)."""
        self._change(ServerStatus.starting)
        while self._yield_file.exists() and not self._stopping.is_set():
            self._change(ServerStatus.restarting)
            self._stopping.wait(_START_POLL_S)
            self._change(ServerStatus.starting)

    def _run_server(self) -> str:
        """From the start of a process to its end; why it ended."""
        try:
            server = self._start_server(self._index, self._log_path)
        except (RolloutError, OSError) as error:
            self.failure = f"{self.state.name} cannot be started: {error}"
            return str(error)
        self._server = server
        try:
            self._change(ServerStatus.starting, endpoint=server.endpoint, pid=server.pid)
            problem = self._wait_until_up(server) or self._watch(server)
            if problem:
                self.failure = f"{server.name} ({server.endpoint}) {problem}; {server.log_tail()}"
            return problem
        finally:
            server.kill()
            self._server = None

    def _wait_until_up(self, server: Server) -> str:
        limit_s = startup_limit_s(self._config)
        deadline = time.monotonic() + limit_s
        while not self._stopping.wait(_START_POLL_S):
            if (code := server.exit_code()) is not None:
                return f"died, exit code {code}"
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return f"did not answer within rollout.startup_timeout_s={limit_s:g}"
            if server.generates(timeout_s=remaining, api_key=self._config.api_key):
                # On a cluster a server has no address before it has a node.
                where = {"endpoint": server.endpoint, "pid": server.pid}
                self._change(ServerStatus.up, last_healthy=time.time(), **where)
                self._was_up.set()
                return ""
        return ""

    def _watch(self, server: Server) -> str:
        fleet = self._config.fleet
        healthy = checked = time.monotonic()
        while not self._stopping.wait(_POLL_S):
            if (code := server.exit_code()) is not None:
                return f"died, exit code {code}"
            if self._yield_file.exists():  # it cannot generate, and need not
                healthy = checked = time.monotonic()
                continue
            if time.monotonic() - checked < fleet.health_interval_s:
                continue
            updated = self._updated(server.endpoint)
            if updated > time.monotonic():  # it may not generate before it has its weights
                continue
            remaining = max(healthy, updated) + fleet.health_timeout_s - time.monotonic()
            if remaining <= 0:
                limit_s = fleet.health_timeout_s
                return f"hangs: it generated nothing for rollout.fleet.health_timeout_s={limit_s:g}"
            checked = time.monotonic()
            if server.generates(timeout_s=remaining, api_key=self._config.api_key):
                healthy = checked = time.monotonic()
                self._change(ServerStatus.up, last_healthy=time.time())
        return ""

    def _updated(self, endpoint: str) -> float:
        """`time.monotonic()` when the server's latest weight update is, or was, over."""
        over = read_updates(self._fleet_file).get(endpoint, 0.0)
        return time.monotonic() + over - time.time()

    def _change(self, status: ServerStatus, **values: object) -> None:
        def change() -> None:
            if status is not self.state.state or not self.state.since:
                self.state.since = time.time()
            self.state.state = status
            for name, value in values.items():
                setattr(self.state, name, value)

        self._publish(change)


def _backoff_s(fleet: FleetConfig, num_failures: int) -> float:
    """Pause before the next start: it doubles with every failure in a row, up to 64 times the first."""
    return fleet.restart_backoff_s * 2 ** min(num_failures - 1, 6)
