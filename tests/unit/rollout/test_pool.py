"""Which server a request goes to, with servers that say what they are told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from megatron_drpo.config.schema import FleetConfig, RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SGLangClient
from megatron_drpo.rollout.pool import ServerLostError, ServerPool

A, B = "http://a", "http://b"


class Client:
    """Generates unless its endpoint is in `broken`."""

    def __init__(self, endpoint: str, broken: set[str]) -> None:
        self.endpoint = endpoint
        self.num_probes = 0
        self._broken = broken

    async def generates(self, *, timeout_s: float) -> bool:
        self.num_probes += 1
        await asyncio.sleep(0.01)
        return self.endpoint not in self._broken

    async def close(self) -> None:
        return


def run(test: Callable[[ServerPool, set[str]], Coroutine[Any, Any, None]], **fields: Any) -> None:
    """Run a test with a pool of A and B in an event loop of its own."""
    broken: set[str] = set()
    fleet = FleetConfig(health_interval_s=0.05)
    config = RolloutConfig(fleet=fleet, no_server_timeout_s=fields.pop("no_server_timeout_s", 5.0), **fields)

    async def main() -> None:
        pool = ServerPool(config, lambda endpoint: cast(SGLangClient, Client(endpoint, broken)))
        await pool.set_servers([A, B])
        try:
            await test(pool, broken)
        finally:
            await pool.close()

    asyncio.run(main())


async def take(pool: ServerPool, num_samples: int = 1, **choice: Any) -> str:
    """The endpoint of a lease that ends at once."""
    async with pool.lease(num_samples, **choice) as server:
        return server.endpoint


def test_the_least_busy_but_a_known_prefix_is_worth_some_load() -> None:
    async def test(pool: ServerPool, _: set[str]) -> None:
        assert await take(pool) == A
        async with pool.lease(4) as first:
            assert first.endpoint == A
            assert await take(pool) == B
            async with pool.lease(2, avoid={A}):
                assert await take(pool) == B
                assert await take(pool, preferred=A) == A, "4 in flight are twice the idlest's 2"
            async with pool.lease(1, avoid={A}):
                assert await take(pool, preferred=A) == B, "more than twice"
            assert await take(pool, preferred="http://gone") == B
        assert await take(pool, avoid={A, B}) == A, "better than none"

    run(test)


def test_a_suspended_server_comes_back_when_it_generates() -> None:
    async def test(pool: ServerPool, broken: set[str]) -> None:
        broken.add(A)
        pool.suspend(pool.servers[0], "reset")
        assert await take(pool, preferred=A) == B
        assert pool.describe() == f"{A}: 0 samples in flight, suspended: reset; {B}: 0 samples in flight"
        await asyncio.sleep(0.3)
        assert await take(pool, preferred=A) == B, "it does not generate yet"
        broken.clear()
        async with asyncio.timeout(10):
            while await take(pool, preferred=A) != A:
                await asyncio.sleep(0.05)

    run(test)


def test_a_fenced_server_comes_back_only_with_new_weights() -> None:
    async def test(pool: ServerPool, _: set[str]) -> None:
        pool.fence(pool.servers[0], "old weights")
        await asyncio.sleep(0.3)
        assert await take(pool, preferred=A) == B
        await pool.set_servers([A, B])
        assert await take(pool, preferred=A) == A

    run(test)


def test_requests_at_a_server_that_leaves_or_hangs_are_given_up() -> None:
    async def hang(pool: ServerPool, endpoint: str) -> None:
        async with pool.lease(1, preferred=endpoint) as server:
            await server.run(asyncio.sleep(60))

    async def test(pool: ServerPool, broken: set[str]) -> None:
        leaving = asyncio.ensure_future(hang(pool, A))
        await asyncio.sleep(0)
        await pool.set_servers([B])
        with pytest.raises(ServerLostError, match=f"{A} left the fleet or hangs"):
            await leaving
        hanging = asyncio.ensure_future(hang(pool, B))
        await asyncio.sleep(0.15)
        assert not hanging.done(), "a probe that succeeds gives nothing up"
        broken.add(B)
        with pytest.raises(ServerLostError, match=f"{B} left the fleet or hangs"):
            await asyncio.wait_for(hanging, 10)
        assert pool.servers[0].suspended == "it generates nothing"
        assert pool.servers[0].num_in_flight == 0

    run(test)


def test_a_held_pool_gives_out_and_asks_nobody() -> None:
    """As while weights are new, or the trainer has the servers' memory."""

    async def test(pool: ServerPool, _: set[str]) -> None:
        pool.suspend(pool.servers[0], "reset")
        async with pool.lease(1):
            pool.hold()
            waiting = asyncio.ensure_future(take(pool))
            await asyncio.sleep(0.4)
            assert not waiting.done()
            assert [cast(Any, server.client).num_probes for server in pool.servers] == [0, 0]
            await pool.set_servers([B])
        assert await waiting == B

    run(test)


def test_servers_that_are_given_weights_are_not_taken_for_hung() -> None:
    """Neither during the update nor by a question from before it; afterwards they are."""

    async def test(pool: ServerPool, broken: set[str]) -> None:
        async with pool.lease(1) as server:
            pool.expect_update()
            broken.add(server.endpoint)
            await asyncio.sleep(0.3)
            assert cast(Any, server.client).num_probes == 0
            checking = asyncio.ensure_future(pool._check(server))
            await asyncio.sleep(0)  # it asks
            pool.expect_update()
            await checking
            assert pool.servers[0] is server
            await pool.set_servers([A, B])
            await asyncio.sleep(0.3)
            assert pool.servers[0] is not server

    run(test)


def test_no_server_for_too_long_is_an_error_that_says_why() -> None:
    async def test(pool: ServerPool, broken: set[str]) -> None:
        broken |= {A, B}
        for server in pool.servers:
            pool.suspend(server, "reset by peer")
        with pytest.raises(RolloutError, match=r"no_server_timeout_s=0\.2: http://a: .*reset by peer"):
            await take(pool)
        await pool.set_servers([])
        with pytest.raises(RolloutError, match="no server has current weights"):
            await take(pool)

    run(test, no_server_timeout_s=0.2)


def test_the_time_of_a_hold_does_not_count() -> None:
    """The trainer may need longer for its part than a server may be away."""

    async def test(pool: ServerPool, _: set[str]) -> None:
        pool.hold()
        begun = pool.clock()
        waiting = asyncio.ensure_future(take(pool))
        await asyncio.sleep(0.6)
        assert not waiting.done()
        assert pool.clock() == begun
        await pool.set_servers([A])
        assert await waiting == A
        assert begun <= pool.clock() < begun + 0.5

    run(test, no_server_timeout_s=0.2)


def test_a_server_that_asks_for_a_pause_gets_it() -> None:
    async def test(pool: ServerPool, _: set[str]) -> None:
        pool.suspend(pool.servers[0], "HTTP 429", at_least_s=0.8)
        start = time.monotonic()
        await asyncio.sleep(0.3)
        assert cast(Any, pool.servers[0].client).num_probes == 0
        await pool.set_servers([A])
        assert await take(pool) == A
        assert time.monotonic() - start >= 0.8

    run(test)


def test_a_fenced_server_does_not_come_back_by_an_earlier_suspension() -> None:
    async def test(pool: ServerPool, _: set[str]) -> None:
        server = pool.servers[0]
        pool.suspend(server, "HTTP 503")
        pool.fence(server, "old weights")
        await asyncio.sleep(0.5)
        assert server.suspended == "old weights"
        assert pool.has_other(set())
        assert not pool.has_other({B})

    run(test)
