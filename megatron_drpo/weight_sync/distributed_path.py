"""Weights by broadcast over gloo or NCCL, from global rank 0 to groups of servers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence

from megatron_drpo.errors import RolloutError
from megatron_drpo.weight_sync.bucket import Bucket
from megatron_drpo.weight_sync.group import BroadcastGroup, join_group
from megatron_drpo.weight_sync.nccl import find_unlike
from megatron_drpo.weight_sync.path import Failures, Server, begin, end

_CLOSE_S = 5.0
"""How long closing waits for servers to leave their groups."""


class DistributedPath:
    """Groups are kept between updates, and made anew only for servers that are new or failed.

    With one server per group no server ever waits for another. In a larger group one that fails takes the
    others of its group along, because a broadcast needs all ranks.
    """

    def __init__(self, *, host: str, backend: str, servers_per_group: int, timeout_s: float) -> None:
        """
        Args:
            host: this machine's address as the servers reach it.
            backend: gloo (buckets on the CPU) or nccl (on a GPU).
            timeout_s: limit of a broadcast, and of making a group.
        """
        self._host = host
        self._backend = backend
        self._servers_per_group = servers_per_group
        self._timeout_s = timeout_s
        self._version = ""
        self._groups: list[BroadcastGroup] = []
        self._answers: dict[BroadcastGroup, list[asyncio.Future[None]]] = {}
        """To requests under way, in order."""

    async def open(self, servers: Sequence[Server], version: str) -> Failures:
        self._version = version
        failures = _embedded(servers)
        if self._backend == "nccl":
            failures |= find_unlike(servers, os.environ)
        ready = [server for server in servers if server.endpoint not in failures]
        failures |= await begin(ready)
        ready = [server for server in ready if server.endpoint not in failures]
        members = {server.endpoint for server in ready}
        for group in [group for group in self._groups if group.endpoints & members]:
            # A group serves an update only as a whole: all its members, or none of them.
            if not group.endpoints <= members:
                self._drop(group)
        grouped = {endpoint for group in self._groups for endpoint in group.endpoints}
        new = [server for server in ready if server.endpoint not in grouped]
        size = self._servers_per_group
        parts = [new[start : start + size] for start in range(0, len(new), size)]
        for outcome in await asyncio.gather(*(self._join(part) for part in parts)):
            failures |= outcome
        return failures

    async def send(self, servers: Sequence[Server], bucket: Bucket) -> Failures:
        version = self._version if bucket.is_last else None

        async def send(group: BroadcastGroup) -> None:
            if not group.is_connected:
                await self._transfer(group, bucket.smallest(), None)
            await self._transfer(group, bucket, version)

        return await self._at_groups(servers, send)

    async def finish(self, servers: Sequence[Server]) -> Failures:
        failures = await self._at_groups(servers, self._collect)
        return failures | await end([server for server in servers if server.endpoint not in failures])

    async def _transfer(self, group: BroadcastGroup, bucket: Bucket, version: str | None) -> None:
        """Have all servers of a group receive a bucket and load it."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
        shapes = [list(shape) for shape in bucket.shapes]

        async def receive(server: Server) -> None:
            await server.client.update_weights_from_distributed(
                names=bucket.names,
                dtypes=dtypes,
                shapes=shapes,
                group_name=group.name,
                weight_version=version,
            )

        # A server takes part in a broadcast once it has this request, and NCCL's first one needs all ranks.
        answers = [
            *self._answers.pop(group, []),
            *(asyncio.ensure_future(receive(server)) for server in group.servers),
        ]
        self._answers[group] = answers
        await group.broadcast(bucket.data, answers)
        if not group.keeps_order:
            await self._collect(group)

    async def _collect(self, group: BroadcastGroup) -> None:
        """Wait for the answers to the buckets that were sent."""
        for answer in self._answers.pop(group, []):
            await answer

    async def discard(self, endpoints: Sequence[str]) -> None:
        for group in list(self._groups):
            if not group.endpoints.isdisjoint(endpoints):
                self._drop(group)

    async def close(self) -> None:
        async def leave(server: Server, name: str) -> None:
            try:
                await server.client.destroy_weights_update_group(name)
            except RolloutError:  # a server that is gone has left
                return

        members = [(server, group.name) for group in self._groups for server in group.servers]
        tasks = [asyncio.ensure_future(leave(server, name)) for server, name in members]
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in pending:
                task.cancel()
        for group in list(self._groups):
            self._drop(group)

    async def _join(self, servers: Sequence[Server]) -> Failures:
        try:
            group = await join_group(
                servers, host=self._host, backend=self._backend, timeout_s=self._timeout_s
            )
        except RolloutError as error:
            return {server.endpoint: str(error) for server in servers}
        self._groups.append(group)
        return {}

    async def _at_groups(
        self, servers: Sequence[Server], step: Callable[[BroadcastGroup], Awaitable[None]]
    ) -> Failures:
        """Run a step at all groups of these servers at the same time; a group fails as a whole."""
        endpoints = {server.endpoint for server in servers}

        async def run(group: BroadcastGroup) -> Failures:
            try:
                await step(group)
            except RolloutError as error:
                return {endpoint: str(error) for endpoint in group.endpoints}
            return {}

        groups = [group for group in self._groups if group.endpoints <= endpoints]
        failures: Failures = {}
        for outcome in await asyncio.gather(*(run(group) for group in groups)):
            failures |= outcome
        return failures

    def _drop(self, group: BroadcastGroup) -> None:
        self._groups.remove(group)
        for answer in self._answers.pop(group, []):
            answer.cancel()
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it
        group.drop()


def _embedded(servers: Sequence[Server]) -> Failures:
    reason = "the embedded server joins no broadcast; set weight_sync.path to tensor"
    return {server.endpoint: reason for server in servers if server.info.is_embedded}
