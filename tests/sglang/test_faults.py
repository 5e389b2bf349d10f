"""Real servers that are killed, stopped and cut off in the middle of a run; tools/fault_run.py does more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.fault_run import run


@pytest.mark.sglang
@pytest.mark.timeout(900)
def test_a_run_survives_its_servers(tmp_path: Path) -> None:
    """Every prompt is trained once, every token under the version it carries, and no process is left."""
    outcome = run(tmp_path, ["kill@generate", "stop@sync", "reset@generate"], num_servers=2, seed=0)
    assert outcome.problems == []
    assert len(outcome.faults) == 3
