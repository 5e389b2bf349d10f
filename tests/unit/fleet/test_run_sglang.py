"""The guard around a server, with a stand-in for the package `sglang`: whatever happens, all of it goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_drpo.fleet import run_sglang
from megatron_drpo.fleet.run_sglang import API_KEY

pytestmark = pytest.mark.timeout(60)

SERVER = """
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
told = {"argv": sys.argv[1:], "key": os.environ.get(%r), "pids": [os.getpid(), child.pid]}
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(told, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
if "--fail" in sys.argv:
    child.kill()
    sys.exit(7)
time.sleep(60)
"""
OWNER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-P", sys.argv[1], str(os.getpid()), sys.argv[2]], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which `sglang.launch_server` is the stand-in."""
    package = tmp_path / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(SERVER % API_KEY)
    return {**os.environ, "PYTHONPATH": str(package.parent)}


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(path: Path) -> dict[str, Any]:
    wait_for(path.exists)
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def start_guard(environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", run_sglang.__file__, str(os.getpid()), *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def test_the_key_is_no_argument_that_others_see_and_no_variable_that_children_get(
    environment: dict[str, str], tmp_path: Path
) -> None:
    guard = start_guard({**environment, API_KEY: "secret"}, str(tmp_path / "told"), "--port", "1")
    server = told(tmp_path / "told")
    assert server["argv"][1:] == ["--port", "1", "--api-key", "secret"]
    assert server["key"] is None
    for pid in [guard.pid, *server["pids"]]:
        assert "secret" not in psutil.Process(pid).cmdline()
    guard.terminate()
    assert guard.wait(20) == -signal.SIGKILL, "its whole group"
    wait_for(lambda: all(map(is_gone, server["pids"])))


def test_the_exit_code_is_the_servers(environment: dict[str, str], tmp_path: Path) -> None:
    assert start_guard(environment, str(tmp_path / "told"), "--fail").wait(20) == 7
    guard = start_guard(environment, str(tmp_path / "killed"))
    os.kill(told(tmp_path / "killed")["pids"][0], signal.SIGKILL)
    assert guard.wait(20) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_go_with_their_owner(environment: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, run_sglang.__file__, str(tmp_path / "told")], env=environment
    )
    server = told(tmp_path / "told")
    owner.send_signal(number)
    owner.wait(20)
    wait_for(lambda: all(map(is_gone, server["pids"])))


def test_an_owner_that_has_gone_already(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-P", run_sglang.__file__, "1", str(tmp_path / "told")]
    assert subprocess.run(command, env=environment, timeout=20, check=False).returncode == 1
    assert not (tmp_path / "told").exists()
