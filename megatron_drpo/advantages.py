"""Group-relative advantages: how much better a sample is than its group.

P = prompts of one step, G = samples of one prompt (a group).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config import Advantage

STD_EPS = 1e-6
"""Added to the standard deviation of `group_mean_std`; in units of the reward."""


def compute_advantages(rewards_PG: Float[Tensor, "P G"], estimator: Advantage) -> Float[Tensor, "P G"]:
    """One advantage per sample; every response token of the sample gets it.

    With r the rewards of one group and mean(r) their mean:

    - `uncentred`: r
    - `group_mean`: r - mean(r) (DRPO, arXiv 2606.09821; Dr. GRPO, arXiv 2503.20783)
    - `group_mean_std`: (r - mean(r)) / (std(r) + 1e-6) with the sample standard deviation, which divides by
      G - 1 (GRPO, arXiv 2402.03300, section 4.1.2; the paper leaves divisor and epsilon open)
    - `leave_one_out`: r_i - mean of the other G - 1 rewards = (r_i - mean(r)) * G / (G - 1)
      (RLOO, arXiv 2402.14740, Eq. 8)

    A group whose rewards are all equal, a group of one sample included, says nothing about which sample is
    better: its centred advantages are exactly 0. Computed in float64, returned in the dtype of the rewards.
    """
    if estimator is Advantage.uncentred:
        return rewards_PG.clone()
    rewards = rewards_PG.double()
    num_samples = rewards.shape[1]
    is_constant = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    # The mean of equal floats may differ from them by rounding, which a division by std would blow up.
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(is_constant, 0.0)
    degrees_of_freedom = max(num_samples - 1, 1)
    if estimator is Advantage.group_mean_std:
        std = (centred.square().sum(dim=1, keepdim=True) / degrees_of_freedom).sqrt()
        centred = centred / (std + STD_EPS)
    elif estimator is Advantage.leave_one_out:
        centred = centred * num_samples / degrees_of_freedom
    return centred.to(rewards_PG.dtype)
