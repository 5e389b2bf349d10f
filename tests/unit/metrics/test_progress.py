"""The display, on a console that writes to a string."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from megatron_drpo.metrics.progress import Progress

METRICS: dict[str, float | str | list[float]] = {
    "reward/mean": 0.53125,
    "response/length_mean": 12.34,
    "response/truncated_share": 0.025,
    "mismatch/first_update_logprob_abs_mean": 1.234e-6,
    "throughput/tokens_per_s": 12345.6,
    "trust_region/w_histogram": [1.0, 2.0],
    "alarm": "printed by who raises it",
    "time/step_s": 4.0,
    "time/rollout_s": 2.0,
    "time/forward_backward_s": 1.0,
    "time/other_s": 1.0,
    "time/checkpoint_s": 2.0,
}


def make_console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=120), stream


def test_one_line_per_step_without_a_terminal() -> None:
    console, stream = make_console(terminal=False)
    with Progress(11, live=True, console=console) as progress:
        progress.message("resumed from [step 0]")
        progress.phase("rollout")
        progress.step(0, {"eval/accuracy": 0.25})
        progress.step(1, METRICS | {"mismatch/faulty_tokens": 0.0})
        progress.step(2, METRICS | {"eval/accuracy": 0.875, "mismatch/faulty_tokens": 3.0})
    message, before, first, second = stream.getvalue().splitlines()
    assert message == "resumed from [step 0]"
    assert before == "step 0/11 | accuracy 25.0% | ETA --:--"
    assert first == (
        "step 1/11 | reward 0.531 | length 12.3 tokens | truncated 2.5% | mismatch |dlogp| 1.23e-06 | "
        "throughput 12,346 tokens/s | 4.00 s (rollout 50%, forward_backward 25%, other 25%) | ETA 01:00"
    )
    assert "step 2/11 | reward 0.531 | accuracy 87.5% |" in second
    assert "| mismatch |dlogp| 1.23e-06 | faulty tokens 3 |" in second
    assert second.endswith("ETA 00:54")


def test_eta_follows_the_last_ten_steps() -> None:
    """40 s for each of the first 5 steps, then 10 x 100 s: 85 steps of 100 s are left."""
    console, stream = make_console(terminal=False)
    with Progress(100, live=False, console=console) as progress:
        for step in range(1, 16):
            progress.step(step, {"time/step_s": 40.0 if step <= 5 else 100.0})
    assert stream.getvalue().splitlines()[-1].endswith("ETA 2:21:40")


def test_live_display_shows_numbers_trend_and_phases() -> None:
    console, stream = make_console(terminal=True)
    with Progress(4, live=True, console=console) as progress:
        for step, reward in enumerate((0.0, 0.5, 1.0), 1):
            progress.step(step, METRICS | {"reward/mean": reward})
        progress.message("a line that stays")
        progress.phase("weight_sync")
    final = stream.getvalue()
    for expected in ("a line that stays", "step 3/4", "1.000", "▁▅█", "12,346 tokens/s", "ETA 00:06", "done"):
        assert expected in final
    assert "rollout\N{NO-BREAK SPACE}2.00\N{NO-BREAK SPACE}s" in final


def test_live_display_before_the_first_step_and_after_a_failure() -> None:
    console, stream = make_console(terminal=True)
    with pytest.raises(ZeroDivisionError), Progress(4, live=True, console=console):
        raise ZeroDivisionError
    assert "no step finished yet" in stream.getvalue()
    assert "failed" in stream.getvalue()


def test_non_finite_values_are_shown_and_leave_a_gap() -> None:
    console, stream = make_console(terminal=True)
    with Progress(4, live=True, console=console) as progress:
        for step, loss in enumerate((1.0, math.nan, 2.0, math.inf), 1):
            progress.step(step, {"loss/value": loss})
    assert "inf" in stream.getvalue()
    assert "▁ █" in stream.getvalue()


def test_lines_where_a_terminal_is_not_wanted() -> None:
    console, stream = make_console(terminal=True)
    with Progress(2, live=False, console=console) as progress:
        progress.step(1, {"reward/mean": 0.5})
    assert stream.getvalue() == "step 1/2 | reward 0.500 | ETA --:--\n"
