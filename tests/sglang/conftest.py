"""Real SGLang servers, shared by the tests: each takes 20 s or more to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Dtype,
    FleetConfig,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    RoutingReplay,
    SGLangServerConfig,
)
from megatron_drpo.fleet.build import build_fleet
from megatron_drpo.fleet.fleet import Fleet

SGLANG_PYTHON = Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"
StartFleet = Callable[..., Fleet]


def fleet_config(model_path: Path, run_dir: Path, *, num_servers: int, tp: int, max_failures: int) -> Config:
    """Of servers in fp32 that report routed experts."""
    return Config(
        run_dir=str(run_dir),
        platform=PlatformName.cpu,
        data=DataConfig(train_path="none"),
        policy=PolicyConfig(
            model_path=str(model_path), dtype=Dtype.fp32, routing_replay=RoutingReplay.rollout
        ),
        rollout=RolloutConfig(
            engine=RolloutEngineName.sglang,
            startup_timeout_s=240.0,
            sglang=SGLangServerConfig(
                python=str(SGLANG_PYTHON),
                tensor_parallel_size=tp,
                context_length=128,
                max_total_tokens=16384,
            ),
            fleet=FleetConfig(
                num_servers=num_servers,
                max_failures=max_failures,
                health_interval_s=1.0,
                restart_backoff_s=0.1,
            ),
        ),
    )


@pytest.fixture(scope="session")
def start_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartFleet]:
    """`start_fleet(model_path, num_servers=1, tp=1, max_failures=3)`: runs until the session ends."""
    with ExitStack() as stack:

        def start(model_path: Path, *, num_servers: int = 1, tp: int = 1, max_failures: int = 3) -> Fleet:
            config = fleet_config(
                model_path,
                tmp_path_factory.mktemp("fleet"),
                num_servers=num_servers,
                tp=tp,
                max_failures=max_failures,
            )
            return stack.enter_context(build_fleet(config))

        yield start


@pytest.fixture(scope="session")
def sglang_server(start_fleet: StartFleet) -> Callable[..., str]:
    """`sglang_server(model_path, tp=1)`: an endpoint, the same one for the same arguments; tests leave its
    weights as they please."""
    running: dict[tuple[Path, int], str] = {}

    def start(model_path: Path, tp: int = 1) -> str:
        if (model_path, tp) not in running:
            running[model_path, tp] = start_fleet(model_path, tp=tp).endpoints[0]
        return running[model_path, tp]

    return start


@pytest.fixture(scope="session")
def moe_server(sglang_server: Callable[..., str], hf_model: Callable[[str], Path]) -> str:
    """The endpoint of a server of the model `moe_renormalised`."""
    return sglang_server(hf_model("moe_renormalised"))
