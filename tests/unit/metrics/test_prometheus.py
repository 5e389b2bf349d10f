"""What a scrape shows is what was written."""

from __future__ import annotations

import math
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_drpo.errors import ConfigError
from megatron_drpo.metrics.prometheus import PrometheusServer, gauge_name


def scrape(port: int) -> dict[str, float]:
    """The samples without labels."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=5.0)
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.mark.parametrize(
    ("metric", "gauge"),
    [
        ("reward/mean", "drpo_reward_mean"),
        ("time/weight_sync_s", "drpo_time_weight_sync_s"),
        ("a.b/c-d", "drpo_a_b_c_d"),
        ("Länge", "drpo_L_nge"),
    ],
)
def test_names(metric: str, gauge: str) -> None:
    assert gauge_name(metric) == gauge


def test_a_scrape_has_the_latest_numbers() -> None:
    with PrometheusServer("127.0.0.1", 0) as server:
        assert scrape(server.port) == {}
        first = {"reward/mean": 0.25, "eval/accuracy": 0.5, "trust_region/w_histogram": [1.0, 2.0]}
        server.write(3, first, policy_version=7)
        assert scrape(server.port) == {
            "drpo_step": 3.0,
            "drpo_policy_version": 7.0,
            "drpo_reward_mean": 0.25,
            "drpo_eval_accuracy": 0.5,
        }
        second = {"reward/mean": 1e-300, "loss/value": math.nan, "alarm": "0 of 1.0k loss tokens"}
        server.write(4, second, policy_version=8)
        shown = scrape(server.port)
    assert math.isnan(shown.pop("drpo_loss_value"))
    assert shown == {
        "drpo_step": 4.0,
        "drpo_policy_version": 8.0,
        "drpo_reward_mean": 1e-300,
        "drpo_eval_accuracy": 0.5,
    }


def test_the_port_is_free_again_afterwards() -> None:
    with PrometheusServer("127.0.0.1", 0) as server:
        port = server.port
    with pytest.raises(httpx.ConnectError):
        scrape(port)
    with PrometheusServer("127.0.0.1", port) as again:
        assert again.port == port
    again.close()


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            PrometheusServer("127.0.0.1", port)
    assert str(caught.value) == (
        f"metrics.prometheus_port={port}: cannot listen on 127.0.0.1:{port}: Address already in use; choose "
        "another port, or end what listens there"
    )


def test_two_runs_cannot_share_a_port() -> None:
    with PrometheusServer("127.0.0.1", 0) as server, pytest.raises(ConfigError, match="already in use"):
        PrometheusServer("127.0.0.1", server.port)


def test_an_address_that_is_not_this_machine_s() -> None:
    with pytest.raises(
        ConfigError, match=r"metrics\.prometheus_port=9400: cannot listen on 192\.0\.2\.1:9400"
    ):
        PrometheusServer("192.0.2.1", 9400)
