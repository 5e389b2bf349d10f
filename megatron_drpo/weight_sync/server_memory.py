"""rollout.colocated: servers let go of their device's memory while the trainer works, and take it back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.fleet.state import ServerStatus, read_fleet, yield_file
from megatron_drpo.rollout.time_limits import startup_limit_s
from megatron_drpo.weight_sync.client import MemoryTag, WeightClient
from megatron_drpo.weight_sync.path import Failures, reason_of

_POLL_S = 0.2


class ServerMemory:
    """Used on global rank 0 alone. Every method asks all servers at the same time, and reports failures.

    A file beside fleet.json tells the fleet's owner when the servers have let go: it starts none then, and
    asks none to generate.
    """

    def __init__(self, config: RolloutConfig, timeout_s: float) -> None:
        """
        Args:
            timeout_s: limit of each request.
        """
        self._config = config
        self._timeout_s = timeout_s
        self._released: dict[str, set[MemoryTag]] = {}
        """Endpoint -> what it has let go of."""

    @property
    def released(self) -> list[str]:
        """Endpoints of the servers that have let go of something."""
        return list(self._released)

    def announce(self) -> None:
        """From now on the fleet's owner starts no server; returns when none is starting any more."""
        if self._config.fleet_file is None:
            return
        yield_file(self._config.fleet_file).touch()
        deadline = time.monotonic() + startup_limit_s(self._config)
        while any(s.state is ServerStatus.starting for s in read_fleet(self._config.fleet_file).servers):
            if time.monotonic() > deadline:
                return  # its owner gives it up as well
            time.sleep(_POLL_S)

    def release(self, endpoints: Sequence[str]) -> Failures:
        """Have servers let go of weights and cache. Nothing may be asked of them before; what the fleet's
        owner asked is waited for."""

        async def release(client: WeightClient) -> None:
            info = await client.read_info()
            if not info.can_release_memory:
                raise WeightSyncError(
                    f"{client.endpoint}: rollout.colocated needs a server started with --enable-memory-saver"
                )
            await client.flush_cache(self._timeout_s)
            await client.release_memory(tuple(MemoryTag))
            self._released[client.endpoint] = set(MemoryTag)

        return self._ask(endpoints, release)

    def resume(self, endpoints: Sequence[str], tag: MemoryTag) -> Failures:
        """Give servers part of their memory back; what the weights are is undefined until an update."""

        async def resume(client: WeightClient) -> None:
            if tag in self._released.get(client.endpoint, ()):
                await client.resume_memory((tag,))
                self._released[client.endpoint].discard(tag)

        failures = self._ask(endpoints, resume)
        self._released = {endpoint: tags for endpoint, tags in self._released.items() if tags}
        for endpoint in failures:
            self._released.pop(endpoint, None)
        return failures

    def end(self) -> None:
        """The servers have their memory again: the fleet's owner may start servers."""
        if self._config.fleet_file is not None:
            yield_file(self._config.fleet_file).unlink(missing_ok=True)

    def _ask(self, endpoints: Sequence[str], step: Callable[[WeightClient], Awaitable[None]]) -> Failures:
        async def ask(endpoint: str) -> str | None:
            async with WeightClient(
                endpoint, timeout_s=self._timeout_s, api_key=self._config.api_key
            ) as client:
                try:
                    await step(client)
                except RolloutError as error:
                    return reason_of(error)
            return None

        async def ask_all() -> Failures:
            outcomes = await asyncio.gather(*(ask(endpoint) for endpoint in endpoints))
            return {
                endpoint: reason
                for endpoint, reason in zip(endpoints, outcomes, strict=True)
                if reason is not None
            }

        return asyncio.run(ask_all())
