"""How a conversion's command ends when somebody ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from conversion.command import run_command
from conversion.workers import run_jobs


@pytest.mark.parametrize(
    ("number", "status", "what"),
    [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_is_one_line(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int, what: str
) -> None:
    def action() -> None:
        os.kill(os.getpid(), number)

    assert run_command(action, is_resumable=True) == status
    assert capsys.readouterr().err == f"{what}; the same command goes on from here\n"
    assert run_command(action, is_resumable=False) == status
    assert capsys.readouterr().err == f"{what}\n"


def test_sigterm_ends_the_workers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Although whoever ends a whole group of processes sends it to them too: the parent decides."""

    def job(name: str, _: object) -> None:
        (tmp_path / name).write_text(str(os.getpid()))
        time.sleep(60.0)

    def end_all() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    def action() -> None:
        threading.Thread(target=end_all).start()
        list(run_jobs(["a", "b"], job, num_workers=2, show=lambda _: None))

    started = time.monotonic()
    assert run_command(action, is_resumable=True) == 143
    assert time.monotonic() - started < 50.0
    assert capsys.readouterr().err == "ended by SIGTERM; the same command goes on from here\n"
    assert multiprocessing.active_children() == []
