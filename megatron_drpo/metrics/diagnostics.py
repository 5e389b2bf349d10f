"""How far the policy has moved from the behaviour policy, and what the loss does about it.

Sums and maxima over loss tokens, by bucket of mu, additive over micro-batches and over data- and
context-parallel ranks; then one summary.

r = pi / mu is against the anchor, which is the rollout's logprobs or the trainer's recomputed ones;
mismatch/* is always against the rollout's, as the engine reported them.

    policy/entropy                    nats per token
    policy/ratio_mean, ratio_max      r
    policy/kl_k1, kl_k3               mean(-log r), mean(r - 1 - log r): both estimate KL(mu || pi) from
                                      samples of mu (Schulman, http://joschu.net/blog/kl-approx.html)
    policy/ess                        effective sample size (sum r)^2 / (n sum r^2), as a share of the n
                                      tokens: 1 when all ratios are equal, 1/n when one dominates
    policy/ref_kl, ref_kl_k3          KL(pi || reference), by the configured estimator and by k3; with a
                                      KL penalty only
    mismatch/logprob_abs_mean, logprob_abs_max
                                      |logpi - logmu| of trainer and engine, updates included
    mismatch/prob_abs_mean            |pi - mu| likewise
    mismatch/first_update_logprob_abs_mean
                                      the mean over the tokens of a step's first update, before it:
                                      with synchronous rollouts the engine's gap alone
    mismatch/old_logprob_abs_mean, old_logprob_abs_max
                                      |log of the anchor - logmu|: the engine's gap alone. Like the
                                      next, only where the anchor is not the rollout's
    policy/anchor_prob_abs_mean       |pi - mu| with the anchor's mu
    mismatch/faulty_tokens            number of tokens that were kept out of the loss, and of all else here:
                                      log(pi / mu) was above algorithm.correction.faulty_log_ratio
    trust_region/outside_share        tokens beyond the loss's bound
    trust_region/diverging_share      tokens moving away from mu in the direction of A (A log r > 0)
    trust_region/converging_share     back to it (A log r < 0)
    trust_region/corrective_share     w < 0: the gradient turns back
    trust_region/w_histogram          counts of w, see W_HISTOGRAM_EDGES; before corrections
    correction/factor_mean            the corrections' factor; like the next, with corrections only
    correction/masked_share           tokens whose factor is 0

By probability of the token, see MU_BUCKET_EDGES, `mu_bucket/` has lists of 7: `token_share`, and the last
part of every name above (`mu_bucket/entropy`, `mu_bucket/ratio_mean`, ..., `mu_bucket/outside_share`),
each over the bucket's tokens; 0 where token_share is 0. `mu_bucket/w_histogram` is one flat list,
bucket after bucket. Reference point: 7.8 % of the sampled tokens have mu <= 0.01, the first three
buckets, on Qwen3-30B-A3B-Base (arXiv 2606.09821, Figure 2).

    N  loss tokens        K  sums        M  maxima        B  buckets of mu (7)        H  bins of w
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config.schema import KlEstimator
from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.tokens import LossTokens

W_HISTOGRAM_EDGES: tuple[float, ...] = tuple(i / 10 for i in range(-10, 31))
"""Edges of trust_region/w_histogram: w from -1 to 3 in steps of 0.1. Count 0 is w < -1, count i is
edge[i - 1] <= w < edge[i], the last count is w >= 3."""

MU_BUCKET_EDGES: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0)
"""A token belongs to the smallest edge >= mu, its probability as the engine reported it; a mu that rounding
has put slightly above 1, to the last."""

_SUMS = (
    "num_tokens",
    "entropy",
    "ratio",
    "ratio_squared",
    "kl_k1",
    "kl_k3",
    "logprob_abs",
    "prob_abs",
    "anchor_prob_abs",
    "old_logprob_abs",
    "outside",
    "diverging",
    "converging",
    "corrective",
    "corrected",
    "factor",
    "masked",
    "referenced",
    "ref_kl",
    "ref_kl_k3",
    "faulty",
)
_MAXIMA = ("ratio", "logprob_abs", "old_logprob_abs")
_NUM_BUCKETS = len(MU_BUCKET_EDGES)
_NUM_BINS = len(W_HISTOGRAM_EDGES) + 1


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Add over micro-batches with `+`; over ranks, all-reduce `sums` by sum and `maxima` by maximum."""

    sums: Float[Tensor, " K"]
    """float64: per name in _SUMS its B buckets, then per bucket the counts of the w histogram."""
    maxima: Float[Tensor, " M"]
    """float64, never negative: per name in _MAXIMA its B buckets."""

    @classmethod
    def zeros(cls, device: torch.device) -> Diagnostics:
        """Of no tokens."""
        num_sums = (len(_SUMS) + _NUM_BINS) * _NUM_BUCKETS
        sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        return cls(sums, torch.zeros(len(_MAXIMA) * _NUM_BUCKETS, dtype=torch.float64, device=device))

    def __add__(self, other: Diagnostics) -> Diagnostics:
        return Diagnostics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    @property
    def num_tokens(self) -> int:
        """Loss tokens."""
        return self._count("num_tokens")

    @property
    def num_outside(self) -> int:
        """Loss tokens outside the loss's trust region."""
        return self._count("outside")

    @property
    def num_faulty(self) -> int:
        """Loss tokens that must not be (`Objective.is_faulty`); 0 once they have been left out."""
        return self._count("faulty")

    def _count(self, name: str) -> int:
        first = _SUMS.index(name) * _NUM_BUCKETS
        return int(self.sums[first : first + _NUM_BUCKETS].sum())


@torch.no_grad()
def compute_diagnostics(
    tokens: LossTokens, entropy_N: Float[Tensor, " N"], objective: Objective
) -> Diagnostics:
    """The diagnostics of one micro-batch, or of this rank's part of it.

    Collective over the ranks that share the sequences if the objective needs whole sequences: call it on
    all of them, with however few tokens.

    Args:
        entropy_N: of the policy's distribution, in nats.
        objective: gives w, the trust region, the corrections' factors and the KL estimator.
    """
    tokens = _to_float64(tokens)
    weight_N = objective.loss.weight(tokens)
    per_token = _per_token(tokens, weight_N, entropy_N.double(), objective)
    mu_edges, w_edges = _edges(weight_N.device)
    bucket_N = torch.bucketize(tokens.rollout_logprobs_N.exp(), mu_edges)
    table = torch.stack([per_token[name] for name in _SUMS])
    # Not a product with a one-hot matrix: 0 times an infinity would spoil the other buckets.
    sums_B = table.new_zeros(len(_SUMS), _NUM_BUCKETS).index_add_(1, bucket_N, table)
    maxima_B = table.new_zeros(len(_MAXIMA), _NUM_BUCKETS)
    rows = torch.stack([per_token[name] for name in _MAXIMA])
    maxima_B.scatter_reduce_(1, bucket_N.expand_as(rows), rows, "amax")
    bin_N = torch.bucketize(weight_N, w_edges, right=True) + bucket_N * _NUM_BINS
    # Not bincount, which makes the host wait for the largest bin; sums of ones are exact in any order.
    histogram = table.new_zeros(_NUM_BUCKETS * _NUM_BINS).index_add_(0, bin_N, per_token["num_tokens"])
    return Diagnostics(torch.cat([sums_B.flatten(), histogram]), maxima_B.flatten())


@functools.cache
def _edges(device: torch.device) -> tuple[Tensor, Tensor]:
    """float64, of the buckets of mu, without the last, and of the histogram of w. They are copied to a device
    once, because the host waits for that."""
    mu_edges, w_edges = MU_BUCKET_EDGES[:-1], W_HISTOGRAM_EDGES
    return (
        torch.tensor(mu_edges, dtype=torch.float64, device=device),
        torch.tensor(w_edges, dtype=torch.float64, device=device),
    )


def _to_float64(tokens: LossTokens) -> LossTokens:
    topk = tokens.topk
    if topk is not None:
        topk = replace(
            topk,
            logprobs_NK=topk.logprobs_NK.double(),
            rollout_logprobs_NK=topk.rollout_logprobs_NK.double(),
        )
    ref_N = tokens.ref_logprobs_N
    return replace(
        tokens,
        logprobs_N=tokens.logprobs_N.detach().double(),
        anchor_logprobs_N=tokens.anchor_logprobs_N.double(),
        rollout_logprobs_N=tokens.rollout_logprobs_N.double(),
        advantages_N=tokens.advantages_N.double(),
        ref_logprobs_N=None if ref_N is None else ref_N.double(),
        topk=topk,
    )


def _per_token(
    tokens: LossTokens, weight_N: Tensor, entropy_N: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """[N] float64 per name in _SUMS and _MAXIMA."""
    log_ratio_N = tokens.log_ratio_N
    ratio_N = log_ratio_N.exp()
    probs_N = tokens.logprobs_N.exp()
    direction_N = tokens.advantages_N * log_ratio_N
    one_N, zero_N = torch.ones_like(ratio_N), torch.zeros_like(ratio_N)
    per_token = {
        "num_tokens": one_N,
        "entropy": entropy_N,
        "ratio": ratio_N,
        "ratio_squared": ratio_N.square(),
        "kl_k1": -log_ratio_N,
        "kl_k3": log_ratio_N.expm1() - log_ratio_N,
        "logprob_abs": (tokens.logprobs_N - tokens.rollout_logprobs_N).abs(),
        "prob_abs": (probs_N - tokens.rollout_logprobs_N.exp()).abs(),
        "anchor_prob_abs": (probs_N - tokens.anchor_probs_N).abs(),
        "old_logprob_abs": (tokens.anchor_logprobs_N - tokens.rollout_logprobs_N).abs(),
        "outside": objective.loss.outside_trust_region(tokens).double(),
        "diverging": (direction_N > 0).double(),
        "converging": (direction_N < 0).double(),
        "corrective": (weight_N < 0).double(),
        "faulty": objective.is_faulty(tokens).double(),
    }
    per_token |= dict.fromkeys(("corrected", "factor", "masked", "referenced", "ref_kl", "ref_kl_k3"), zero_N)
    if objective.corrections:
        factor_N = objective.factor(tokens)
        per_token |= {"corrected": one_N, "factor": factor_N, "masked": (factor_N == 0).double()}
    if objective.kl is not None:
        estimate, k3 = (
            replace(objective.kl, coef=1.0, estimator=estimator).value(tokens)
            for estimator in (objective.kl.estimator, KlEstimator.k3)
        )
        per_token |= {"referenced": one_N, "ref_kl": estimate, "ref_kl_k3": k3}
    return per_token


def summarise(diagnostics: Diagnostics) -> dict[str, float | list[float]]:
    """Metrics of the reduced diagnostics, listed at the top of this file; without loss tokens all are 0."""
    split = len(_SUMS) * _NUM_BUCKETS
    sums_B = diagnostics.sums[:split].view(len(_SUMS), _NUM_BUCKETS)
    maxima_B = diagnostics.maxima.view(len(_MAXIMA), _NUM_BUCKETS)
    histogram_BH = diagnostics.sums[split:].view(_NUM_BUCKETS, _NUM_BINS)
    # Column 0 is the total, the others are the buckets.
    sums = dict(zip(_SUMS, torch.cat([sums_B.sum(1, keepdim=True), sums_B], 1).tolist(), strict=True))
    maxima = dict(
        zip(_MAXIMA, torch.cat([maxima_B.amax(1, keepdim=True), maxima_B], 1).tolist(), strict=True)
    )
    num_tokens = max(sums["num_tokens"][0], 1.0)
    summary: dict[str, float | list[float]] = {}
    buckets: dict[str, float | list[float]] = {
        "mu_bucket/token_share": [count / num_tokens for count in sums["num_tokens"][1:]]
    }
    for name, (total, *by_bucket) in _columns(sums, maxima):
        summary[name] = total
        buckets[f"mu_bucket/{name.partition('/')[2]}"] = by_bucket
    summary["trust_region/w_histogram"] = histogram_BH.sum(0).tolist()
    buckets["mu_bucket/w_histogram"] = histogram_BH.flatten().tolist()
    return summary | buckets


def _columns(
    sums: dict[str, list[float]], maxima: dict[str, list[float]]
) -> Iterator[tuple[str, list[float]]]:
    """(metric, [total, bucket 1, ...])."""
    counts = [max(count, 1.0) for count in sums["num_tokens"]]

    def mean(name: str) -> list[float]:
        return [total / count for total, count in zip(sums[name], counts, strict=True)]

    yield "policy/entropy", mean("entropy")
    yield "policy/ratio_mean", mean("ratio")
    yield "policy/ratio_max", maxima["ratio"]
    yield "policy/kl_k1", mean("kl_k1")
    yield "policy/kl_k3", mean("kl_k3")
    yield (
        "policy/ess",
        [m * m / s if s else 0.0 for m, s in zip(mean("ratio"), mean("ratio_squared"), strict=True)],
    )
    if sums["referenced"][0]:
        yield "policy/ref_kl", mean("ref_kl")
        yield "policy/ref_kl_k3", mean("ref_kl_k3")
    yield "mismatch/logprob_abs_mean", mean("logprob_abs")
    yield "mismatch/logprob_abs_max", maxima["logprob_abs"]
    yield "mismatch/prob_abs_mean", mean("prob_abs")
    if maxima["old_logprob_abs"][0]:
        yield "mismatch/old_logprob_abs_mean", mean("old_logprob_abs")
        yield "mismatch/old_logprob_abs_max", maxima["old_logprob_abs"]
        yield "policy/anchor_prob_abs_mean", mean("anchor_prob_abs")
    for name in ("outside", "diverging", "converging", "corrective"):
        yield f"trust_region/{name}_share", mean(name)
    if sums["corrected"][0]:
        yield "correction/factor_mean", mean("factor")
        yield "correction/masked_share", mean("masked")
