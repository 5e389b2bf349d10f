"""Group-relative advantages: how much better a sample is than its group.

P = prompts of one step on this replica, G = samples of one prompt (a group).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_drpo.config.schema import Advantage

STD_EPS = 1e-6
"""Added to the standard deviation of `group_mean_std`; in units of the reward."""
VARIANCE_FLOOR = 1e-8
"""Smallest variance that `reinforce_plus_plus` divides by the root of; in units of the squared reward."""


def compute_advantages(
    rewards_PG: Float[Tensor, "P G"],
    estimator: Advantage,
    *,
    num_tokens_PG: Int[Tensor, "P G"] | None = None,
    sum_over_replicas: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Float[Tensor, "P G"]:
    """One advantage per sample; every response token of the sample gets it.

    With r the rewards of one group and mean(r) their mean:

    - `uncentred`: r
    - `group_mean`: r - mean(r) (DRPO, arXiv 2606.09821; Dr. GRPO, arXiv 2503.20783)
    - `group_mean_std`: (r - mean(r)) / (std(r) + 1e-6) with the sample standard deviation, which divides by
      G - 1 (GRPO, arXiv 2402.03300, section 4.1.2; the paper leaves divisor and epsilon open)
    - `leave_one_out`: r_i - mean of the other G - 1 rewards = (r_i - mean(r)) * G / (G - 1)
      (RLOO, arXiv 2402.14740, Eq. 8)
    - `reinforce_plus_plus`: (c - m) / sqrt(max(v, 1e-8)) with c = r - mean(r) and m, v the mean and the
      population variance of c over all response tokens of the step on all replicas, so that a sample counts
      by its number n of loss tokens: m = sum n c / sum n, v = sum n (c - m)^2 / sum n
      (REINFORCE++ with baseline, arXiv 2501.03262, normalised as in the authors' code, OpenRLHF)

    A group whose rewards are all equal, a group of one sample included, says nothing about which sample is
    better: its centred advantages are exactly 0; under `reinforce_plus_plus` all such samples of a step share
    one value, -m / sqrt(v). Computed in float64, returned in the dtype of the rewards.

    Args:
        num_tokens_PG: `reinforce_plus_plus`: loss tokens of each sample; None: all samples count alike.
        sum_over_replicas: `reinforce_plus_plus`: the sum of a tensor over all replicas, a collective.
    """
    if estimator is Advantage.uncentred:
        return rewards_PG.clone()
    rewards = rewards_PG.double()
    num_samples = rewards.shape[1]
    is_constant = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    # The mean of floats that are equal, or nearly so, is off by rounding, which a division by std would blow
    # up: centring a second time takes out what is left of it.
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = (centred - centred.mean(dim=1, keepdim=True)).masked_fill(is_constant, 0.0)
    degrees_of_freedom = max(num_samples - 1, 1)
    if estimator is Advantage.group_mean_std:
        std = (centred.square().sum(dim=1, keepdim=True) / degrees_of_freedom).sqrt()
        centred = centred / (std + STD_EPS)
    elif estimator is Advantage.leave_one_out:
        centred = centred * num_samples / degrees_of_freedom
    elif estimator is Advantage.reinforce_plus_plus:
        counts = torch.ones_like(rewards) if num_tokens_PG is None else num_tokens_PG.double()
        centred = _normalise(centred, counts, sum_over_replicas)
    return centred.to(rewards_PG.dtype)


def _normalise(
    centred_PG: Float[Tensor, "P G"],
    counts_PG: Float[Tensor, "P G"],
    sum_over_replicas: Callable[[Tensor], Tensor],
) -> Float[Tensor, "P G"]:
    """Mean 0 and variance 1 over the tokens of all replicas. One sum of three moments: after centring within
    groups, float64 has digits enough for the difference of second moment and squared mean."""
    moments = torch.stack([(counts_PG * centred_PG**power).sum() for power in range(3)])
    count, first, second = sum_over_replicas(moments).unbind()
    mean = first / count.clamp(min=1)
    variance = second / count.clamp(min=1) - mean.square()
    return (centred_PG - mean) / variance.clamp(min=VARIANCE_FLOOR).sqrt()
