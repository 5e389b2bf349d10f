"""Pauses between the attempts of a request."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from megatron_drpo.rollout.http_errors import UnavailableError

T = TypeVar("T")
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 10.0
_RANDOM = random.Random()
"""Its own: what is random in a run does not depend on failures."""


class Backoff:
    """Pauses that double. Each is shortened at random, by up to a half, so that requests that failed together
    do not come back together."""

    def __init__(self) -> None:
        self._longest_s = _FIRST_PAUSE_S

    def next_s(self) -> float:
        """Seconds of the next pause."""
        longest_s = self._longest_s
        self._longest_s = min(2 * longest_s, _MAX_PAUSE_S)
        return longest_s * _RANDOM.uniform(0.5, 1.0)


async def retry_while_unavailable(
    call: Callable[[], Awaitable[T]],
    limit_s: float,
    kind: type[UnavailableError] = UnavailableError,
) -> T:
    """The result of a call to a server, repeated while the server is not available.

    Args:
        limit_s: no attempt begins later than this.
        kind: failures after which the call may be repeated.

    Raises:
        UnavailableError: it was not available for so long; says how often it was asked.
    """
    start, backoff, num_attempts = time.monotonic(), Backoff(), 0
    while True:
        num_attempts += 1
        try:
            return await call()
        except kind as error:
            pause_s = max(backoff.next_s(), error.retry_after_s)
            tried_s = time.monotonic() - start
            if tried_s + pause_s > limit_s:
                raise type(error)(f"{error} ({tries(num_attempts, tried_s)})") from error
        await asyncio.sleep(pause_s)


def tries(num_attempts: int, seconds: float) -> str:
    """How often and how long something was tried, in words."""
    return "tried once" if num_attempts == 1 else f"tried {num_attempts} times in {seconds:.1f} s"
