"""How far the policy has moved from the behaviour policy, and what the loss does about it.

Sums and maxima over loss tokens, additive over micro-batches and data-parallel ranks, then one summary.

    T  packed tokens of one micro-batch
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.losses.base import Loss, compute_log_ratio
from megatron_drpo.types import MicroBatch

W_HISTOGRAM_EDGES: tuple[float, ...] = tuple(i / 10 for i in range(-10, 31))
"""Edges of trust_region/w_histogram: w from -1 to 3 in steps of 0.1. Count 0 is w < -1, count i is
edge[i - 1] <= w < edge[i], the last count is w >= 3."""

_SUMS = (
    "num_tokens",
    "entropy",
    "ratio",
    "ratio_squared",
    "kl_k1",
    "kl_k3",
    "logprob_abs",
    "prob_abs",
    "outside",
    "diverging",
    "converging",
    "corrective",
)
_MAXIMA = ("ratio", "logprob_abs")


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Add over micro-batches with `+`; over ranks, all-reduce `sums` by sum and `maxima` by maximum."""

    sums: Float[Tensor, " K"]
    """float64: one per name in _SUMS, then the counts of the w histogram."""
    maxima: Float[Tensor, " M"]
    """float64, never negative: one per name in _MAXIMA."""

    @classmethod
    def zeros(cls, device: torch.device) -> Diagnostics:
        """Of no tokens."""
        num_sums = len(_SUMS) + len(W_HISTOGRAM_EDGES) + 1
        sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        return cls(sums, torch.zeros(len(_MAXIMA), dtype=torch.float64, device=device))

    def __add__(self, other: Diagnostics) -> Diagnostics:
        return Diagnostics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))


@torch.no_grad()
def compute_diagnostics(
    micro_batch: MicroBatch,
    logprobs_T: Float[Tensor, " T"],
    entropy_T: Float[Tensor, " T"],
    loss: Loss,
) -> Diagnostics:
    """The diagnostics of one micro-batch, over its loss tokens.

    Args:
        micro_batch: gives log mu, A and the loss mask.
        logprobs_T: log pi of the labels.
        entropy_T: of the policy's distribution, in nats.
        loss: gives w and the trust region.
    """
    mask_T = micro_batch.loss_mask_T
    logpi, logmu = logprobs_T[mask_T].double(), micro_batch.rollout_logprobs_T[mask_T].double()
    advantages = micro_batch.advantages_T[mask_T].double()
    log_ratio = compute_log_ratio(logpi, logmu)
    ratio = log_ratio.exp()
    weight = loss.weight(logpi, logmu, advantages)
    direction = advantages * log_ratio
    per_token = {
        "num_tokens": torch.ones_like(ratio),
        "entropy": entropy_T[mask_T].double(),
        "ratio": ratio,
        "ratio_squared": ratio.square(),
        "kl_k1": -log_ratio,
        "kl_k3": log_ratio.expm1() - log_ratio,
        "logprob_abs": (logpi - logmu).abs(),
        "prob_abs": (logpi.exp() - logmu.exp()).abs(),
        "outside": loss.outside_trust_region(logpi, logmu).double(),
        "diverging": (direction > 0).double(),
        "converging": (direction < 0).double(),
        "corrective": (weight < 0).double(),
    }
    edges = torch.tensor(W_HISTOGRAM_EDGES, dtype=torch.float64, device=weight.device)
    histogram = torch.bincount(torch.bucketize(weight, edges, right=True), minlength=len(edges) + 1)
    sums = torch.stack([per_token[name].sum() for name in _SUMS])
    zero = ratio.new_zeros(1)
    maxima = torch.stack([torch.cat([per_token[name], zero]).max() for name in _MAXIMA])
    return Diagnostics(torch.cat([sums, histogram.double()]), maxima)


def summarise(diagnostics: Diagnostics) -> dict[str, float | list[float]]:
    """Metrics of the reduced diagnostics; means are over loss tokens. Without any loss token all are 0.

    policy/kl_k1 = mean(-log r) and policy/kl_k3 = mean(r - 1 - log r) estimate KL(mu || pi) from samples
    of mu (Schulman, http://joschu.net/blog/kl-approx.html). policy/ess = (sum r)^2 / (n sum r^2) is the
    effective sample size as a share of the n loss tokens: 1 when all ratios are equal, 1/n when one
    dominates. trust_region/*_share: tokens outside the loss's bound; moving away from mu in the direction
    of A (diverging, A log r > 0) or back (converging, A log r < 0); with w < 0 (corrective).
    """
    values = diagnostics.sums.tolist()
    sums = dict(zip(_SUMS, values, strict=False))
    maxima = dict(zip(_MAXIMA, diagnostics.maxima.tolist(), strict=True))
    num_tokens = max(sums["num_tokens"], 1.0)
    mean = {name: total / num_tokens for name, total in sums.items()}
    return {
        "policy/entropy": mean["entropy"],
        "policy/ratio_mean": mean["ratio"],
        "policy/ratio_max": maxima["ratio"],
        "policy/kl_k1": mean["kl_k1"],
        "policy/kl_k3": mean["kl_k3"],
        "policy/ess": mean["ratio"] ** 2 / mean["ratio_squared"] if mean["ratio_squared"] else 0.0,
        "mismatch/logprob_abs_mean": mean["logprob_abs"],
        "mismatch/logprob_abs_max": maxima["logprob_abs"],
        "mismatch/prob_abs_mean": mean["prob_abs"],
        "trust_region/outside_share": mean["outside"],
        "trust_region/diverging_share": mean["diverging"],
        "trust_region/converging_share": mean["converging"],
        "trust_region/corrective_share": mean["corrective"],
        "trust_region/w_histogram": values[len(_SUMS) :],
    }
