"""metrics.jsonl and TensorBoard, across crashes and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_drpo.errors import CheckpointError, DataError
from megatron_drpo.metrics.diagnostics import W_HISTOGRAM_EDGES
from megatron_drpo.metrics.writer import BUCKET_SCALARS, W_HISTOGRAM, MetricsWriter, read_metrics, w_bounds


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def write_steps(run_dir: Path, *steps: int, tensorboard: bool = False, value: float = 0.5) -> int:
    with MetricsWriter(run_dir, tensorboard=tensorboard) as writer:
        for step in steps:
            writer.write(step, {"reward/mean": value + step})
        return writer.position


def test_one_object_per_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new", tensorboard=False) as writer:
        writer.write(0, {"reward/mean": 0.25, W_HISTOGRAM: [1.0, 0.0, 3.0]})
        writer.write(1, {"reward/mean": 0.5})
    first, second = lines_of(tmp_path / "new")
    assert json.loads(first) == {"step": 0, "reward/mean": 0.25, W_HISTOGRAM: [1.0, 0.0, 3.0]}
    assert json.loads(second) == {"step": 1, "reward/mean": 0.5}


def test_line_is_readable_before_close(tmp_path: Path) -> None:
    """A kill loses nothing that was written."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(7, {"loss/value": -1.5})
        assert read_metrics(tmp_path) == [{"step": 7, "loss/value": -1.5}]


def test_a_sentence_stays_a_sentence(tmp_path: Path) -> None:
    """Not a sequence of characters."""
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(3, {"alarm": "0 of 1.2M loss tokens", "loss/value": 0.5})
    assert read_metrics(tmp_path) == [{"step": 3, "alarm": "0 of 1.2M loss tokens", "loss/value": 0.5}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("alarm/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (3, b"0 of 1.2M loss tokens")
    assert [(event.step, event.value) for event in events.Scalars("loss/value")] == [(3, 0.5)]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_non_finite_values_become_null(tmp_path: Path, broken: float) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"loss/value": broken, W_HISTOGRAM: [1.0, broken]})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(lines_of(tmp_path)[0], parse_constant=refuse)
    assert record == {"step": 0, "loss/value": None, W_HISTOGRAM: [1.0, None]}


def test_torn_last_line_is_removed_on_open(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    write_steps(tmp_path, 1)
    assert [json.loads(line)["step"] for line in lines_of(tmp_path)] == [0, 1]


def test_truncate_forgets_the_steps_after_a_checkpoint(tmp_path: Path) -> None:
    position = write_steps(tmp_path, 0, 1, 2)
    assert position == (tmp_path / "metrics.jsonl").stat().st_size
    write_steps(tmp_path, 3, 4)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate(position)
        assert writer.position == position
        writer.write(3, {"reward/mean": 9.0})
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[-1]["reward/mean"] == 9.0


def test_truncate_to_the_beginning(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 1)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate(0)
        assert writer.position == 0
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("offset", [-3, +5])
def test_truncate_refuses_another_file(tmp_path: Path, offset: int) -> None:
    """Neither inside a line nor beyond the end; the file stays as it is."""
    position = write_steps(tmp_path, 0, 1)
    before = lines_of(tmp_path)
    refused = pytest.raises(CheckpointError, match=f"had {position + offset} bytes.*checkpoint.load_path")
    with MetricsWriter(tmp_path, tensorboard=False) as writer, refused:
        writer.truncate(position + offset)
    assert lines_of(tmp_path) == before


def test_read_metrics_names_the_broken_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: expected an object with the key `step`"):
        read_metrics(tmp_path)


def test_tensorboard_scalars_without_the_steps_run_again(tmp_path: Path) -> None:
    """Steps 0-3, then a resume at 2: the display has every step once, with its last value."""
    write_steps(tmp_path, 0, 1, 2, 3, tensorboard=True, value=0.0)
    write_steps(tmp_path, 2, 3, tensorboard=True, value=10.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 12.0),
        (3, 13.0),
    ]


def test_tensorboard_histogram_of_w(tmp_path: Path) -> None:
    """5 tokens in [1, 1.1) and 3 below -1: counts, bounds and moments as computed by hand."""
    counts = [0.0] * (len(W_HISTOGRAM_EDGES) + 1)
    counts[0], counts[1 + W_HISTOGRAM_EDGES.index(1.0)] = 3.0, 5.0
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(4, {W_HISTOGRAM: counts})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    (event,) = events.Histograms(W_HISTOGRAM)
    histogram = event.histogram_value
    assert event.step == 4
    assert histogram.num == 8
    assert histogram.sum == pytest.approx(3 * -1.05 + 5 * 1.05)
    assert histogram.sum_squares == pytest.approx(8 * 1.05**2)
    filled = {
        round(limit, 6): count
        for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True)
        if count
    }
    assert filled == {-1.0: 3.0, 1.1: 5.0}


def test_bounds_have_a_bin_per_count() -> None:
    bounds = w_bounds()
    assert len(bounds) == len(W_HISTOGRAM_EDGES) + 2
    assert bounds[1:-1] == list(W_HISTOGRAM_EDGES)
    assert (bounds[0], bounds[-1]) == (pytest.approx(-1.1), pytest.approx(3.1))


def test_tensorboard_has_the_chosen_buckets_as_scalars(tmp_path: Path) -> None:
    """metrics.jsonl keeps every list as it is."""
    values = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    lists = dict.fromkeys((*BUCKET_SCALARS, "mu_bucket/entropy"), values)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(2, lists)
    assert read_metrics(tmp_path) == [{"step": 2, **lists}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    labels = ("0.0001", "0.001", "0.01", "0.1", "0.5", "0.9", "1")
    assert sorted(cast(list[str], events.Tags()["scalars"])) == sorted(
        f"{name}/up_to_{label}" for name in BUCKET_SCALARS for label in labels
    )
    for label, value in zip(labels, values, strict=True):
        (event,) = events.Scalars(f"mu_bucket/outside_share/up_to_{label}")
        assert (event.step, event.value) == (2, value)
