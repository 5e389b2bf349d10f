"""Pauses between attempts."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from megatron_drpo.rollout.http_errors import NotDoneError, UnavailableError
from megatron_drpo.rollout.retry import Backoff, retry_while_unavailable, tries


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    state = random.getstate()
    rows = [[backoff.next_s() for _ in range(12)] for backoff in (Backoff() for _ in range(50))]
    longest = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, *[10.0] * 6]
    for column, limit in zip(zip(*rows, strict=True), longest, strict=True):
        assert limit / 2 <= min(column)
        assert max(column) <= limit
        assert max(column) > 1.2 * min(column)
    assert random.getstate() == state, "a run's own random numbers do not depend on failures"


class Call:
    """Fails so many times."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.times: list[float] = []

    async def __call__(self) -> str:
        self.times.append(time.monotonic())
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_a_call_is_repeated_while_the_server_is_not_available() -> None:
    call = Call(UnavailableError("HTTP 502"), NotDoneError("HTTP 503", retry_after_s=0.6))
    assert asyncio.run(retry_while_unavailable(call, 10.0)) == "done"
    assert call.times[1] - call.times[0] >= 0.1
    assert call.times[2] - call.times[1] >= 0.6


def test_other_failures_are_not_repeated() -> None:
    call = Call(UnavailableError("HTTP 502"))
    with pytest.raises(UnavailableError, match=r"^HTTP 502$"):
        asyncio.run(retry_while_unavailable(call, 10.0, NotDoneError))
    assert len(call.times) == 1


def test_it_ends_in_time_and_says_how_often_it_was_tried() -> None:
    start = time.monotonic()
    with pytest.raises(NotDoneError, match=r"^HTTP 503 \(tried [23] times in 0\.\d s\)$"):
        asyncio.run(retry_while_unavailable(Call(*[NotDoneError("HTTP 503")] * 99), 0.6))
    assert time.monotonic() - start < 5
    with pytest.raises(NotDoneError, match=r"^HTTP 503 \(tried once\)$"):
        asyncio.run(retry_while_unavailable(Call(NotDoneError("HTTP 503", retry_after_s=60)), 0.6))


def test_words() -> None:
    assert tries(1, 0.1) == "tried once"
    assert tries(4, 12.345) == "tried 4 times in 12.3 s"
