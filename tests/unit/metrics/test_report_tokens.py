"""The numbers in the panels about tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_drpo.metrics import report_tokens
from megatron_drpo.metrics.diagnostics import W_HISTOGRAM_EDGES
from megatron_drpo.metrics.report_tokens import average_buckets, draw_buckets, sum_histograms
from megatron_drpo.metrics.writer import W_HISTOGRAM, w_bounds


def record(num_tokens: float, share: Sequence[float], outside: Sequence[float | None]) -> dict[str, Any]:
    return {
        W_HISTOGRAM: [num_tokens - 1, 1],
        "mu_bucket/token_share": share,
        "mu_bucket/outside_share": outside,
        "mu_bucket/logprob_abs_mean": [0.25 * x if x is not None else None for x in outside],
    }


EARLIER = record(100, [0.1, 0, 0, 0.2, 0, 0.3, 0.4], [0.5, 0, 0, 0.1, 0, 0.2, 0])
LATER = record(300, [0, 0, 0.5, 0.1, 0, 0.3, 0.1], [0, 0, 0.25, 0.4, 0, 0.3, 0])


def test_histograms_add_up_over_the_steps_that_have_one() -> None:
    records = [{"step": 0, W_HISTOGRAM: [1, 2]}, {"step": 1}, {"step": 2, W_HISTOGRAM: [10, 20]}]
    np.testing.assert_array_equal(sum_histograms(records), [11, 22])
    assert len(sum_histograms([{"step": 0}])) == 0


def test_buckets_are_averaged_over_tokens_not_over_steps() -> None:
    """Bucket 3: 20 tokens at 0.1 and 30 at 0.4 are 50 at 0.28."""
    counts, means = average_buckets([EARLIER, {"step": 5}, LATER], "mu_bucket/outside_share")
    np.testing.assert_allclose(counts, [10, 0, 150, 50, 0, 120, 70], rtol=1e-12)
    np.testing.assert_allclose(means, [0.5, math.nan, 0.25, 0.28, math.nan, 33 / 120, 0.0], rtol=1e-12)


def test_a_value_that_was_not_finite_spoils_its_bucket_only() -> None:
    broken = record(100, [0.1, 0, 0, 0.2, 0, 0.3, 0.4], [None, None, 0, 0.1, 0, 0.2, 0])
    _, means = average_buckets([broken], "mu_bucket/outside_share")
    np.testing.assert_allclose(means, [math.nan, math.nan, math.nan, 0.1, math.nan, 0.2, 0.0])


def texts_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """The words in each of the three panels, drawn for real."""
    cells = list(Figure().subplots(1, 3))
    draw_buckets(cells, records)
    return [[text.get_text() for text in axes.texts] for axes in cells]


def test_bars_carry_the_averages_of_the_last_tenth() -> None:
    """11 steps: the last two are drawn. Shares of 400 tokens."""
    shares, outside, mismatch = texts_of([record(7, [1] + [0] * 6, [1] * 7)] * 9 + [EARLIER, LATER])
    assert shares[:7] == ["2.5 %", "0 %", "38 %", "12 %", "0 %", "30 %", "18 %"]
    assert "μ ≤ 0.01: 40.00 % of the tokens" in shares[7]
    assert outside == ["50 %", "no token", "25 %", "28 %", "no token", "28 %", "0 %"]
    assert mismatch == ["0.12", "no token", "0.062", "0.07", "no token", "0.069", "0"]


def test_bars_of_a_run_without_buckets() -> None:
    assert texts_of([{"step": 1}]) == [["not measured in this run"]] * 3


def test_caption_states_the_shares_of_w() -> None:
    """1 token below 0, 30 in [0, 0.1), 969 in [1, 1.1) of 1,000."""
    counts = np.zeros(len(W_HISTOGRAM_EDGES) + 1)
    counts[[0, 11, 21]] = [1, 30, 969]
    caption = report_tokens._weights_caption(counts, np.array(w_bounds()))
    for expected in (
        "96.90 % of the tokens have w ≥ 1",
        "3.00 % have 0 ≤ w < 1",
        "0.10 % have w < 0",
        "1,000",
    ):
        assert expected in caption


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.234, "23 %"), (0.0567, "5.7 %"), (0.000412, "0.041 %")],
)
def test_percentages_are_short(share: float, shown: str) -> None:
    assert report_tokens._percent(share) == shown
