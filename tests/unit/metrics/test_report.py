"""The numbers behind report.png, and that the page is drawn from any run."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_drpo.errors import DataError
from megatron_drpo.metrics import report
from megatron_drpo.metrics.diagnostics import W_HISTOGRAM_EDGES
from megatron_drpo.metrics.report import main, moving_average, sum_histograms, write_report
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
                    "time/step_s": 2.0,
                    "time/rollout_s": 1.9,
                    "time/overhead_share": 0.05,
                    W_HISTOGRAM: counts,
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


def test_histograms_add_up_over_the_steps_that_have_one() -> None:
    records = [{"step": 0, W_HISTOGRAM: [1, 2]}, {"step": 1}, {"step": 2, W_HISTOGRAM: [10, 20]}]
    np.testing.assert_array_equal(sum_histograms(records), [11, 22])
    assert len(sum_histograms([{"step": 0}])) == 0


def test_caption_states_the_shares_of_w() -> None:
    """1 token below 0, 30 in [0, 0.1), 969 in [1, 1.1) of 1,000."""
    counts = np.zeros(len(W_HISTOGRAM_EDGES) + 1)
    counts[[0, 11, 21]] = [1, 30, 969]
    caption = report._weights_caption(counts, np.array(report.w_bounds()))
    for expected in (
        "96.90 % of the tokens have w ≥ 1",
        "3.00 % have 0 ≤ w < 1",
        "0.10 % have w < 0",
        "1,000",
    ):
        assert expected in caption


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0.00 %"), (1e-6, "< 0.01 %"), (0.5, "50.00 %"), (1 - 1e-6, "> 99.99 %"), (1.0, "100.00 %")],
)
def test_share_is_never_rounded_to_none_or_all(share: float, shown: str) -> None:
    assert report._share(share) == shown


@pytest.mark.parametrize("num_steps", [1, 50])
def test_report_is_drawn(tmp_path: Path, num_steps: int) -> None:
    """Missing metrics, a NaN and a gradient norm of 0 included; the ink is where the panels are."""
    write_run(tmp_path, num_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(tmp_path)
    assert path == tmp_path / "report.png"
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[:2] == (1705, 1760)
    rows = np.array_split((pixels < 0.9).any(axis=2).mean(axis=1), 4)
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
