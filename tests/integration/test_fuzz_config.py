"""Configurations that nobody means: a sample of what `tools/fuzz_config.py` runs in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.fuzz_config import Fuzzer, choose_cases


@pytest.mark.slow
def test_check_says_no_or_yes_and_nothing_else(tmp_path: Path) -> None:
    """300 cases: a ConfigError or a configuration that loads again; no traceback, no hang."""
    fuzzer = Fuzzer(tmp_path)
    results = {case: fuzzer.run(case) for case in choose_cases(300, seed=0)}
    broken = [f"{case}: {problem}" for case, (_, problem) in results.items() if problem is not None]
    assert broken == []
    num_accepted = sum(accepted for accepted, _ in results.values())
    assert 0 < num_accepted < 100, "neither refuses all nor accepts most"
