"""Who has which weights, who is fenced and for how long, with pushes whose outcome is scripted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_drpo.config.schema import FleetConfig, RolloutConfig
from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.fleet.state import FleetState, ServerState, ServerStatus, yield_file
from megatron_drpo.weight_sync.control import FleetControl
from megatron_drpo.weight_sync.path import Absence
from megatron_drpo.weight_sync.push import PushReport, WeightPusher
from megatron_drpo.weight_sync.server_memory import ServerMemory


class Pusher:
    """Fails at the endpoints in `broken`."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.reason = "reset"
        self.pushes: list[tuple[int, list[str]]] = []

    def push(self, tensors: Any, policy_version: int, endpoints: Sequence[str]) -> PushReport:
        self.pushes.append((policy_version, list(endpoints)))
        failed = {endpoint: self.reason for endpoint in endpoints if endpoint in self.broken}
        return PushReport([e for e in endpoints if e not in failed], failed)


class Clock:
    """Goes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_control(
    pusher: Pusher, *, clock: Callable[[], float] = time.monotonic, **fields: Any
) -> FleetControl:
    return FleetControl(RolloutConfig(**fields), cast(WeightPusher, pusher), clock=clock)


def test_a_failed_server_is_fenced_and_gets_another_chance() -> None:
    pusher, clock = Pusher(), Clock()
    control = make_control(pusher, clock=clock, endpoints=["http://a", "http://b"])
    control.push([], 1)
    assert control.current == ["http://a", "http://b"]
    assert not control.wants_repair()
    pusher.broken = {"http://b"}
    control.push([], 2)
    assert control.current == ["http://a"]
    assert control.messages == ["http://b is fenced until it has weights 2: reset"]
    assert not control.wants_repair(), "not at once"
    clock.now_s += 1.1
    assert control.wants_repair()
    control.repair([], 2)
    assert control.current == ["http://a"]
    assert pusher.pushes[-1] == (2, ["http://b"])
    clock.now_s += 1.1
    assert not control.wants_repair(), "the pause doubles"
    clock.now_s += 1.0
    pusher.broken = set()
    control.repair([], 2)
    assert control.current == ["http://a", "http://b"]
    assert control.num_fenced == 2


def test_a_server_that_is_away_is_waited_for() -> None:
    """Whoever samples says when it has been too long; a refusal counts, wherever it comes between."""
    pusher, clock = Pusher(), Clock()
    pusher.broken = {"http://a"}
    pusher.reason = Absence("http://a/server_info: cannot be reached")
    control = make_control(pusher, clock=clock, endpoints=["http://a"], fleet=FleetConfig(max_failures=2))
    control.push([], 0)
    for _ in range(8):
        clock.now_s += 100
        control.repair([], 0)
    pusher.reason = "another shape"
    clock.now_s += 100
    control.repair([], 0)
    assert control.num_fenced == 10
    clock.now_s += 100
    with pytest.raises(WeightSyncError, match="another shape"):
        control.repair([], 0)


def test_no_server_at_all_is_an_error_after_some_tries() -> None:
    pusher, clock = Pusher(), Clock()
    pusher.broken = {"http://a"}
    control = make_control(pusher, clock=clock, endpoints=["http://a"], fleet=FleetConfig(max_failures=2))
    control.push([], 0)
    assert control.current == []
    clock.now_s += 5
    with pytest.raises(
        WeightSyncError, match=r"no rollout server could be given weights 0:\nhttp://a: reset"
    ):
        control.repair([], 0)


def test_with_shared_devices_servers_that_died_meanwhile_may_start_again(tmp_path: Path) -> None:
    """The only server died while the trainer had the devices: its owner waits for them, and the trainer for
    it."""
    path = tmp_path / "fleet.json"
    server = ServerState(name="rollout server 0", state=ServerStatus.restarting)
    fleet = FleetState(pid=1, servers=[server])
    fleet.write(path)

    def start_again() -> None:
        while yield_file(path).exists():
            time.sleep(0.01)
        server.state, server.endpoint = ServerStatus.up, "http://again"
        fleet.write(path)

    pusher, config = Pusher(), RolloutConfig(fleet_file=str(path), startup_timeout_s=20.0)
    control = FleetControl(config, cast(WeightPusher, pusher), ServerMemory(config, timeout_s=1.0))
    control.release_memory()
    assert yield_file(path).exists()
    owner = threading.Thread(target=start_again)
    owner.start()
    control.push([], 5)
    owner.join()
    assert control.current == ["http://again"]
    assert pusher.pushes == [(5, ["http://again"])], "it has released nothing, so nothing is resumed"


def test_a_restarted_server_of_a_fleet_is_behind(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    first, second = (
        ServerState(name=f"server {i}", endpoint=f"http://{i}", state=ServerStatus.up) for i in range(2)
    )
    fleet = FleetState(pid=1, servers=[first, second])
    fleet.write(path)
    pusher = Pusher()
    control = make_control(pusher, fleet_file=str(path))
    control.push([], 3)
    assert control.current == ["http://0", "http://1"]
    second.state = ServerStatus.restarting
    fleet.write(path)
    assert not control.wants_repair()
    assert control.current == ["http://0"]
    second.state, second.endpoint = ServerStatus.up, "http://2"
    fleet.write(path)
    assert control.wants_repair()
    control.repair([], 3)
    assert control.current == ["http://0", "http://2"]
    assert pusher.pushes[-1] == (3, ["http://2"])
    first.state = second.state = ServerStatus.left
    second.last_error = "died, exit code -9"
    fleet.write(path)
    with pytest.raises(
        RolloutError, match=r"no rollout server is left:\nserver 0: .*\nserver 1: died, exit code -9"
    ):
        control.wants_repair()
