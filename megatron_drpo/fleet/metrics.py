"""Rollout servers for Prometheus: gauges with the labels `server` and `endpoint`.

A server that has been started again has another endpoint; the samples of the earlier one are gone then. What
a server does not tell has no sample.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.state import ServerState, ServerStatus
from megatron_drpo.fleet.status import ServerReport, ask, look
from megatron_drpo.metrics.prometheus import PrometheusServer

PREFIX = "drpo_fleet_server_"
STATE = f"{PREFIX}state"
"""1 for the state that a server is in (label `state`), 0 for the others."""
_LABELS = ("server", "endpoint")
_INTERVAL_S = 5.0


def _policy_version(report: ServerReport) -> float | None:
    try:
        return float(report.policy_version or "")
    except ValueError:  # a server that has not had weights from a trainer
        return None


def _from_load(name: str) -> Callable[[ServerReport, float], float | None]:
    return lambda report, _: None if report.load is None else getattr(report.load, name)


GAUGES: dict[str, tuple[str, Callable[[ServerReport, float], float | None]]] = {
    "up": ("Whether its owner says that it is up, and it answers", lambda r, _: float(r.is_up)),
    "policy_version": ("Of the weights it has", lambda r, _: _policy_version(r)),
    "running_requests": ("Requests that are decoded", _from_load("num_running")),
    "queued_requests": ("Requests that wait for room", _from_load("num_queued")),
    "tokens_per_s": ("Tokens generated per second", _from_load("tokens_per_s")),
    "failures": ("Failures in a row", lambda r, _: r.state.num_failures),
    "healthy_age_s": ("Seconds since a generation proved it alive", ServerReport.healthy_age_s),
}
"""Name after `PREFIX` -> (what it is, its value at a time in Unix seconds)."""
RESTARTS = f"{PREFIX}restarts_total"


class FleetMetrics(Collector):
    """Shows what it was told last."""

    def __init__(self) -> None:
        self._servers: Sequence[ServerReport] = ()

    def update(self, servers: Sequence[ServerReport]) -> None:
        self._servers = list(servers)

    def collect(self) -> Iterator[Metric]:
        """Called by a scrape, in its thread."""
        servers, now = self._servers, time.time()
        for name, (text, value_of) in GAUGES.items():
            family = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
            for server in servers:
                value = value_of(server, now)
                if value is not None:
                    family.add_metric(_labels(server), value)
            yield family
        states = GaugeMetricFamily(STATE, "1 for the state it is in", labels=(*_LABELS, "state"))
        restarts = CounterMetricFamily(RESTARTS, "Starts after the first", labels=_LABELS)
        for server in servers:
            for state in ServerStatus:
                states.add_metric((*_labels(server), state.value), float(server.state.state is state))
            restarts.add_metric(_labels(server), server.state.num_restarts)
        yield states
        yield restarts


class FleetWatch:
    """Keeps `FleetMetrics` up to date, in a thread; a context manager."""

    def __init__(
        self, config: RolloutConfig, server: PrometheusServer, *, interval_s: float = _INTERVAL_S
    ) -> None:
        """
        Args:
            config: names the servers, by `fleet_file` or by `endpoints`.
            server: shows the gauges.
            interval_s: between two looks.
        """
        self._config = config
        self._interval_s = interval_s
        self._metrics = FleetMetrics()
        server.register(self._metrics)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fleet metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self._metrics.update(self._look())
            if self._closing.wait(self._interval_s):
                return

    def _look(self) -> list[ServerReport]:
        config = self._config
        if config.fleet_file is None:
            servers = [
                ServerState(name=f"rollout server {index}", endpoint=endpoint, state=ServerStatus.up)
                for index, endpoint in enumerate(config.endpoints)
            ]
            return ask(servers, config.api_key)
        try:
            return look(config.fleet_file, config.api_key).servers
        except RolloutError:  # its owner has ended
            return []


def _labels(server: ServerReport) -> tuple[str, str]:
    return server.state.name, server.state.endpoint
