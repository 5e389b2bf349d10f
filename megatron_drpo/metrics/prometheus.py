"""A run's latest numbers for Prometheus, at http://HOST:PORT/metrics on rank 0.

Every number of metrics.jsonl is a gauge, named by `gauge_name`: `reward/mean` is `drpo_reward_mean`, and
`time/rollout_s` is `drpo_time_rollout_s`. Beside them stand `drpo_step` and `drpo_policy_version`. A metric
that is measured only now and then, such as an evaluation's, keeps its latest value. Lists (histograms) and
sentences are left to metrics.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.registry import Collector

from megatron_drpo.errors import ConfigError
from megatron_drpo.metrics.writer import Metrics

STEP = "step"
POLICY_VERSION = "policy_version"


def gauge_name(metric: str) -> str:
    """Of a metric's gauge: Prometheus allows letters, digits and underscores."""
    return "drpo_" + re.sub(r"\W", "_", metric, flags=re.ASCII)


class PrometheusServer:
    """Answers scrapes in threads of its own until it is closed; a context manager."""

    def __init__(self, host: str, port: int) -> None:
        """
        Args:
            port: 0 takes a free one, see `port`.

        Raises:
            ConfigError: nothing can listen there, for instance because something does already.
        """
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.prometheus_port={port}: cannot listen on {host}:{port}: {error.strerror or error}; "
                "choose another port, or end what listens there"
            ) from error
        self.port: int = self._server.server_port

    def write(self, step: int, metrics: Metrics, *, policy_version: int) -> None:
        """What scrapes show from now on.

        Args:
            step: steps finished.
        """
        numbers = {STEP: step, POLICY_VERSION: policy_version}
        numbers |= {name: value for name, value in metrics.items() if not isinstance(value, Sequence)}
        for name, value in numbers.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(gauge_name(name), name, registry=self._registry)
            self._gauges[name].set(value)

    def register(self, collector: Collector) -> None:
        """Show what this collector yields as well."""
        self._registry.register(collector)

    def close(self) -> None:
        """Free the port; harmless when it is free."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
