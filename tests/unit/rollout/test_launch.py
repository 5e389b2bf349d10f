"""Server processes: start, death, failure to start, and a supervisor that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_drpo.config import Dtype, EmbeddedServerConfig, RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.launch import EmbeddedServers

pytestmark = [pytest.mark.server, pytest.mark.timeout(90)]

CONFIG = RolloutConfig(embedded=EmbeddedServerConfig(num_slots=2, num_threads=1), deterministic=True)


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def test_a_server_runs_is_missed_when_it_dies_and_is_stopped(tiny_moe: Path, tmp_path: Path) -> None:
    servers = EmbeddedServers(
        CONFIG, model_path=tiny_moe, dtype=Dtype.fp32, run_dir=tmp_path, num_servers=2, weight_version=5
    )
    with servers, httpx.Client(trust_env=False, timeout=10) as http:
        first, second = servers.endpoints
        assert first.startswith("http://127.0.0.1:")
        for endpoint in (first, second):
            assert http.get(f"{endpoint}/model_info").json()["weight_version"] == "5"
            assert http.get(f"{endpoint}/server_info").json()["enable_deterministic_inference"] is True
        servers.check()
        processes = [server.process for server in servers._servers]
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[1].wait(10)
        with pytest.raises(
            RolloutError, match=rf"rollout server 1 \({second}\) died, exit code -9; .*\.log:\nserving"
        ):
            servers.check()
    assert processes[0].poll() is not None
    assert servers.endpoints == []
    servers.stop()


def test_a_failure_to_start_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    servers = EmbeddedServers(CONFIG, model_path=tmp_path, dtype=Dtype.bf16, run_dir=tmp_path / "run")
    with pytest.raises(RolloutError, match=r"rollout server 0 .*exit code 1(.|\n)*no_such_model"):
        servers.start()
    assert servers.endpoints == []


SUPERVISOR = """
import sys, time
from megatron_drpo.config import Dtype, RolloutConfig
from megatron_drpo.rollout.launch import EmbeddedServers
servers = EmbeddedServers(RolloutConfig(), model_path=sys.argv[1], dtype=Dtype.fp32, run_dir=sys.argv[2])
servers.start()
print(servers._servers[0].process.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_supervisor_leaves_no_server(tiny_moe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, str(tiny_moe), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        server_pid = int(supervisor.stdout.readline())
        supervisor.kill()
    wait_until_gone(server_pid)
