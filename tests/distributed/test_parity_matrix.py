"""Every objective under every layout against float64: a quarter of the matrix, with every pair of factors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.parity_cases import LAYOUTS, ROWS

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(960)
def test_loss_gradients_and_metrics_of_every_objective_under_every_layout(tmp_path: Path) -> None:
    """`tools/parity.py --matrix --pairwise` holds all limits and fills every cell."""
    file = tmp_path / "matrix.md"
    tool = [sys.executable, "tools/parity.py", "--matrix", "--pairwise", "--time-limit-s", "900"]
    run = subprocess.run(
        [*tool, "--markdown", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=930, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    heading, _, *lines = file.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: len(ROWS)]]
    assert heading == f"| objective | {' | '.join(LAYOUTS)} |"
    assert [row[0] for row in rows] == list(ROWS)
    shares = [float(cell) for row in rows for cell in row[1:]]
    assert len(shares) == len(ROWS) * len(LAYOUTS)
    assert max(shares) <= 1
