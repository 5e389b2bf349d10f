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


def build_fleet(config: Config, *, num_trainer_gpus: int = 0) -> Fleet:
    """`rollout.fleet.num_servers` servers of `rollout.engine`, not yet started.

    Args:
        num_trainer_gpus: that ranks on this machine use; servers get others, unless rollout.colocated.
    """
    rollout = config.rollout
    first_gpu = rollout.fleet.first_gpu
    if first_gpu is None:
        first_gpu = 0 if rollout.colocated else num_trainer_gpus
    model = ServedModel(
        path=config.policy.model_path,
        dtype=config.policy.dtype,
        routing_replay=config.policy.routing_replay,
    )
    if rollout.engine is RolloutEngineName.embedded:
        start = partial(start_embedded, rollout, model)
    else:
        on_cpu = build_platform(config.platform).name is PlatformName.cpu
        start = partial(start_sglang, rollout, model, first_gpu=None if on_cpu else first_gpu)
    return Fleet(rollout, start, config.run_dir)
