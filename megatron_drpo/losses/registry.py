"""`algorithm.loss.name` -> loss. A new loss is one file of this package and one line here."""

from __future__ import annotations

import reprlib
from collections.abc import Callable

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.config.user_code import Failure, call_guarded, load_function
from megatron_drpo.errors import ConfigError
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.cispo import CispoLoss
from megatron_drpo.losses.dppo import DppoBinaryKlLoss, DppoBinaryTvLoss, DppoTopkKlLoss, DppoTopkTvLoss
from megatron_drpo.losses.drpo import DrpoLoss, DrpoUnweightedLoss
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.gspo import GspoLoss
from megatron_drpo.losses.mask_drpo import MaskDrpoLoss
from megatron_drpo.losses.spo import SpoLoss, SpoUnweightedLoss
from megatron_drpo.losses.surrogate import SurrogateLoss

LOSSES: dict[str, Callable[[LossConfig], Loss]] = {
    "drpo": DrpoLoss.from_config,
    "drpo_unweighted": DrpoUnweightedLoss.from_config,
    "mask_drpo": MaskDrpoLoss.from_config,
    "spo": SpoLoss.from_config,
    "spo_unweighted": SpoUnweightedLoss.from_config,
    "dppo_binary_tv": DppoBinaryTvLoss.from_config,
    "dppo_binary_kl": DppoBinaryKlLoss.from_config,
    "dppo_topk_tv": DppoTopkTvLoss.from_config,
    "dppo_topk_kl": DppoTopkKlLoss.from_config,
    "grpo": GrpoLoss.from_config,
    "gspo": GspoLoss.from_config,
    "cispo": CispoLoss.from_config,
    "surrogate": SurrogateLoss.from_config,
}


def check_loss(config: LossConfig) -> list[str]:
    """Problems that would make `build_loss` fail, one sentence each. Calls a user's function."""
    try:
        build_loss(config)
    except ConfigError as error:
        return list(error.problems)
    return []


def build_loss(config: LossConfig) -> Loss:
    """The loss that the configuration names; its `warnings()` say which settings do nothing.

    Raises:
        ConfigError: the name is unknown, or the user's function is absent, fails or returns something else.
    """
    if config.name in LOSSES:
        return LOSSES[config.name](config)
    setting = f"algorithm.loss.name={config.name}"
    known = ", ".join(LOSSES)
    if ":" not in config.name:
        raise ConfigError(f"{setting}: unknown loss; known are {known}, or module:function")
    function = load_function(config.name, setting=setting, known=known, argument="the LossConfig")
    loss = call_guarded(function, config)
    if isinstance(loss, Failure):
        raise ConfigError(f"{setting}: it raised {loss.reason}")
    if not isinstance(loss, Loss):
        raise ConfigError(
            f"{setting}: it returned {reprlib.repr(loss)}, expected an instance of megatron_drpo.losses.Loss"
        )
    return loss
