"""What losses, corrections and diagnostics read: the loss tokens of one micro-batch, or of a part of it.

Notation per sampled token: pi is its probability under the policy, mu under the behaviour that is the
anchor of the ratio, r = pi / mu, A is the advantage.

    N  loss tokens        K  most probable ids per token, as the rollout reported them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOG_RATIO_MAX = 30.0
"""Upper clamp of logpi - logmu, in nats. Every ratio with mu >= 1e-13 lies below it and is exact. A ratio
above e^30 (a token sampled with probability below 1e-13: a fault of the engine, never a sample) is held
at e^30, so that all values and the squared gradient norm stay finite in float32; being constant there,
such a token has no gradient and its w is 0. There is no lower clamp: r goes to 0 by itself.
(The DRPO authors' code clamps at +-20 and drops the gradient on both sides.)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Which sequence each loss token belongs to, for what is averaged over whole sequences."""

    index_N: Int[Tensor, " N"]
    """int64, 0 .. num_sequences - 1."""
    num_sequences: int
    reduce: Callable[[Tensor], Tensor] | None = None
    """Adds up a tensor over the ranks that share the sequences' tokens; None: they are all here."""

    def mean(self, values_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """For each token, the mean of `values_N` over the loss tokens of its sequence; without a gradient."""
        values_N = values_N.detach()
        sums_2S = values_N.new_zeros(2, self.num_sequences)
        sums_2S[0].index_add_(0, self.index_N, values_N)
        sums_2S[1].index_add_(0, self.index_N, torch.ones_like(values_N))
        if self.reduce is not None:
            sums_2S = self.reduce(sums_2S)
        return (sums_2S[0] / sums_2S[1].clamp(min=1))[self.index_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The distribution on the K ids that were most probable when the token was sampled."""

    logprobs_NK: Float[Tensor, "N K"]
    """The policy's, without a gradient."""
    rollout_logprobs_NK: Float[Tensor, "N K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """Per loss token, all in nats; `logprobs_N` alone may require a gradient."""

    logprobs_N: Float[Tensor, " N"]
    """log pi."""
    anchor_logprobs_N: Float[Tensor, " N"]
    """log mu of the ratio: the rollout's logprobs (anchor=rollout) or the trainer's old ones."""
    rollout_logprobs_N: Float[Tensor, " N"]
    """As the engine reported them when it sampled, whatever the anchor."""
    advantages_N: Float[Tensor, " N"]
    ref_logprobs_N: Float[Tensor, " N"] | None = None
    """The reference policy's, if there is one."""
    sequences: Sequences | None = None
    """None where the tokens are a part of a micro-batch: nothing may then ask for whole sequences."""
    topk: TopK | None = None

    @property
    def log_ratio_N(self) -> Float[Tensor, " N"]:
        """logpi - logmu, held at `LOG_RATIO_MAX` from above."""
        return (self.logprobs_N - self.anchor_logprobs_N).clamp(max=LOG_RATIO_MAX)

    @property
    def ratio_N(self) -> Float[Tensor, " N"]:
        """r = pi / mu, held at e^`LOG_RATIO_MAX` from above."""
        return self.log_ratio_N.exp()

    @property
    def probs_N(self) -> Float[Tensor, " N"]:
        """pi."""
        return self.logprobs_N.exp()

    @property
    def anchor_probs_N(self) -> Float[Tensor, " N"]:
        """mu."""
        return self.anchor_logprobs_N.exp()

    @property
    def difference_N(self) -> Float[Tensor, " N"]:
        """pi - mu, as mu (r - 1)."""
        return self.anchor_probs_N * (self.ratio_N - 1)

    @property
    def is_unclamped_N(self) -> Bool[Tensor, " N"]:
        """Where the ratio follows logpi, hence has a gradient."""
        return self.logprobs_N - self.anchor_logprobs_N <= LOG_RATIO_MAX

    def mean_over_sequence(self, values_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """See `Sequences.mean`.

        Raises:
            ValueError: these tokens are a part of a micro-batch.
        """
        if self.sequences is None:
            raise ValueError("whole sequences are needed, but these tokens are a part of a micro-batch")
        return self.sequences.mean(values_N)

    def with_logprobs(self, logprobs_N: Float[Tensor, " N"]) -> LossTokens:
        """The same tokens under other policy logprobs."""
        return replace(self, logprobs_N=logprobs_N)
