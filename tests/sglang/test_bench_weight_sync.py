"""tools/bench_weight_sync.py without arguments, on a smaller model: it makes what it needs and deletes it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from tools import bench_weight_sync


@pytest.mark.rare
@pytest.mark.sglang
@pytest.mark.timeout(400)
def test_without_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_weight_sync, "_MODEL", {})
    monkeypatch.setattr(bench_weight_sync, "_NUM_SERVERS", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "argv", ["bench_weight_sync.py", "--num-repeats=1"])
    assert bench_weight_sync.main() == 0
    output = capsys.readouterr().out
    for told in ("writing a random model", "starting 1 SGLang servers", "1 server(s): turn 1 of 1"):
        assert told in output
    assert output.count("distributed+checksum") == 2, "told, and in the table"
    assert list(tmp_path.iterdir()) == []
