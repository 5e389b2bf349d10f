"""The numbers behind report.png, and that the page is drawn from any run."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_drpo.errors import DataError
from megatron_drpo.metrics import report
from megatron_drpo.metrics.diagnostics import W_HISTOGRAM_EDGES
from megatron_drpo.metrics.report import Curve, Panel, main, moving_average, write_report
from megatron_drpo.metrics.writer import W_HISTOGRAM, MetricsWriter


def write_run(run_dir: Path, num_steps: int) -> None:
    counts = [0.0] * (len(W_HISTOGRAM_EDGES) + 1)
    counts[0], counts[11], counts[21] = 1.0, 30.0, 969.0
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        writer.write(0, {"eval/accuracy": 0.25})
        for step in range(1, num_steps + 1):
            writer.write(
                step,
                {
                    "reward/mean": step / 4,
                    "loss/value": math.nan if step == 2 else -0.1,
                    "optimizer/grad_norm": 0.0,
                    "mismatch/logprob_abs_mean": 1e-6 * (step + 1),
                    "mismatch/first_update_logprob_abs_mean": 1e-6,
                    "time/step_s": 2.0,
                    "time/rollout_s": 1.9,
                    "time/overhead_share": 0.05,
                    W_HISTOGRAM: counts,
                    "mu_bucket/token_share": [0.0, 0.01, 0.02, 0.07, 0.1, 0.2, 0.6],
                    "mu_bucket/outside_share": [0.0] * 7,
                    "mu_bucket/logprob_abs_mean": [0.0, 3e-6, 2e-6, 2e-6, 1e-6, 1e-6, 1e-7],
                },
            )


def test_moving_average_against_a_plain_loop() -> None:
    values = np.random.default_rng(0).normal(size=50)
    values[[0, 20, 21, 49]] = [math.nan, math.inf, math.nan, -math.inf]
    expected = []
    for i in range(50):
        window = [value for value in values[max(0, i - 2) : i + 3] if math.isfinite(value)]
        expected.append(sum(window) / len(window))
    np.testing.assert_allclose(moving_average(values, 5), expected, rtol=1e-12)


def test_moving_average_of_nothing_finite_is_a_gap() -> None:
    values = np.array([math.nan, math.nan, math.nan, 4.0])
    np.testing.assert_array_equal(moving_average(values, 3), [math.nan, math.nan, 4.0, 4.0])


@pytest.mark.parametrize("num_steps", [1, 50])
def test_report_is_drawn(tmp_path: Path, num_steps: int) -> None:
    """Missing metrics, a NaN and a gradient norm of 0 included; the ink is where the panels are."""
    write_run(tmp_path, num_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(tmp_path)
    assert path == tmp_path / "report.png"
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[:2] == (2090, 1760)
    rows = np.array_split((pixels < 0.9).any(axis=2).mean(axis=1), 5)
    assert all(row.max() > 0.05 for row in rows)


def test_summary_names_first_and_last_values(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    summary = report._summary(report.read_metrics(tmp_path))
    assert "3 steps" in summary
    assert "reward 0.250 → 0.750" in summary
    assert "held-out accuracy 0.250 → 0.250" in summary
    assert "0.1 minutes of steps" in summary
    assert "5.0% overhead" in summary


def test_run_without_steps_is_an_error(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False):
        pass
    with pytest.raises(DataError, match="no step recorded yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.png").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "metrics.jsonl: no such file" in capsys.readouterr().err
    write_run(tmp_path, 1)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.png")


@pytest.mark.parametrize(("values", "top"), [((0.0, 0.0), 0.06), ((101.0, 102.0), 106.0)])
def test_an_axis_that_starts_at_zero_shows_nothing_below_it(values: tuple[float, float], top: float) -> None:
    """A share of 0 in all steps, and a throughput whose largest value stays inside."""
    axes = Figure().subplots()
    panel = Panel(title="", curves=(Curve(metric="x", label="x"),), includes=(0,))
    report._draw_curves(axes, panel, [{"step": step, "x": value} for step, value in enumerate(values)])
    low, high = axes.get_ylim()
    assert low == 0
    assert 1.02 * values[1] < high < top


@pytest.mark.parametrize(("low", "expected"), [(0.3, "0.5"), (1e-3, "0.01"), (2e-8, "1e-06")])
def test_a_logarithmic_axis_has_numbers_whatever_its_range(low: float, expected: str) -> None:
    """Three metrics of one panel may lie nine decades apart."""
    axes = Figure().subplots()
    panel = Panel(title="", curves=(Curve(metric="x", label="x"),), log=True)
    report._draw_curves(axes, panel, [{"step": 1, "x": low}, {"step": 2, "x": 20.0}])
    bottom, top = axes.get_ylim()
    labels = axes.get_yticklabels()
    shown = [label.get_text() for label in labels if bottom <= label.get_position()[1] <= top]
    assert expected in shown
    assert 3 <= len(shown) <= 10


def test_phases_without_time_have_no_entry() -> None:
    axes = Figure().subplots()
    report._draw_times(axes, [{"step": 1, "time/step_s": 2.0, "time/rollout_s": 1.5, "time/reward_s": 0.0}])
    assert axes.get_legend_handles_labels()[1] == ["rollout 75%", "other 25%"]
