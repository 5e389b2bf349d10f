"""From the configuration to a fleet of servers on this machine."""

from __future__ import annotations

from functools import partial

from megatron_drpo.config import Config, PlatformName, RolloutEngineName
from megatron_drpo.platform import build_platform
from megatron_drpo.rollout.fleet import Fleet
from megatron_drpo.rollout.server_process import ServedModel, start_embedded, start_sglang


def starts_fleet(config: Config) -> bool:
    """Whether the run brings its own servers: none are given."""
    return not config.rollout.endpoints and config.rollout.fleet_file is None


def build_fleet(config: Config) -> Fleet:
    """`rollout.fleet.num_servers` servers of `rollout.engine`, not yet started."""
    rollout = config.rollout
    model = ServedModel(
        path=config.policy.model_path,
        dtype=config.policy.dtype,
        routing_replay=config.policy.routing_replay,
    )
    if rollout.engine is RolloutEngineName.embedded:
        start = partial(start_embedded, rollout, model)
    else:
        on_cpu = build_platform(config.platform).name is PlatformName.cpu
        start = partial(start_sglang, rollout, model, on_cpu=on_cpu)
    return Fleet(rollout, start, config.run_dir)
