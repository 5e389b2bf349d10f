"""Embedded servers that start, die, hang, come back and leave."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import pytest
import torch

from megatron_drpo.config.schema import Dtype, EmbeddedServerConfig, FleetConfig, RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.fleet import Fleet
from megatron_drpo.fleet.server_process import ServedModel, start_embedded
from megatron_drpo.fleet.state import FleetState, ServerStatus, read_fleet
from megatron_drpo.weight_sync.control import FleetControl
from megatron_drpo.weight_sync.push import PushReport, WeightPusher

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


def make_fleet(model_path: Path, run_dir: Path, **fields: Any) -> Fleet:
    fleet = dataclasses.replace(FleetConfig(restart_backoff_s=0.1, health_interval_s=0.3), **fields)
    config = RolloutConfig(
        embedded=EmbeddedServerConfig(num_slots=2, num_threads=1), deterministic=True, fleet=fleet
    )
    model = ServedModel(path=str(model_path), dtype=Dtype.fp32)
    return Fleet(config, partial(start_embedded, config, model), run_dir)


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_and_a_stopped_server_come_back_elsewhere(tiny_moe: Path, tmp_path: Path) -> None:
    with make_fleet(tiny_moe, tmp_path, num_servers=2, health_timeout_s=2.0) as fleet:
        first, second = fleet.endpoints
        state = read_fleet(tmp_path / "fleet.json")
        assert state.pid == os.getpid()
        assert state.endpoints == [first, second]
        with httpx.Client(trust_env=False, timeout=10) as http:
            for endpoint in (first, second):
                assert http.get(f"{endpoint}/model_info").json()["weight_version"] == "-1"
                assert http.get(f"{endpoint}/server_info").json()["enable_deterministic_inference"] is True
        pids = [server.pid for server in fleet.servers]
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[1], signal.SIGSTOP)
        wait_for(lambda: all(s.num_restarts == 1 and s.state is ServerStatus.up for s in fleet.servers))
        assert not {first, second} & set(fleet.endpoints)
        killed, stopped = read_fleet(tmp_path / "fleet.json").servers
        assert killed.last_error == "died, exit code -9"
        assert stopped.last_error.startswith(
            "hangs: it generated nothing for rollout.fleet.health_timeout_s=2"
        )
        assert killed.num_failures == stopped.num_failures == 1
        assert all(is_gone(pid) for pid in pids)
        pids = [server.pid for server in fleet.servers]
        fleet.check()
    assert all(is_gone(pid) for pid in pids)
    assert not (tmp_path / "fleet.json").exists()
    fleet.stop()


class SilentServer:
    """A server that generates while `speaks`; runs until it is killed."""

    name = endpoint = "http://silent"
    pid = 0

    def __init__(self) -> None:
        self.speaks = True
        self.killed = False

    def exit_code(self) -> int | None:
        return None

    def generates(self, *, timeout_s: float, api_key: str | None = None) -> bool:
        return self.speaks

    def log_tail(self) -> str:
        return ""

    def kill(self) -> None:
        self.killed = True


class SlowPusher:
    """Takes longer for an update than a server may be silent."""

    def __init__(self, server: SilentServer) -> None:
        self._server = server

    def push(self, tensors: Any, policy_version: int, endpoints: list[str]) -> PushReport:
        list(tensors)
        self._server.speaks = False
        time.sleep(2.0)
        assert not self._server.killed, "it was loading its weights"
        self._server.speaks = policy_version == 1
        return PushReport(updated=endpoints, failed={})


def test_a_server_that_loads_weights_does_not_hang(tmp_path: Path) -> None:
    """The time of an update does not count, however it ends; one that is silent afterwards hangs."""
    server = SilentServer()
    fleet_config = FleetConfig(health_interval_s=0.1, health_timeout_s=0.5, max_failures=1)
    config = RolloutConfig(fleet=fleet_config)
    with Fleet(config, lambda index, log_path: server, tmp_path) as fleet:
        config = RolloutConfig(fleet_file=str(fleet.path))
        control = FleetControl(config, cast(WeightPusher, SlowPusher(server)))
        control.push([("w", torch.zeros(1))], 1)
        time.sleep(1.0)
        assert fleet.endpoints == ["http://silent"]
        control.push([("w", torch.zeros(1))], 2)
        wait_for(lambda: server.killed, 10.0)
        assert "health_timeout_s=0.5" in fleet.servers[0].last_error
    assert list(tmp_path.glob("servers_*")) == []


def test_a_server_that_fails_too_often_leaves(tiny_moe: Path, tmp_path: Path) -> None:
    with make_fleet(tiny_moe, tmp_path, max_failures=2) as fleet:
        os.kill(fleet.servers[0].pid, signal.SIGKILL)
        wait_for(lambda: fleet.servers[0].num_restarts == 1 and fleet.endpoints)
        os.kill(fleet.servers[0].pid, signal.SIGKILL)
        wait_for(lambda: read_fleet(tmp_path / "fleet.json").is_lost)
        with pytest.raises(
            RolloutError,
            match=r"no rollout server is left:\nrollout server 0 .* died, exit code -9; .*\nserving",
        ):
            fleet.check()


def test_a_failure_to_start_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    fleet = make_fleet(tmp_path, tmp_path / "run")
    with pytest.raises(RolloutError, match=r"rollout server 0 .*exit code 1(.|\n)*ModelError: .*no weights"):
        fleet.start()
    assert fleet.endpoints == []


OWNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_fleet import make_fleet
fleet = make_fleet(Path(sys.argv[1]), Path(sys.argv[2]))
fleet.start()
print(fleet.servers[0].pid, flush=True)
time.sleep(60)
"""


def test_a_killed_owner_leaves_no_server(tiny_moe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tiny_moe), str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        server_pid = int(owner.stdout.readline())
        owner.kill()
    wait_for(lambda: is_gone(server_pid), 10.0)


def test_fleet_json_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    FleetState(pid=3).write(path)
    assert read_fleet(path).pid == 3
    assert read_fleet(path).is_lost
    with pytest.raises(RolloutError, match=r"nowhere cannot be read: No such file"):
        read_fleet(tmp_path / "nowhere")
    path.write_text('{"pid": 3}')
    with pytest.raises(RolloutError, match="does not describe a fleet: 'servers'"):
        read_fleet(path)
