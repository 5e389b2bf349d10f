"""Expected warnings are silent, here and in started processes; all others are not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from megatron_drpo.runtime.upstream_warnings import EXPECTED, LOGGED, ignore_expected_warnings

OTHER = "Something nobody expected"


def test_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        ignore_expected_warnings()
        for start in (*EXPECTED, OTHER):
            warnings.warn(f"{start} and so on.", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == [f"{OTHER} and so on."]


def test_in_processes_that_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONWARNINGS splits at commas and colons and takes the rest literally."""
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    with warnings.catch_warnings():
        ignore_expected_warnings()
    messages = [f"{start} and so on." for start in (*EXPECTED, OTHER)]
    code = f"import warnings\nfor text in {messages!r}: warnings.warn(text, FutureWarning)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert result.stderr.count("Warning") == 1, result.stderr
    assert OTHER in result.stderr


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with warnings.catch_warnings():
        ignore_expected_warnings()
    assert os.environ["PYTHONWARNINGS"] == "error"


@pytest.mark.parametrize("name", LOGGED)
def test_in_a_log(caplog: pytest.LogCaptureFixture, name: str) -> None:
    with warnings.catch_warnings():
        ignore_expected_warnings()
    logger = logging.getLogger(name)
    logger.warning("%s and so on.", LOGGED[name])
    logger.warning(OTHER)
    assert caplog.messages == [OTHER]
