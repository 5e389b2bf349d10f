"""The panels of report.png about tokens: gradient weights, and what depends on the token's probability."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter
from numpy.typing import NDArray

from megatron_drpo.metrics.diagnostics import MU_BUCKET_EDGES
from megatron_drpo.metrics.report_style import BLUE, INK, ORANGE, RED, SOFT, format_share, say, style
from megatron_drpo.metrics.writer import W_HISTOGRAM, w_bounds

Record = dict[str, Any]

_NUM_RARE = MU_BUCKET_EDGES.index(0.01) + 1
"""Buckets of the tokens with mu <= 0.01."""


def sum_histograms(records: Sequence[Record]) -> NDArray[np.float64]:
    """[bins] counts of w over all steps."""
    counts = [record[W_HISTOGRAM] for record in records if W_HISTOGRAM in record]
    return np.sum(np.asarray(counts, dtype=np.float64), axis=0) if counts else np.zeros(0)


def draw_weights(axes: Axes, caption: Axes, records: Sequence[Record]) -> None:
    """The histogram of w, and beside it in words what it says."""
    style(axes, "Gradient weights w of all trained tokens (count, logarithmic)")
    caption.set_axis_off()
    counts = sum_histograms(records)
    total = counts.sum()
    if not total:
        say(axes, "not measured in this run")
        return
    edges = np.asarray(w_bounds(), dtype=np.float64)
    colours = [RED if high <= 0 else BLUE for high in edges[1:]]
    axes.bar(
        edges[:-1],
        counts,
        width=np.diff(edges),
        align="edge",
        color=colours,
        edgecolor="white",
        linewidth=0.4,
    )
    axes.set_yscale("log")
    axes.set_ylim(0.5, 8 * counts.max())
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("w", size=10, color=SOFT)
    for position, text in ((0.0, "w = 0: no gradient"), (1.0, "w = 1: plain policy gradient")):
        axes.axvline(position, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            text,
            (position, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -3),
            textcoords="offset points",
            size=9,
            color=INK,
            va="top",
        )
    caption.text(0, 1, _weights_caption(counts, edges), size=11, color=INK, va="top", linespacing=1.5)


def _weights_caption(counts: NDArray[np.float64], edges: NDArray[np.float64]) -> str:
    total = counts.sum()
    turned = counts[edges[1:] <= 0].sum() / total
    damped = counts[(edges[:-1] >= 0) & (edges[1:] <= 1)].sum() / total
    raised = counts[edges[:-1] >= 1].sum() / total
    paragraphs = (
        "A token's gradient is −A · r · w: advantage, ratio π/μ, and the weight w that the loss gives it.",
        f"{format_share(raised)} of the tokens have w ≥ 1: at the policy that sampled them, "
        "or moving back to it.",
        f"{format_share(damped)} have 0 ≤ w < 1: moving away, and held back the more the further they are.",
        f"{format_share(turned)} have w < 0 (red): beyond the trust region; their gradient is turned back.",
        f"{int(total):,} tokens. The outermost bars hold everything beyond them as well.",
    )
    return "\n\n".join(textwrap.fill(paragraph, 52) for paragraph in paragraphs)


def average_buckets(
    records: Sequence[Record], metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Over the loss tokens of `records`, by bucket of mu: ([7] number of tokens, [7] mean of the metric).

    Args:
        metric: a mean over a bucket's tokens, such as mu_bucket/outside_share. NaN where there is no token.
    """
    counts, means = np.zeros(len(MU_BUCKET_EDGES)), np.zeros(len(MU_BUCKET_EDGES))
    for record in records:
        if metric in record:
            num_tokens = sum(record[W_HISTOGRAM]) * np.asarray(
                record["mu_bucket/token_share"], dtype=np.float64
            )
            # null, where the value was not finite, becomes NaN.
            values = np.asarray(record[metric], dtype=np.float64)
            means += np.where(num_tokens > 0, num_tokens * values, 0.0)
            counts += num_tokens
    return counts, np.divide(means, counts, out=np.full_like(means, np.nan), where=counts > 0)


def draw_buckets(cells: Sequence[Axes], records: Sequence[Record]) -> None:
    """By mu, over the last tenth of the steps: share of tokens, share outside the trust region, mismatch."""
    measured = [record for record in records if "mu_bucket/token_share" in record]
    last = measured[-math.ceil(len(measured) / 10) :]
    shares, outside, mismatch = cells
    style(shares, "Tokens by their probability μ")
    style(outside, "Share outside the trust region, by μ")
    style(mismatch, "Mean |log π − log μ|, by μ")
    counts, outside_B = average_buckets(last, "mu_bucket/outside_share")
    _, mismatch_B = average_buckets(last, "mu_bucket/logprob_abs_mean")
    if not counts.any():
        for axes in cells:
            say(axes, "not measured in this run")
        return
    shares_B = counts / counts.sum()
    _draw_bars(shares, shares_B, _percent)
    _draw_bars(outside, outside_B, _percent)
    _draw_bars(mismatch, mismatch_B, "{:.2g}".format)
    for axes in (shares, outside):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    steps = "1 step" if len(last) == 1 else f"{len(last)} steps"
    for axes in cells:
        axes.set_xlabel(f"μ when sampled, last {steps}", size=9, color=SOFT)
    text = (
        f"μ ≤ 0.01: {format_share(float(shares_B[:_NUM_RARE].sum()))} of the tokens\n"
        "(Qwen3-30B-A3B-Base: 7.8 %,\narXiv 2606.09821, Figure 2)"
    )
    white = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    shares.text(
        0.02,
        0.96,
        text,
        transform=shares.transAxes,
        size=9,
        color=ORANGE,
        va="top",
        linespacing=1.4,
        bbox=white,
    )


def _draw_bars(axes: Axes, values_B: NDArray[np.float64], label: Callable[[float], str]) -> None:
    """A bar between the edges of each bucket; the rare tokens' in orange, none where there is no token."""
    bars = np.nan_to_num(values_B, nan=0.0)
    colours = [ORANGE if i < _NUM_RARE else BLUE for i in range(len(bars))]
    axes.bar(np.arange(len(bars)) + 0.5, bars, width=0.86, color=colours)
    for i, value in enumerate(values_B):
        text = "no token" if math.isnan(value) else label(float(value))
        axes.annotate(
            text,
            (i + 0.5, bars[i]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            size=8,
            color=INK,
        )
    axes.set_xlim(0, len(bars))
    if bars.any():
        axes.set_ylim(0, 1.3 * float(bars.max()))
    else:
        axes.set_ylim(0, 1)
        axes.set_yticks([])
    axes.set_xticks(
        range(len(bars) + 1), ["0", "1e-4", "1e-3", *(f"{edge:g}" for edge in MU_BUCKET_EDGES[2:])]
    )
    axes.xaxis.set_minor_locator(NullLocator())


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
