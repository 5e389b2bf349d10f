"""The benches as they are called without arguments, on small things: what they say, and what stays."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tools import bench_conversion
from tools.bench_overlap import StepTimes, crossing

ROOT = Path(__file__).parents[2]
TINY = ("--layers=1", "--hidden-size=64", "--heads=4", "--kv-heads=2", "--head-dim=16", "--experts=4")
TINY += ("--experts-per-token=2", "--expert-size=32", "--vocab-size=128")


@pytest.mark.parametrize(
    ("rollout", "train", "expected"),
    [
        ([2.0, 2.0, 2.0], [1.0, 1.5, 4.0], 184),  # 0.5 above at 160, 2 below at 280: a fifth of the way
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 160),
        ([1.0, 1.0, 1.0], [2.0, 3.0, 4.0], 80),
        ([5.0, 5.0, 5.0], [2.0, 3.0, 4.0], 280),
    ],
)
def test_the_length_at_which_sampling_takes_as_long_as_training(
    rollout: list[float], train: list[float], expected: int
) -> None:
    times = [StepTimes(step=r + t, rollout=r) for r, t in zip(rollout, train, strict=True)]
    assert crossing([80, 160, 280], times) == expected


def overlap(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With the embedded server, and hardly any work."""
    tool = [sys.executable, str(ROOT / "tools" / "bench_overlap.py"), "--engine=embedded", "--num-prompts=1"]
    command = [*tool, "--response-tokens=4", "--repeats=1", f"--folder={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.rare
@pytest.mark.server
@pytest.mark.timeout(900)
def test_overlap_tells_every_step(tmp_path: Path) -> None:
    done = overlap(tmp_path, "--minutes=14")
    assert done.returncode == 0, done.stdout + done.stderr
    for told in (
        "starting a server (embedded)",
        "looking for the length of prompts: step 7 of 7, prompts of 440 tokens: rollout ",
        "synchronous, run 1 of 1: step 11 of 11",
        "one-step-off, run 1 of 1: step 11 of 11",
    ):
        assert told in done.stdout
    assert "one-step-off step" in done.stdout


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
def test_overlap_ends_when_the_time_is_over(tmp_path: Path) -> None:
    """Here before the server generates, on any machine."""
    started = time.monotonic()
    done = overlap(tmp_path, "--minutes=0.42")
    assert done.returncode == 1
    assert "did not answer within rollout.startup_timeout_s=1;" in done.stdout
    assert time.monotonic() - started < 200.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_conversion, "_MADE", TINY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench_conversion.py", "--repeats=1"])
    assert bench_conversion.main() == 0
    output = capsys.readouterr().out
    for told in ("writing a random model", "turn 1 of 1: cp_fsync ... ", "turn 1 of 1: megatron_to_hf ... "):
        assert told in output
    assert list(tmp_path.iterdir()) == []


def test_conversion_begins_no_turn_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_conversion, "_MADE", TINY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def measure(_: str, row: bench_conversion.Row) -> None:
        (folder,) = (path for made in tmp_path.iterdir() for path in made.glob("tmp*"))
        (folder / row.name).mkdir()
        for values in (row.seconds, row.tree_bytes, row.process_bytes):
            values.append(1)

    monkeypatch.setattr(bench_conversion, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench_conversion.py", "--minutes=0"])
    assert bench_conversion.main() == 0
    output = capsys.readouterr().out
    assert "turn 1 of 3: cp_fsync ... 1.0 s" in output
    assert "no time for turn 2 of 3: --minutes 0" in output
    assert "turn 2 of 3: cp_fsync" not in output


def test_conversion_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_conversion, "_MADE_BYTES", 1e18)
    monkeypatch.setattr(sys, "argv", ["bench_conversion.py"])
    with pytest.raises(SystemExit, match=r"GB free, of 1000000000 GB needed: --output$"):
        bench_conversion.main()
