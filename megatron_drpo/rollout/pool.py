"""Which server a request goes to: those with current weights, the least busy first, none that just failed.

Everything here runs in the engine's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SGLangClient
from megatron_drpo.rollout.retry import Backoff

T = TypeVar("T")
_PREFIX_WORTH = 2
"""A server that has the prefix is taken while it has at most so many times the samples of the idlest one."""


class ServerLostError(RolloutError):
    """The server left the fleet, or hangs, while it worked on a request; nothing is wrong with the
    request."""


class NoServerError(RolloutError):
    """None took requests for rollout.no_server_timeout_s."""


class PooledServer:
    """One server with current weights."""

    def __init__(self, client: SGLangClient, suspended: str = "") -> None:
        self.client = client
        self.suspended = suspended
        """Why it gets no requests at present; empty if it does."""
        self.retry_at = 0.0
        """`time.monotonic()` before which it wants no requests."""
        self.num_in_flight = 0
        """Samples."""
        self._lost = asyncio.Event()

    @property
    def endpoint(self) -> str:
        return self.client.endpoint

    def lose(self) -> None:
        """Give up all its requests."""
        self._lost.set()

    async def run(self, request: Coroutine[Any, Any, T]) -> T:
        """The request's result.

        Raises:
            ServerLostError: the server was lost first; the request is cancelled.
        """
        work = asyncio.ensure_future(request)
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and (work.exception() is None or not self._lost.is_set()):
                return work.result()
            raise ServerLostError(f"{self.endpoint} left the fleet or hangs")
        finally:
            lost.cancel()
            work.cancel()


class ServerPool:
    """The servers that requests may go to at present."""

    def __init__(self, config: RolloutConfig, build_client: Callable[[str], SGLangClient]) -> None:
        self._config = config
        self._build_client = build_client
        self._servers: dict[str, PooledServer] = {}
        self._changed = asyncio.Event()
        self._held_since: float | None = None
        self._held_s = 0.0
        """Without the hold of now."""
        self._is_updating = False
        self._num_updates = 0
        self._watching: asyncio.Task[None] | None = None
        self._lifting: dict[PooledServer, asyncio.Task[None]] = {}

    @property
    def servers(self) -> list[PooledServer]:
        """In the order given to `set_servers`."""
        return list(self._servers.values())

    async def set_servers(self, endpoints: Iterable[str]) -> None:
        """These and no others, free of suspensions but for those that a server has asked for. Requests at a
        server that is not among them fail with ServerLostError."""
        wanted = dict.fromkeys(endpoint.rstrip("/") for endpoint in endpoints)
        kept = self._servers
        self._servers = {
            endpoint: kept.pop(endpoint, None) or PooledServer(self._build_client(endpoint))
            for endpoint in wanted
        }
        now = time.monotonic()
        for server in self._servers.values():
            if server.retry_at <= now:
                server.suspended = ""
        self._held_s, self._held_since = now - self.clock(), None
        self._is_updating = False
        self._changed.set()
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())
        for server in kept.values():
            server.lose()
            await server.client.close()

    @asynccontextmanager
    async def lease(
        self, num_samples: int, *, preferred: str | None = None, avoid: Collection[str] = ()
    ) -> AsyncIterator[PooledServer]:
        """A server for that many samples, counted as in flight until the block ends; waits for one.

        Args:
            preferred: the endpoint that has the request's prefix in its cache.
            avoid: endpoints to take only if there is no other.

        Raises:
            NoServerError: none within rollout.no_server_timeout_s, holds not counted.
        """
        server = await self._wait_for_server(preferred, avoid)
        server.num_in_flight += num_samples
        try:
            yield server
        finally:
            server.num_in_flight -= num_samples

    def hold(self) -> None:
        """Give out no server, and ask none to generate, until `set_servers`."""
        if self._held_since is None:
            self._held_since = time.monotonic()

    def expect_update(self) -> None:
        """All servers are given weights: ask none to generate until `set_servers`."""
        self._is_updating = True
        self._num_updates += 1

    def clock(self) -> float:
        """Seconds that go by while servers are given out, and stand still during a hold."""
        now = time.monotonic() if self._held_since is None else self._held_since
        return now - self._held_s

    def suspend(self, server: PooledServer, reason: str, *, at_least_s: float = 0.0) -> None:
        """No more requests to it until it is seen to generate, or until `set_servers`.

        Args:
            at_least_s: but not before so many seconds.
        """
        server.retry_at = max(server.retry_at, time.monotonic() + at_least_s)
        if not server.suspended and self._servers.get(server.endpoint) is server:
            server.suspended = reason
            self._lift_later(server)

    def fence(self, server: PooledServer, reason: str) -> None:
        """No more requests to it until `set_servers` says that it has current weights."""
        server.suspended, server.retry_at = reason, 0.0
        if server in self._lifting:
            self._lifting[server].cancel()

    def has_other(self, avoid: Collection[str]) -> bool:
        """Whether a server can be had that is not to be avoided."""
        return any(not server.suspended and server.endpoint not in avoid for server in self.servers)

    def describe(self) -> str:
        """One clause per server."""
        if not self._servers:
            return "no server has current weights"
        return "; ".join(
            f"{server.endpoint}: {server.num_in_flight} samples in flight"
            + (f", suspended: {server.suspended}" if server.suspended else "")
            for server in self._servers.values()
        )

    async def close(self) -> None:
        for task in [*self._lifting.values(), *([self._watching] if self._watching else [])]:
            task.cancel()
        for server in self._servers.values():
            await server.client.close()

    # ------------------------------------------------------------------------------------ choice

    @property
    def _is_held(self) -> bool:
        return self._held_since is not None

    async def _wait_for_server(self, preferred: str | None, avoid: Collection[str]) -> PooledServer:
        limit_s = self._config.no_server_timeout_s
        start = self.clock()
        while (server := self._choose(preferred, avoid)) is None:
            remaining = start + limit_s - self.clock()
            if remaining <= 0:
                raise NoServerError(
                    f"no rollout server took requests for rollout.no_server_timeout_s={limit_s:g}: "
                    f"{self.describe()}"
                )
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._is_held else remaining):
                    await self._changed.wait()
        return server

    def _choose(self, preferred: str | None, avoid: Collection[str]) -> PooledServer | None:
        if self._is_held:
            return None
        free = [server for server in self._servers.values() if not server.suspended]
        free = [server for server in free if server.endpoint not in avoid] or free
        if not free:
            return None
        idlest = min(free, key=lambda server: server.num_in_flight)
        known = next((server for server in free if server.endpoint == preferred), idlest)
        return known if known.num_in_flight <= _PREFIX_WORTH * idlest.num_in_flight else idlest

    # ------------------------------------------------------------------------------------ health

    async def _watch(self) -> None:
        """A server that has requests but generates nothing is replaced by itself, suspended: its requests go
        elsewhere."""
        while True:
            await asyncio.sleep(self._config.fleet.health_interval_s)
            if self._is_held or self._is_updating:
                continue
            busy = [
                server for server in self._servers.values() if server.num_in_flight and not server.suspended
            ]
            await asyncio.gather(*(self._check(server) for server in busy))

    async def _check(self, server: PooledServer) -> None:
        before = self._num_updates
        if await self._generates(server) or self._servers.get(server.endpoint) is not server:
            return
        if self._num_updates != before:  # an update kept it from generating
            return
        successor = PooledServer(self._build_client(server.endpoint), suspended="it generates nothing")
        self._servers[server.endpoint] = successor
        self._lift_later(successor)
        server.lose()
        await server.client.close()

    def _lift_later(self, server: PooledServer) -> None:
        if server in self._lifting:  # of a suspension that `set_servers` has ended
            self._lifting[server].cancel()
        task = self._lifting[server] = asyncio.ensure_future(self._lift(server))
        task.add_done_callback(self._forget_lift)

    def _forget_lift(self, done: asyncio.Task[None]) -> None:
        self._lifting = {server: task for server, task in self._lifting.items() if task is not done}

    async def _lift(self, server: PooledServer) -> None:
        backoff = Backoff()
        while True:
            await asyncio.sleep(max(backoff.next_s(), server.retry_at - time.monotonic()))
            if not server.suspended or self._servers.get(server.endpoint) is not server:
                return
            if self._is_held or self._is_updating or server.retry_at > time.monotonic():
                continue
            if await self._generates(server):
                server.suspended = ""
                self._changed.set()

    async def _generates(self, server: PooledServer) -> bool:
        return await server.client.generates(timeout_s=self._config.fleet.health_timeout_s)
