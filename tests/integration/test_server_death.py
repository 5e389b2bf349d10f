"""A rollout server that dies in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

RunArguments = Callable[..., list[str]]
NUM_PROMPTS = 4
"""Per step, see `run_arguments`."""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended before anything happened"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def server_of(run: subprocess.Popen[bytes]) -> tuple[psutil.Process, list[psutil.Process]]:
    """The run's rollout server, and all processes of the run."""
    children = psutil.Process(run.pid).children(recursive=True)
    (server,) = [child for child in children if "megatron_drpo.embedded_server" in child.cmdline()]
    return server, children


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_drpo.cli", "train", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )


def last_step(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_server_that_leaves(run_arguments: RunArguments, tmp_path: Path) -> None:
    """The run ends with an error that names the server and shows its log; no process is left."""
    arguments = run_arguments(
        "train.num_steps=100000", "checkpoint.export_hf=false", "rollout.fleet.max_failures=1"
    )
    log, metrics = tmp_path / "stderr", tmp_path / "run" / "metrics.jsonl"
    run = start(arguments, log)
    try:
        wait_for(lambda: last_step(metrics) >= 1, run, 80)
        server, children = server_of(run)
        server.kill()
        assert run.wait(30) == 1
    finally:
        run.kill()
        run.wait()
    error = log.read_text()
    assert "no rollout server is left" in error
    assert "rollout server 0 (http://127.0.0.1:" in error
    assert "died, exit code -9" in error
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, alive


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_a_server_that_comes_back(run_arguments: RunArguments, tmp_path: Path) -> None:
    """It is the only one: the step waits for it, gives it the current weights, and the run completes with
    every prompt trained once and every token of its step's weights."""
    num_steps = 12
    arguments = run_arguments(f"train.num_steps={num_steps}", "checkpoint.export_hf=false")
    log, metrics = tmp_path / "stderr", tmp_path / "run" / "metrics.jsonl"
    run = start(arguments, log)
    try:
        wait_for(lambda: last_step(metrics) >= 2, run, 80)
        server, _ = server_of(run)
        server.kill()
        assert run.wait(80) == 0, log.read_text()
    finally:
        run.kill()
        run.wait()
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps if "loss/value" in step] == list(range(1, num_steps + 1))
    for path in sorted((tmp_path / "run" / "rollouts").glob("step_*.jsonl")):
        step = int(path.stem.removeprefix("step_"))
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert {version for record in records for version, _ in record["policy_versions"]} == {step - 1}
    cursor = json.loads(next(iter((tmp_path / "run").glob("checkpoints/step_*/run_state.json"))).read_text())
    assert cursor["cursor"]["low_water"] + len(cursor["cursor"]["exceptions"]) == num_steps * NUM_PROMPTS
