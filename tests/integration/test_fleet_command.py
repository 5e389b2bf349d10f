"""`megatron-drpo fleet up` and `fleet down`, as a person uses them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_drpo import cli
from megatron_drpo.fleet.state import read_fleet

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(120)]


def test_up_and_down(
    run_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "megatron_drpo.cli", "fleet", "up", *run_arguments()]
    with (tmp_path / "out").open("wb") as out:
        owner = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        path = tmp_path / "run" / "fleet.json"
        deadline = time.monotonic() + 60
        while "Ctrl-C ends" not in (tmp_path / "out").read_text():
            assert time.monotonic() < deadline
            assert owner.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        (endpoint,) = read_fleet(path).endpoints
        assert httpx.get(f"{endpoint}/health_generate", trust_env=False, timeout=20).is_success
        children = psutil.Process(owner.pid).children(recursive=True)
        assert cli.main(["fleet", "up", *run_arguments()]) != 0
        assert "belongs to a fleet that runs" in capsys.readouterr().err
        assert cli.main(["fleet", "down", str(tmp_path / "run")]) == 0
        assert owner.wait(20) == 0
    finally:
        owner.kill()
        owner.wait()
    text = (tmp_path / "out").read_text()
    assert f"up {endpoint}" in text
    assert text.rstrip().endswith("the fleet has ended")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not path.exists()
    assert cli.main(["fleet", "down", str(tmp_path / "run")]) != 0
    assert "cannot be read" in capsys.readouterr().err


def test_a_fleet_whose_owner_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_drpo.fleet.state import FleetState

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    FleetState(pid=gone.pid).write(tmp_path / "fleet.json")
    assert cli.main(["fleet", "down", str(tmp_path)]) != 0
    assert f"its owner, process {gone.pid}, does not run any more" in capsys.readouterr().err
    assert not (tmp_path / "fleet.json").exists()
