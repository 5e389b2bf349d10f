"""What a scrape shows of the servers is what they and their owner say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.fleet.metrics import FleetMetrics, FleetWatch
from megatron_drpo.fleet.state import FleetState, ServerState, ServerStatus
from megatron_drpo.fleet.status import ServerReport
from megatron_drpo.metrics.prometheus import PrometheusServer
from megatron_drpo.rollout.client import ServerLoad

Samples = dict[tuple[str, str, str], float]


def samples_of(registry: CollectorRegistry) -> Samples:
    """(name after the prefix, server, state or empty) -> value."""
    return {
        key_of(sample.name, sample.labels): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def key_of(name: str, labels: Mapping[str, str]) -> tuple[str, str, str]:
    return name.removeprefix("drpo_fleet_server_"), labels["server"], labels.get("state", "")


def scrape(port: int) -> Samples:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=5.0)
    return {
        key_of(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_every_number_of_a_server() -> None:
    up = ServerState(
        name="a",
        endpoint="http://h:1",
        state=ServerStatus.up,
        num_failures=2,
        num_restarts=5,
        last_healthy=time.time() - 40,
    )
    left = ServerState(name="b", state=ServerStatus.left, num_failures=3, num_restarts=2)
    load = ServerLoad(num_running=7, num_queued=1, tokens_per_s=99.5)
    metrics, registry = FleetMetrics(), CollectorRegistry()
    registry.register(metrics)
    assert samples_of(registry) == {}
    metrics.update([ServerReport(state=up, policy_version="14", load=load), ServerReport(state=left)])
    samples = samples_of(registry)
    assert samples.pop(("healthy_age_s", "a", "")) == pytest.approx(40, abs=1)
    assert samples == {
        ("up", "a", ""): 1.0,
        ("up", "b", ""): 0.0,
        ("policy_version", "a", ""): 14.0,
        ("running_requests", "a", ""): 7.0,
        ("queued_requests", "a", ""): 1.0,
        ("tokens_per_s", "a", ""): 99.5,
        ("failures", "a", ""): 2.0,
        ("failures", "b", ""): 3.0,
        ("restarts_total", "a", ""): 5.0,
        ("restarts_total", "b", ""): 2.0,
        **{("state", "a", state.value): float(state is ServerStatus.up) for state in ServerStatus},
        **{("state", "b", state.value): float(state is ServerStatus.left) for state in ServerStatus},
    }
    metrics.update([])
    assert samples_of(registry) == {}


@pytest.mark.parametrize(("version", "shown"), [("3", 3.0), ("-1", -1.0), ("v0", None), (None, None)])
def test_versions(version: str | None, shown: float | None) -> None:
    metrics, registry = FleetMetrics(), CollectorRegistry()
    registry.register(metrics)
    metrics.update([ServerReport(state=ServerState(name="a"), policy_version=version)])
    assert samples_of(registry).get(("policy_version", "a", "")) == shown


def wait_for(port: int, condition: Callable[[Samples], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition(scrape(port)):
        assert time.monotonic() < deadline, scrape(port)
        time.sleep(0.05)


@pytest.mark.server
def test_a_fleet_file_is_followed(serve: Callable[..., str], tmp_path: Path) -> None:
    """A server comes up, another takes its place, the owner ends."""
    path = tmp_path / "fleet.json"
    state = ServerState(name="a", endpoint=serve(), state=ServerStatus.up)
    FleetState(pid=1, servers=[state]).write(path)
    config = RolloutConfig(fleet_file=str(path))
    with PrometheusServer("127.0.0.1", 0) as server, FleetWatch(config, server, interval_s=0.1):
        wait_for(server.port, lambda shown: shown.get(("up", "a", "")) == 1.0)
        assert scrape(server.port)["policy_version", "a", ""] == 0.0
        state.endpoint, state.num_restarts = "http://127.0.0.1:1", 1
        FleetState(pid=1, servers=[state]).write(path)
        wait_for(server.port, lambda shown: shown.get(("up", "a", "")) == 0.0)
        assert scrape(server.port)["restarts_total", "a", ""] == 1.0
        path.unlink()
        wait_for(server.port, lambda shown: shown == {})


@pytest.mark.server
def test_servers_that_others_run(serve: Callable[..., str]) -> None:
    config = RolloutConfig(endpoints=[serve(), "http://127.0.0.1:1"])
    with PrometheusServer("127.0.0.1", 0) as server, FleetWatch(config, server, interval_s=60.0):
        wait_for(server.port, lambda shown: ("up", "rollout server 1", "") in shown)
        shown = scrape(server.port)
    assert [shown["up", f"rollout server {index}", ""] for index in (0, 1)] == [1.0, 0.0]
