"""What a loss is: a value per token and the gradient weight w, in closed form.

Notation per sampled token: pi and mu are its probabilities under the policy and under the behaviour that
sampled it, r = pi / mu, A is the advantage. Each loss of the family has

    dL/dlogpi = -A * r * w

and `weight` states w beside `value`, whose autograd gradient it equals: plots draw w, and a fused kernel
can form the gradient without autograd.

    T  packed tokens of one micro-batch
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_MAX = 30.0
"""Upper clamp of logpi - logmu, in nats. Every ratio with mu >= 1e-13 lies below it and is exact. A ratio
above e^30 (a token sampled with probability below 1e-13: a fault of the engine, never a sample) is held
at e^30, so that all values and the squared gradient norm stay finite in float32; being constant there,
such a token has no gradient and its w is 0. There is no lower clamp: r goes to 0 by itself.
(The DRPO authors' code clamps at +-20 and drops the gradient on both sides.)"""


def compute_log_ratio(
    logprobs_T: Float[Tensor, " T"], rollout_logprobs_T: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """logpi - logmu, held at `LOG_RATIO_MAX` from above."""
    return (logprobs_T - rollout_logprobs_T).clamp(max=LOG_RATIO_MAX)


def compute_ratio(
    logprobs_T: Float[Tensor, " T"], rollout_logprobs_T: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """r = pi / mu, held at e^`LOG_RATIO_MAX` from above."""
    return compute_log_ratio(logprobs_T, rollout_logprobs_T).exp()


def compute_unclamped(
    logprobs_T: Float[Tensor, " T"], rollout_logprobs_T: Float[Tensor, " T"]
) -> Bool[Tensor, " T"]:
    """Where the ratio follows logpi, hence has a gradient."""
    return logprobs_T - rollout_logprobs_T <= LOG_RATIO_MAX


class Loss(ABC):
    """One loss of the family. All methods are pure and elementwise; A = 0 gives a zero gradient."""

    @abstractmethod
    def value(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        """The loss per token, differentiable with respect to logprobs_T.

        Args:
            logprobs_T: log pi of the sampled tokens, in nats.
            rollout_logprobs_T: log mu of the same tokens as the engine reported it, in nats.
            advantages_T: A.
        """

    @abstractmethod
    def weight(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        """w of the module docstring, without a gradient of its own."""

    def logprob_gradient(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        """dL/dlogpi = -A * r * w in closed form, equal to autograd's gradient of `value`."""
        with torch.no_grad():
            ratio_T = compute_ratio(logprobs_T, rollout_logprobs_T)
            return -advantages_T * ratio_T * self.weight(logprobs_T, rollout_logprobs_T, advantages_T)

    def outside_trust_region(
        self, logprobs_T: Float[Tensor, " T"], rollout_logprobs_T: Float[Tensor, " T"]
    ) -> Bool[Tensor, " T"]:
        """Tokens beyond the loss's bound on the change of the policy; none for a loss without a bound."""
        return torch.zeros_like(logprobs_T, dtype=torch.bool)

    def warnings(self) -> list[str]:
        """Settings that are allowed but do nothing, one sentence each."""
        return []
