"""metrics.jsonl and TensorBoard: one record per step, kept right across crashes and resumes."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

# Made by protobuf when the module is imported.
from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from megatron_drpo.errors import CheckpointError, DataError
from megatron_drpo.metrics.diagnostics import MU_BUCKET_EDGES, W_HISTOGRAM_EDGES

Metrics = Mapping[str, float | str | Sequence[float]]
"""Flat: a number per name, a list of numbers for histograms and buckets, or a sentence (`alarm`)."""

W_HISTOGRAM = "trust_region/w_histogram"
BUCKET_SCALARS = ("mu_bucket/ratio_mean", "mu_bucket/prob_abs_mean", "mu_bucket/outside_share")
"""What TensorBoard shows by probability of the token; metrics.jsonl has all."""


def w_bounds() -> list[float]:
    """Bounds of the histogram's bins as drawn: the open ones at both ends are as wide as the others."""
    edges = W_HISTOGRAM_EDGES
    return [2 * edges[0] - edges[1], *edges, 2 * edges[-1] - edges[-2]]


class MetricsWriter:
    """Appends to run_dir/metrics.jsonl and, if asked to, run_dir/tensorboard.

    One JSON object per line: `step`, the number of steps finished, then the metrics. NaN and infinities are
    written as null, because JSON has no name for them; readers see a gap. Opening a file whose last line a
    crash cut short removes that line.

    Args:
        run_dir: exists or is made.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool) -> None:
        self._path = metrics_path(run_dir)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        _drop_torn_line(self._path)
        self._file = self._path.open("ab")
        self._tensorboard_dir = self._path.parent / "tensorboard" if tensorboard else None
        self._events: SummaryWriter | None = None

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one step; it survives a kill of this process."""
        record = {"step": step} | {name: _jsonable(value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._tensorboard_dir is not None:
            if self._events is None:
                # Whatever an earlier process logged from this step on is void: it was not in the checkpoint.
                self._events = SummaryWriter(str(self._tensorboard_dir), purge_step=step)
            _write_events(self._events, step, metrics)

    @property
    def position(self) -> int:
        """Bytes of metrics.jsonl, all of them on disk now. A checkpoint keeps it for `truncate`."""
        if self._events is not None:
            self._events.flush()
        os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def truncate(self, position: int) -> None:
        """Forget the lines after a checkpoint's `position`, whose steps are about to be run again.

        Raises:
            CheckpointError: no line ends at that position.
        """
        content = self._path.read_bytes()
        if position and content[position - 1 : position] != b"\n":
            raise CheckpointError(
                f"{self._path}: the checkpoint was saved when this file had {position} bytes, but "
                f"no line ends there now ({len(content)} bytes). Put the file back, or "
                "continue in a new run_dir with checkpoint.load_path"
            )
        self._file.truncate(position)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics_path(run_dir: str | Path) -> Path:
    return Path(run_dir) / "metrics.jsonl"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, also of one still running: a last line without its end is left out.

    Raises:
        DataError: no such file, or a line that is not a JSON object.
    """
    path = metrics_path(run_dir)
    if not path.is_file():
        raise DataError(f"{path}: no such file; is {run_dir} the folder of a run?")
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not valid JSON: {error}") from None
    if not isinstance(record, dict) or "step" not in record:
        raise DataError(f"{path}, line {number}: expected an object with the key `step`")
    return cast(dict[str, Any], record)


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _jsonable(value: float | str | Sequence[float]) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [_jsonable(item) for item in value]
    return value if math.isfinite(value) else None


def _write_events(events: SummaryWriter, step: int, metrics: Metrics) -> None:
    scalars: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, str):
            events.add_text(name, value, step)
        elif not isinstance(value, Sequence):
            scalars[name] = value
        elif name in BUCKET_SCALARS:
            for edge, item in zip(MU_BUCKET_EDGES, value, strict=True):
                scalars[f"{name}/up_to_{edge:g}"] = item
        elif name == W_HISTOGRAM:
            _write_histogram(events, step, name, value)
    # One event for all: add_scalar would make one each, at 0.1 ms.
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
    cast(FileWriter, events.file_writer).add_summary(summary, step)


def _write_histogram(events: SummaryWriter, step: int, name: str, counts: Sequence[float]) -> None:
    """Counts per bin as TensorBoard wants them; the moments are those of the bins' middles."""
    bounds = w_bounds()
    middles = [(low + high) / 2 for low, high in itertools.pairwise(bounds)]
    events.add_histogram_raw(
        name,
        min=bounds[0],
        max=bounds[-1],
        num=sum(counts),
        sum=sum(count * w for count, w in zip(counts, middles, strict=True)),
        sum_squares=sum(count * w * w for count, w in zip(counts, middles, strict=True)),
        bucket_limits=bounds[1:],
        bucket_counts=list(counts),
        global_step=step,
    )
