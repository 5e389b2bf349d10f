"""A rollout server that dies in the middle of a run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

RunArguments = Callable[..., list[str]]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended before anything happened"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_server_that_dies(run_arguments: RunArguments, tmp_path: Path) -> None:
    """The run ends with an error that names the server and shows its log; no process is left."""
    arguments = run_arguments("train.num_steps=100000", "checkpoint.export_hf=false", "rollout.num_retries=1")
    log = tmp_path / "stderr"
    with log.open("wb") as stderr:
        run = subprocess.Popen(
            [sys.executable, "-m", "megatron_drpo.cli", "train", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, run, 80)
        children = psutil.Process(run.pid).children(recursive=True)
        (server,) = [child for child in children if "megatron_drpo.rollout.embedded" in child.cmdline()]
        server.kill()
        assert run.wait(30) == 1
    finally:
        run.kill()
        run.wait()
    error = log.read_text()
    assert "rollout server 0 (http://127.0.0.1:" in error
    assert "died, exit code -9" in error
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, alive
