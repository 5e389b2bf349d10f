"""What the three ways to a server have in common: tensor, distributed, disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.http_errors import UnavailableError
from megatron_drpo.weight_sync.bucket import Bucket
from megatron_drpo.weight_sync.client import ServerInfo, WeightClient

Failures = dict[str, str]
"""Endpoint -> what went wrong there; see `reason_of`."""


class Absence(str):
    """A reason that speaks of a server that is not available at present, not of the update."""

    __slots__ = ()


def reason_of(error: RolloutError) -> str:
    """What went wrong; an Absence if the server was not available."""
    is_absence = any(isinstance(e, UnavailableError) for e in (error, error.__cause__))
    return Absence(error) if is_absence else str(error)


@dataclass(frozen=True, slots=True)
class Server:
    """One server that takes part in an update."""

    client: WeightClient
    info: ServerInfo

    @property
    def endpoint(self) -> str:
        return self.client.endpoint


class WeightPath(Protocol):
    """Brings the buckets of an update to servers.

    A step that fails at a server is in the answer, never raised, and that server gets no further step. No
    step takes much longer than the time limit of one request.
    """

    async def open(self, servers: Sequence[Server], version: str) -> Failures:
        """Make the servers ready to receive an update."""
        ...

    async def send(self, servers: Sequence[Server], bucket: Bucket) -> Failures:
        """Bring one bucket to the servers; its buffer is free afterwards."""
        ...

    async def finish(self, servers: Sequence[Server]) -> Failures:
        """Have the servers take the new weights, all of which have been sent; they are paused now."""
        ...

    async def discard(self, endpoints: Sequence[str]) -> None:
        """Forget what is kept for servers that failed. Never waits for them."""
        ...

    async def close(self) -> None:
        """Release everything; quick even where servers are dead."""
        ...


async def attempt(servers: Sequence[Server], step: Callable[[Server], Awaitable[None]]) -> Failures:
    """Run a step at all servers at the same time."""

    async def run(server: Server) -> str | None:
        try:
            await step(server)
        except RolloutError as error:
            return reason_of(error)
        return None

    outcomes = await asyncio.gather(*(run(server) for server in servers))
    return {
        server.endpoint: reason
        for server, reason in zip(servers, outcomes, strict=True)
        if reason is not None
    }


async def begin(servers: Sequence[Server]) -> Failures:
    """Pause the servers and open an update at each."""

    async def step(server: Server) -> None:
        await server.client.pause_generation()
        await server.client.begin_weight_update()

    return await attempt(servers, step)


async def end(servers: Sequence[Server]) -> Failures:
    """Close the update at each server."""
    return await attempt(servers, lambda server: server.client.end_weight_update())
