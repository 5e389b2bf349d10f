"""From the configuration to a fleet of servers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_drpo.config.schema import Config, Placement, PlatformName, RolloutConfig, RolloutEngineName
from megatron_drpo.fleet.fleet import Fleet
from megatron_drpo.fleet.server_process import ServedModel, StartServer, start_embedded, start_sglang
from megatron_drpo.platform.base import build_platform


def starts_fleet(config: Config) -> bool:
    """Whether the run brings its own servers: none are given."""
    return not config.rollout.endpoints and config.rollout.fleet_file is None


def choose_first_gpu(config: Config, num_trainer_gpus: int) -> int:
    """Index of the first GPU that servers on this machine take; see `rollout.fleet.first_gpu`."""
    if config.rollout.fleet.first_gpu is not None:
        return config.rollout.fleet.first_gpu
    return 0 if config.rollout.colocated else num_trainer_gpus


def build_fleet(config: Config, *, num_trainer_gpus: int = 0) -> Fleet:
    """`rollout.fleet.num_servers` servers of `rollout.engine`, not yet started.

    Args:
        num_trainer_gpus: that ranks on this machine use; servers get others, unless rollout.colocated.
    """
    rollout = config.rollout
    model = ServedModel(
        path=config.policy.model_path,
        dtype=config.policy.dtype,
        routing_replay=config.policy.routing_replay,
    )
    is_embedded = rollout.engine is RolloutEngineName.embedded
    on_cpu = build_platform(config.platform).name is PlatformName.cpu
    if rollout.fleet.placement is Placement.ray:
        start: StartServer = _start_on_ray(rollout, model, on_cpu=on_cpu or is_embedded)
    elif is_embedded:
        start = partial(start_embedded, rollout, model)
    else:
        first_gpu = None if on_cpu else choose_first_gpu(config, num_trainer_gpus)
        start = partial(start_sglang, rollout, model, first_gpu=first_gpu)
    return Fleet(rollout, start, config.run_dir)


def _start_on_ray(rollout: RolloutConfig, model: ServedModel, *, on_cpu: bool) -> StartServer:
    # Only who asks for it needs the extra.
    from megatron_drpo.fleet.ray_servers import LaunchEmbedded, LaunchSGLang, RayStart

    # Ray's workers have another working folder.
    model = replace(model, path=str(Path(model.path).absolute()))
    python = str(Path(rollout.sglang.python).absolute())
    rollout = replace(rollout, sglang=replace(rollout.sglang, python=python))
    is_embedded = rollout.engine is RolloutEngineName.embedded
    launch = LaunchEmbedded(model) if is_embedded else LaunchSGLang(model, on_cpu)
    return RayStart(rollout, launch, on_cpu=on_cpu)
