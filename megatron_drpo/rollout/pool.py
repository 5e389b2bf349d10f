"""Which server a request goes to: those with current weights, the least busy first, none that just failed.

Everything here runs in the engine's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from megatron_drpo.config import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SGLangClient

T = TypeVar("T")
_FIRST_SUSPENSION_S = 0.2
_MAX_SUSPENSION_S = 10.0
_PREFIX_WORTH = 2
"""A server that has the prefix is taken while it has at most so many times the samples of the idlest one."""


class ServerLostError(RolloutError):
    """The server left the fleet, or hangs, while it worked on a request; nothing is wrong with the
    request."""


class PooledServer:
    """One server with current weights."""

    def __init__(self, client: SGLangClient, suspended: str = "") -> None:
        self.client = client
        self.suspended = suspended
        """Why it gets no requests at present; empty if it does."""
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
        self._is_held = False
        self._watching: asyncio.Task[None] | None = None
        self._lifting: dict[PooledServer, asyncio.Task[None]] = {}

    @property
    def servers(self) -> list[PooledServer]:
        """In the order given to `set_servers`."""
        return list(self._servers.values())

    async def set_servers(self, endpoints: Iterable[str]) -> None:
        """These and no others, free of suspensions. Requests at a server that is not among them fail with
        ServerLostError."""
        wanted = dict.fromkeys(endpoint.rstrip("/") for endpoint in endpoints)
        kept = self._servers
        self._servers = {
            endpoint: kept.pop(endpoint, None) or PooledServer(self._build_client(endpoint))
            for endpoint in wanted
        }
        for server in self._servers.values():
            server.suspended = ""
        self._is_held = False
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
            RolloutError: no server within rollout.no_server_timeout_s.
        """
        server = await self._wait_for_server(preferred, avoid)
        server.num_in_flight += num_samples
        try:
            yield server
        finally:
            server.num_in_flight -= num_samples

    def hold(self) -> None:
        """Give out no server, and ask none to generate, until `set_servers`."""
        self._is_held = True

    def suspend(self, server: PooledServer, reason: str) -> None:
        """No more requests to it until it is seen to generate, or until `set_servers`."""
        if not server.suspended and self._servers.get(server.endpoint) is server:
            server.suspended = reason
            self._lift_later(server)

    def fence(self, server: PooledServer, reason: str) -> None:
        """No more requests to it until `set_servers` says that it has current weights."""
        server.suspended = reason

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

    async def _wait_for_server(self, preferred: str | None, avoid: Collection[str]) -> PooledServer:
        limit_s = self._config.no_server_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while (server := self._choose(preferred, avoid)) is None:
                    self._changed.clear()
                    await self._changed.wait()
                return server
        except TimeoutError:
            raise RolloutError(
                f"no rollout server took requests for rollout.no_server_timeout_s={limit_s:g}: "
                f"{self.describe()}"
            ) from None

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
            if self._is_held:
                continue
            busy = [
                server for server in self._servers.values() if server.num_in_flight and not server.suspended
            ]
            await asyncio.gather(*(self._check(server) for server in busy))

    async def _check(self, server: PooledServer) -> None:
        if await self._generates(server) or self._servers.get(server.endpoint) is not server:
            return
        successor = PooledServer(self._build_client(server.endpoint), suspended="it generates nothing")
        self._servers[server.endpoint] = successor
        self._lift_later(successor)
        server.lose()
        await server.client.close()

    def _lift_later(self, server: PooledServer) -> None:
        task = asyncio.ensure_future(self._lift(server))
        self._lifting[server] = task
        task.add_done_callback(lambda _: self._lifting.pop(server, None))

    async def _lift(self, server: PooledServer) -> None:
        pause_s = _FIRST_SUSPENSION_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_SUSPENSION_S)
            if not server.suspended or self._servers.get(server.endpoint) is not server:
                return
            if not self._is_held and await self._generates(server):
                server.suspended = ""
                self._changed.set()

    async def _generates(self, server: PooledServer) -> bool:
        return await server.client.generates(timeout_s=self._config.fleet.health_timeout_s)
