"""Attempts of a request that brought nothing: whether there may be another one, where and when."""

from __future__ import annotations

import asyncio

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.http_errors import UnavailableError
from megatron_drpo.rollout.pool import ServerPool
from megatron_drpo.rollout.retry import Backoff, tries

_NUM_TOLD = 3
"""Further reasons that the last error names."""


class Failures:
    """Attempts in a row that brought nothing.

    Those that are the state of a server's fault may go on for rollout.no_server_timeout_s; the others, which
    may be the request's own, are counted.
    """

    def __init__(self, config: RolloutConfig, pool: ServerPool) -> None:
        self.avoid: set[str] = set()
        """Endpoints that failed, until all have."""
        self._config = config
        self._pool = pool
        self._reasons: list[str] = []
        self._num_counted = 0
        self._first_at = 0.0
        self._backoff = Backoff()

    def add(self, error: RolloutError, endpoint: str, begun: float) -> None:
        """Take in a failure.

        Args:
            begun: when the attempt began, by the pool's clock.

        Raises:
            RolloutError: it was one too many.
        """
        if not self._reasons:
            self._first_at = begun
        self._reasons.append(str(error))
        self.avoid.add(endpoint)
        if self.avoid.issuperset(server.endpoint for server in self._pool.servers):
            self.avoid = {endpoint}
        if not isinstance(error, UnavailableError):
            self._num_counted += 1
            if self._num_counted > self._config.num_retries:
                raise self.ending(f"rollout.num_retries={self._config.num_retries}")
        # The attempt itself may have been long: a server that worked for ten minutes was there.
        elif begun - self._first_at >= self._config.no_server_timeout_s:
            raise self.ending(f"rollout.no_server_timeout_s={self._config.no_server_timeout_s:g}")

    async def pause(self) -> None:
        """Before the next attempt, unless it can be at a server that has not failed."""
        if not self._pool.has_other(self.avoid):
            await asyncio.sleep(self._backoff.next_s())

    def ending(self, limit: str) -> RolloutError:
        """The error that ends it all.

        Args:
            limit: what was reached.
        """
        if not self._reasons:
            return RolloutError(limit)
        last = self._reasons[-1]
        before = [reason for reason in dict.fromkeys(self._reasons) if reason != last]
        told = tries(len(self._reasons), self._pool.clock() - self._first_at)
        others = f"; before: {'; '.join(before[-_NUM_TOLD:])}" if before else ""
        return RolloutError(f"{last} ({told}; {limit}{others})")
