"""Connections to the servers that take part in updates."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_drpo.errors import RolloutError
from megatron_drpo.weight_sync.client import WeightClient
from megatron_drpo.weight_sync.path import Failures, Server, reason_of
from megatron_drpo.weight_sync.quantised import refuse_quantised


class Servers:
    """Asks each endpoint once what it is, and keeps the answer until the server fails."""

    def __init__(self, timeout_s: float, api_key: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._api_key = api_key
        self._known: dict[str, Server] = {}

    async def find(self, endpoints: Sequence[str]) -> tuple[list[Server], Failures]:
        """The servers at some endpoints that can be given weights, and why others cannot."""
        failures: Failures = {}

        async def ask(endpoint: str) -> None:
            client = WeightClient(endpoint, timeout_s=self._timeout_s, api_key=self._api_key)
            try:
                info = await client.read_info()
                refuse_quantised(info, client.endpoint)
                self._known[endpoint] = Server(client, info)
            except RolloutError as error:
                failures[endpoint] = reason_of(error)
                await client.close()

        await asyncio.gather(*(ask(endpoint) for endpoint in endpoints if endpoint not in self._known))
        return [self._known[endpoint] for endpoint in endpoints if endpoint not in failures], failures

    async def forget(self, endpoints: Sequence[str]) -> None:
        """Keep nothing of servers that failed: another one may have their place by the next update."""
        for endpoint in endpoints:
            if endpoint in self._known:
                await self._known.pop(endpoint).client.close()

    async def close(self) -> None:
        """Close all connections."""
        await self.forget(list(self._known))
