"""report.png: the curves of a run, its gradient weights, and its tokens by probability, on one page.

`python -m megatron_drpo.metrics.report RUN_DIR` draws it again, also for a run still running.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from megatron_drpo.errors import DataError, DrpoError
from megatron_drpo.metrics.report_style import BLUE, INK, ORANGE, RED, SOFT, say, style
from megatron_drpo.metrics.report_tokens import draw_buckets, draw_weights
from megatron_drpo.metrics.writer import read_metrics

Record = dict[str, Any]

PHASE_COLOURS = {
    "rollout": "#2f5fc4",
    "reward": "#5fb3b3",
    "logprobs": "#c98ab8",
    "forward_backward": "#8e5ea2",
    "optimizer": "#4f9d5d",
    "weight_sync": "#e0b13c",
    "other": "#a9adb5",
}
_SMOOTH_FROM = 40
"""Steps from which a curve also gets a moving average."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    metric: str
    label: str
    colour: str = BLUE
    points: bool = False
    """Measured every so many steps only: markers, joined."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    curves: Sequence[Curve]
    includes: Sequence[float] = ()
    """Values the vertical axis always shows, so that noise does not look like a trend."""
    log: bool = False
    percent: bool = False


PANELS = (
    Panel(
        title="Reward and held-out accuracy",
        curves=(
            Curve(metric="reward/mean", label="reward, mean of a step"),
            Curve(metric="eval/accuracy", label="accuracy on held-out prompts", colour=ORANGE, points=True),
        ),
        includes=(0, 1.03),
    ),
    Panel(
        title="Response length, tokens",
        curves=(
            Curve(metric="response/length_mean", label="mean"),
            Curve(metric="response/length_max", label="longest", colour=ORANGE),
        ),
        includes=(0,),
    ),
    Panel(
        title="Trainer / rollout mismatch, |log π − log μ|",
        curves=(
            Curve(metric="mismatch/first_update_logprob_abs_mean", label="mean, before the updates"),
            Curve(metric="mismatch/logprob_abs_mean", label="mean of all updates", colour=SOFT),
            Curve(metric="mismatch/logprob_abs_max", label="largest", colour=ORANGE),
        ),
        log=True,
    ),
    Panel(
        title="Entropy of the policy, nats per token",
        curves=(Curve(metric="policy/entropy", label="entropy"),),
        includes=(0,),
    ),
    Panel(
        title="Gradient norm before clipping",
        curves=(Curve(metric="optimizer/grad_norm", label="gradient norm"),),
        log=True,
    ),
    Panel(title="Loss", curves=(Curve(metric="loss/value", label="loss"),)),
    Panel(
        title="Tokens outside the trust region",
        curves=(Curve(metric="trust_region/outside_share", label="share"),),
        includes=(0,),
        percent=True,
    ),
    Panel(
        title="Throughput, tokens/s",
        curves=(Curve(metric="throughput/tokens_per_s", label="tokens/s"),),
        includes=(0,),
    ),
)


def write_report(run_dir: str | Path) -> Path:
    """Draw run_dir/report.png from run_dir/metrics.jsonl.

    Raises:
        DataError: metrics.jsonl is missing, broken or has no step yet.
    """
    records = read_metrics(run_dir)
    if not records:
        raise DataError(f"{run_dir}/metrics.jsonl: no step recorded yet, so there is nothing to draw")
    figure = Figure(figsize=(16, 19), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        5,
        3,
        left=0.05,
        right=0.98,
        top=0.9225,
        bottom=0.037,
        hspace=0.42,
        wspace=0.2,
        height_ratios=(1, 1, 1, 1.15, 1),
    )
    cells = [figure.add_subplot(grid[i // 3, i % 3]) for i in range(9)]
    for axes, panel in zip(cells, PANELS, strict=False):
        style(axes, panel.title)
        _draw_curves(axes, panel, records)
    style(cells[-1], "Time of a step by phase, s")
    _draw_times(cells[-1], records)
    for axes in cells:
        axes.set_xlim(records[0]["step"] - 0.5, records[-1]["step"] + 0.5)
    draw_weights(figure.add_subplot(grid[3, :2]), figure.add_subplot(grid[3, 2]), records)
    draw_buckets([figure.add_subplot(grid[4, column]) for column in range(3)], records)
    figure.text(0.05, 0.969, Path(run_dir).resolve().name, size=20, weight="bold", color=INK)
    figure.text(0.05, 0.9495, _summary(records), size=11.5, color=SOFT)
    path = Path(run_dir) / "report.png"
    figure.savefig(path)
    return path


def moving_average(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the finite values within a centred window of `width` (odd); shorter at both ends."""
    finite = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


# ------------------------------------------------------------------------------------------- drawing


def _series(records: Sequence[Record], metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values) where the metric was measured; NaN where it was not finite."""
    measured = [(record["step"], record[metric]) for record in records if metric in record]
    steps = np.array([step for step, _ in measured], dtype=np.float64)
    values = np.array([math.nan if value is None else value for _, value in measured], dtype=np.float64)
    return steps, values


def _draw_curves(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    drawn = 0
    for curve in panel.curves:
        steps, values = _series(records, curve.metric)
        if len(steps):
            _draw_curve(axes, curve, steps, values)
            _mark_broken(axes, steps[~np.isfinite(values)])
            drawn += 1
    if not drawn:
        say(axes, "not measured in this run")
        return
    axes.set_xlabel("step", size=9, color=SOFT)
    if panel.includes:
        low, high = axes.get_ylim()
        if all(np.nanmin(line.get_ydata(), initial=0.0) >= 0 for line in axes.get_lines()):
            low = 0.0
        low, top = min(low, *panel.includes), max(panel.includes)
        axes.set_ylim(low, top if high <= top else high + 0.03 * (high - low))
    if panel.log and any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.get_lines()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1, 2, 5) if high < 1e3 * low else (1,)  # over many decades (1, 2, 5) gives no ticks at all
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _draw_curve(axes: Axes, curve: Curve, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    marker = "o" if curve.points or len(steps) == 1 else None
    if len(steps) < _SMOOTH_FROM or curve.points:
        axes.plot(
            steps, values, color=curve.colour, linewidth=1.8, marker=marker, markersize=5, label=curve.label
        )
        return
    smooth = moving_average(values, _smoothing_width(len(steps)))
    axes.plot(steps, values, color=curve.colour, linewidth=0.9, alpha=0.35)
    axes.plot(steps, smooth, color=curve.colour, linewidth=2, label=curve.label)


def _smoothing_width(num_steps: int) -> int:
    """A twentieth of the run, odd."""
    return num_steps // 20 | 1


def _mark_broken(axes: Axes, steps: NDArray[np.float64]) -> None:
    if len(steps):
        at_bottom = axes.get_xaxis_transform()
        axes.plot(steps, np.full(len(steps), 0.03), "x", color=RED, transform=at_bottom)
        axes.text(
            0.99, 0.06, f"× not finite: {len(steps)}", transform=axes.transAxes, ha="right", color=RED, size=9
        )


def _draw_times(axes: Axes, records: Sequence[Record]) -> None:
    steps, totals = _series(records, "time/step_s")
    if not len(steps):
        say(axes, "not measured in this run")
        return
    timed = [record for record in records if "time/step_s" in record]
    named = list(PHASE_COLOURS)[:-1]
    seconds = np.array([[record.get(f"time/{name}_s") or 0.0 for record in timed] for name in named])
    other = np.clip(totals - seconds.sum(axis=0), 0.0, None)
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    floor = np.zeros(len(steps))
    for name, values in zip(PHASE_COLOURS, [*seconds, other], strict=True):
        if not values.any():
            continue
        label = f"{name.replace('_', ' ')} {values.sum() / totals.sum():.0%}"
        axes.stairs(floor + values, edges, baseline=floor, fill=True, color=PHASE_COLOURS[name], label=label)
        floor = floor + values
    axes.set_ylim(0, 1.4 * float(np.max(totals)))
    axes.set_xlabel("step", size=9, color=SOFT)
    axes.legend(
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=3,
        loc="upper center",
        columnspacing=1,
        handlelength=1,
    )


def _summary(records: Sequence[Record]) -> str:
    last_step = records[-1]["step"]
    parts = ["1 step" if last_step == 1 else f"{last_step} steps"]
    for metric, name in (("reward/mean", "reward"), ("eval/accuracy", "held-out accuracy")):
        _, values = _series(records, metric)
        if len(values):
            parts.append(f"{name} {values[0]:.3f} → {values[-1]:.3f}")
    _, seconds = _series(records, "time/step_s")
    _, shares = _series(records, "time/overhead_share")
    if len(seconds) and len(shares) == len(seconds):
        overhead = float(np.nansum(seconds * shares) / np.nansum(seconds))
        parts.append(f"{np.nansum(seconds) / 60:.1f} minutes of steps")
        parts.append(f"{overhead:.1%} overhead")
    if len(records) >= _SMOOTH_FROM:
        parts.append(f"bold: mean of {_smoothing_width(len(records))} steps")
    return "   ·   ".join(parts)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m megatron_drpo.metrics.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(argv[0]))
    except DrpoError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
