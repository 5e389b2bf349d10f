"""What a loss is: a value per token and its gradient in closed form.

Notation as in `tokens.py`. Most losses of the family have

    dL/dlogpi = -A * r * w

with a weight w that says how much of the plain policy gradient is left: such a loss is a `RatioLoss` and
states w. Any other `Loss` states dL/dlogpi itself, and w follows. Autograd of `value` gives the same
gradient (tests prove it); plots draw w, and the logprob op forms gradients from the closed form without
autograd, as soon as it knows logpi.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.losses.tokens import LossTokens


class Loss(ABC):
    """One loss of the family. All methods are pure; a token's loss has no gradient to other tokens' logpi."""

    needs_sequences: ClassVar[bool] = False
    """Whether a token's loss depends on its whole sequence."""
    has_trust_region: ClassVar[bool] = True
    """Whether there is a bound on the change of the policy that tokens can be outside of."""

    @property
    def num_topk(self) -> int:
        """Most probable ids per token that the rollout must report."""
        return 0

    @abstractmethod
    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """The loss per token, differentiable with respect to logprobs_N."""

    @abstractmethod
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """dL/dlogpi per token in closed form, without a gradient of its own."""

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """w = dL/dlogpi / (-A r); 0 where A r is 0."""
        scale_N = -tokens.advantages_N * tokens.ratio_N
        weight_N = self.logprob_gradient(tokens) / scale_N
        return torch.where(scale_N == 0, torch.zeros_like(weight_N), weight_N)

    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """Tokens beyond the loss's bound on the change of the policy; none for a loss without a bound."""
        return torch.zeros_like(tokens.logprobs_N, dtype=torch.bool)

    def warnings(self) -> list[str]:
        """Settings that are allowed but do nothing or are hardly meant, one sentence each."""
        return []


class RatioLoss(Loss):
    """A loss whose gradient is -A r w with a finite w; A = 0 gives a zero gradient."""

    @abstractmethod
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """w in closed form, without a gradient of its own; 0 where the ratio is clamped."""

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return -tokens.advantages_N * tokens.ratio_N * self.weight(tokens)
