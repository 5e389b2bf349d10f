"""Settings that follow from others, settled in one place before anything reads them."""

from __future__ import annotations

from megatron_drpo.config.schema import Config, Mode
from megatron_drpo.rollout.time_limits import reload_limit_s, startup_limit_s, weights_bytes
from megatron_drpo.weight_sync.placement import choose_path


def resolve_config(config: Config) -> None:
    """Put concrete values where a configuration without problems leaves the choice to the program.

    `check` prints them, and a run's config.yaml has them. Other values of `auto` depend on the machine that
    trains alone and stay as they are.
    """
    if config.train.mode is not Mode.rl:
        return
    config.weight_sync.path = choose_path(config)
    num_bytes = weights_bytes(config.policy.model_path)
    config.rollout.startup_timeout_s = startup_limit_s(config.rollout, num_bytes)
    config.weight_sync.disk_timeout_s = reload_limit_s(config.weight_sync, num_bytes)
