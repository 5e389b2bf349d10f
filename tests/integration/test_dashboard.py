"""A run as Prometheus and Grafana see it: scraped while it runs, with every name of the dashboard in it."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from megatron_drpo import cli
from megatron_drpo.fleet.metrics import FleetMetrics
from megatron_drpo.metrics.prometheus import gauge_name
from megatron_drpo.runtime.process_end import SUPERVISOR_PID

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "megatron_drpo.json"
SERVERS = "drpo_fleet_server_"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # torch's launcher leaves log files open
]


class Scraper:
    """What Prometheus does, ten times a second; keeps all that was different."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.shown: list[dict[str, float]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._scrape)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _scrape(self) -> None:
        with httpx.Client(trust_env=False) as client:
            while not self._closing.wait(0.1):
                try:
                    text = client.get(f"http://127.0.0.1:{self.port}/metrics").text
                except httpx.TransportError:  # before the run and after it
                    continue
                families = text_string_to_metric_families(text)
                samples = {sample.name: sample.value for family in families for sample in family.samples}
                if not self.shown or samples != self.shown[-1]:
                    self.shown.append(samples)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_run_is_scraped(
    run_arguments: Callable[..., list[str]],
    prompts_path: Path,
    free_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each value is that of metrics.jsonl, and the dashboard asks for no other names."""
    monkeypatch.setenv(SUPERVISOR_PID, "")  # so that what the supervisor sets is undone
    options = [
        f"metrics.prometheus_port={free_port}",
        f"data.eval_path={prompts_path}",
        "train.num_steps=3",
        "eval.every_steps=3",
        "checkpoint.save_every_steps=1",
        "deadlines.start_s=120",
    ]
    with Scraper(free_port) as scraper:
        assert cli.main(["train", *run_arguments(*options)]) == 0
    assert not list((tmp_path / "run" / "logs").glob("stacks_rank_*")), "no deadline has passed"

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, float] = {}
    seen = set()
    for record in records:
        expected |= {
            gauge_name(name): value for name, value in record.items() if isinstance(value, int | float)
        }
        step = record["step"]
        shown = [samples for samples in scraper.shown if samples.get("drpo_step") == step]
        if not shown:  # a step may be over between two scrapes
            continue
        seen.add(step)
        latest = {name: value for name, value in shown[-1].items() if not name.startswith(SERVERS)}
        assert latest == expected | {"drpo_policy_version": step}
    assert len(seen) >= 2

    servers = {name for samples in scraper.shown for name in samples if name.startswith(SERVERS)}
    assert max(samples.get(f"{SERVERS}up", 0.0) for samples in scraper.shown) == 1.0
    registry = CollectorRegistry()
    registry.register(FleetMetrics())
    families = {family.name for family in registry.collect()}
    assert {name.removesuffix("_total") for name in servers} <= families
    existing = {*expected, "drpo_policy_version", *families}
    assert {name for name in dashboard_names() if name.removesuffix("_total") not in existing} == set()


def test_a_port_that_is_taken_ends_the_run_before_it_trains(
    run_arguments: Callable[..., list[str]],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SUPERVISOR_PID, "")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert cli.main(["train", *run_arguments(f"metrics.prometheus_port={port}", "train.mode=sft")]) == 1
    error = capfd.readouterr().err
    assert f"ConfigError (rank 0): metrics.prometheus_port={port}: cannot listen on 127.0.0.1:{port}" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def dashboard_panels() -> Iterator[dict[str, Any]]:
    yield from json.loads(DASHBOARD.read_text())["panels"]


def dashboard_names() -> set[str]:
    """Every metric that an expression of the dashboard asks for."""
    expressions = [target["expr"] for panel in dashboard_panels() for target in panel.get("targets", [])]
    return {name for expression in expressions for name in re.findall(r"\bdrpo_\w+", expression)}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """Its data source is a variable, it has no id of a server, and no two panels overlap."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["id"] is None
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = list(dashboard_panels())
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        for part in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@pytest.mark.parametrize(
    "name",
    [
        "drpo_reward_mean",
        "drpo_response_length_mean",
        "drpo_response_truncated_share",
        "drpo_loss_value",
        "drpo_optimizer_grad_norm",
        "drpo_mismatch_logprob_abs_mean",
        "drpo_rollout_staleness_mean",
        "drpo_policy_version",
        "drpo_time_rollout_s",
        "drpo_time_weight_sync_s",
        "drpo_throughput_tokens_per_s",
        "drpo_fleet_server_up",
        "drpo_fleet_server_policy_version",
        "drpo_fleet_server_running_requests",
        "drpo_fleet_server_failures",
        "drpo_fleet_server_restarts_total",
    ],
)
def test_the_dashboard_shows(name: str) -> None:
    assert name in dashboard_names()
