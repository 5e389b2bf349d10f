"""`algorithm.loss.name` -> loss. A new loss is one file of this package and one line here."""

from __future__ import annotations

from collections.abc import Callable

from megatron_drpo.config import LossConfig
from megatron_drpo.errors import ConfigError
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.surrogate import SurrogateLoss

LOSSES: dict[str, Callable[[LossConfig], Loss]] = {
    "drpo": DrpoLoss.from_config,
    "surrogate": SurrogateLoss.from_config,
    "grpo": GrpoLoss.from_config,
}


def check_loss(config: LossConfig) -> list[str]:
    """Problems that would make `build_loss` fail, one sentence each."""
    if config.name in LOSSES:
        return []
    return [f"algorithm.loss.name={config.name}: unknown loss; known are {', '.join(LOSSES)}"]


def build_loss(config: LossConfig) -> Loss:
    """The loss that the configuration names; its `warnings()` say which settings do nothing.

    Raises:
        ConfigError: the name is unknown.
    """
    problems = check_loss(config)
    if problems:
        raise ConfigError(*problems)
    return LOSSES[config.name](config)
