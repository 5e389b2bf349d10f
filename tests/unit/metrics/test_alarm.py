"""Sequences of steps worked out by hand."""

from __future__ import annotations

import pytest

from megatron_drpo.metrics.alarm import TrustRegionAlarm, _short


def feed(alarm: TrustRegionAlarm, *steps: tuple[int, int]) -> list[bool]:
    """Whether each (loss tokens, tokens outside) made the alarm speak."""
    return [alarm.update(*step) is not None for step in steps]


def test_no_token_outside_is_said_once_per_window() -> None:
    alarm = TrustRegionAlarm(window_steps=3)
    assert feed(alarm, *[(100, 0)] * 9) == [False, False, True] * 3


def test_a_single_token_outside_silences_its_window_only() -> None:
    alarm = TrustRegionAlarm(window_steps=3)
    steps = [(100, 0), (100, 0), (100, 1), (100, 0), (100, 0), (100, 0)]
    assert feed(alarm, *steps) == [False] * 5 + [True]


def test_more_than_half_counts_tokens_not_steps() -> None:
    """1 of 10 and 18 of 20 are 19 of 30; 10 of 20 and 5 of 10 are exactly half, which is still silent."""
    assert feed(TrustRegionAlarm(2), (10, 1), (20, 18)) == [False, True]
    assert feed(TrustRegionAlarm(2), (20, 10), (10, 5)) == [False, False]
    assert feed(TrustRegionAlarm(2), (20, 11), (10, 5)) == [False, True]


def test_windows_without_loss_tokens_are_silent() -> None:
    assert feed(TrustRegionAlarm(2), (0, 0), (0, 0), (0, 0), (7, 0)) == [False, False, False, True]


def test_the_messages_say_how_many_and_what_to_do() -> None:
    alarm = TrustRegionAlarm()
    messages = [alarm.update(24_000, 0) for _ in range(50)]
    assert messages[:-1] == [None] * 49
    last = messages[-1]
    assert last is not None
    assert last.startswith("0 of 1.2M loss tokens outside the trust region in 50 steps")
    assert "fine if every step is one update" in last
    assert "tighter bound (algorithm.loss: delta" in last
    (wide,) = [text for _ in range(50) if (text := alarm.update(10, 6)) is not None]
    assert wide.startswith("60.0% of 500 loss tokens outside the trust region in 50 steps")
    assert "optimizer.lr" in wide
    assert "wider bound (algorithm.loss: delta" in wide


@pytest.mark.parametrize(
    ("count", "shown"),
    [(7, "7"), (999, "999"), (1000, "1.0k"), (1_234_567, "1.2M"), (25_000_000, "25.0M"), (3 * 10**9, "3.0B")],
)
def test_counts_are_short(count: int, shown: str) -> None:
    assert _short(count) == shown
