"""Servers on a real Ray cluster of several nodes, which are processes of this machine."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Dtype,
    EmbeddedServerConfig,
    FleetConfig,
    Placement,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
)
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.build import build_fleet
from megatron_drpo.fleet.ray_servers import RayStart
from megatron_drpo.fleet.server_process import ServerProcess
from megatron_drpo.fleet.state import ServerStatus, read_fleet

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(200)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for a server; the test adds nodes."""
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves log files open
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            gc.collect()
            signal.signal(signal.SIGTERM, handler)


def ray_config(address: str, model_path: Path, run_dir: Path, **fields: Any) -> Config:
    fleet = FleetConfig(
        placement=Placement.ray,
        ray_address=address,
        restart_backoff_s=0.1,
        health_interval_s=0.5,
        **fields,
    )
    return Config(
        run_dir=str(run_dir),
        platform=PlatformName.cpu,
        data=DataConfig(train_path="none"),
        policy=PolicyConfig(model_path=str(model_path), dtype=Dtype.fp32),
        rollout=RolloutConfig(
            startup_timeout_s=60.0,
            embedded=EmbeddedServerConfig(num_slots=2, num_threads=1),
            fleet=fleet,
        ),
    )


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_goes_to_another_node_when_its_own_is_lost(
    cluster: Cluster, model_path: Path, tmp_path: Path
) -> None:
    first = cluster.add_node(num_cpus=1)
    with build_fleet(ray_config(str(cluster.address), model_path, tmp_path)) as fleet:
        (endpoint,) = fleet.endpoints
        assert httpx.get(f"{endpoint}/health_generate", trust_env=False, timeout=20).is_success
        assert "serving" in (tmp_path / "logs" / "rollout_server_0.log").read_text()
        pid = fleet.servers[0].pid
        cluster.add_node(num_cpus=1)
        cluster.remove_node(first)
        wait_for(lambda: fleet.servers[0].num_restarts >= 1 and fleet.endpoints)
        assert fleet.endpoints != [endpoint]
        assert httpx.get(f"{fleet.endpoints[0]}/health_generate", trust_env=False, timeout=20).is_success
        wait_for(lambda: not psutil.pid_exists(pid))
        state = read_fleet(tmp_path / "fleet.json").servers[0]
        assert state.state is ServerStatus.up
        assert state.last_error == "died, exit code -1"
        pid = fleet.servers[0].pid
    wait_for(lambda: not psutil.pid_exists(pid))


def test_a_killed_server_comes_back_and_no_room_is_an_error(
    cluster: Cluster, model_path: Path, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    with build_fleet(ray_config(str(cluster.address), model_path, tmp_path / "one")) as fleet:
        os.kill(fleet.servers[0].pid, signal.SIGKILL)
        wait_for(lambda: fleet.servers[0].num_restarts == 1 and fleet.endpoints)
        assert fleet.servers[0].last_error == "died, exit code -9"
        config = ray_config(str(cluster.address), model_path, tmp_path / "two")
        config.rollout.startup_timeout_s = 3.0
        with pytest.raises(
            RolloutError, match=r"startup_timeout_s=3; no node of the Ray cluster has 1 cpus free"
        ):
            build_fleet(config).start()


def test_a_key_reaches_the_node_and_an_error_comes_back(
    cluster: Cluster, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret")
    cluster.add_node(num_cpus=1)

    def refuse(config: RolloutConfig, index: int, log_path: Path) -> ServerProcess:
        raise RolloutError(f"server {index} with key {config.api_key} cannot be")

    config = ray_config(str(cluster.address), model_path, tmp_path).rollout
    config.api_key_env = "SERVER_KEY"
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = RayStart(config, refuse, on_cpu=True)
    assert signal.signal(signal.SIGTERM, handler) is signal.SIG_IGN, "Ray's own is not left behind"
    server = start(3, tmp_path / "log")
    wait_for(lambda: server.exit_code() is not None)
    assert server.exit_code() == -1
    assert "server 3 with key secret cannot be" in server.log_tail()
    server.kill()


def test_a_run(
    cluster: Cluster,
    train: Callable[[list[str]], None],
    run_arguments: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """The servers that a run starts for itself."""
    cluster.add_node(num_cpus=2)
    arguments = run_arguments(
        "policy.routing_replay=rollout",
        "rollout.fleet.placement=ray",
        f"rollout.fleet.ray_address={cluster.address}",
        "rollout.fleet.num_servers=2",
    )
    train(arguments)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["mismatch/first_update_logprob_abs_mean"] < 1e-5 for step in steps] == [True, True]


def test_no_cluster(model_path: Path, tmp_path: Path) -> None:
    config = ray_config("127.0.0.1:1", model_path, tmp_path)
    with pytest.raises(RolloutError, match=r"ray_address=127\.0\.0\.1:1: no Ray cluster answers"):
        build_fleet(config)
