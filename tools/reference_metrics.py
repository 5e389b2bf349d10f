"""The metrics of an update in float64, written down from their definitions at the top of
`megatron_drpo/metrics/diagnostics.py`: what parity is measured against.

    N  loss tokens
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from megatron_drpo.config.schema import AlgorithmConfig, Anchor, KlEstimator
from tools.reference_objective import EXCESS, LOSSES, Tokens, factor, has_corrections, kl_estimate

BUCKET_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0)
"""Bucket b holds the tokens with edge b < mu <= edge b + 1."""
W_EDGES = (-torch.inf, *(tenths / 10 for tenths in range(-10, 31)), torch.inf)
"""Bin i holds the tokens with edge i <= w < edge i + 1."""


def gradient_weight(t: Tokens, algorithm: AlgorithmConfig) -> Tensor:
    """[N]: w = dL/dlogpi / (-A r) of the loss alone, by autograd.

    Rounded to 1e-12: w is exactly 0 or exactly 1 for most tokens of most losses, and both are edges of bins.
    """
    logpi = t.logpi.detach().requires_grad_()
    with torch.enable_grad():
        free = replace(t, logpi=logpi)
        value = LOSSES[algorithm.loss.name](free, algorithm.loss)
        [gradient] = torch.autograd.grad(value.sum(), logpi)
    return (gradient / (-t.advantage * free.r.detach())).round(decimals=12)


@torch.no_grad()
def compute_metrics(t: Tokens, weight: Tensor, algorithm: AlgorithmConfig) -> dict[str, float | list[float]]:
    """All metrics by name; those by bucket of mu are lists, each entry over the bucket's tokens."""
    mu = t.rollout.exp()
    per_token = _per_token(t, weight, algorithm)
    inside = [(mu > low) & (mu <= high) for low, high in itertools.pairwise(BUCKET_EDGES)]
    whole = _summary(per_token, torch.ones_like(mu, dtype=torch.bool))
    buckets = [_summary(per_token, chosen) for chosen in inside]
    result: dict[str, float | list[float]] = dict(whole)
    for name in whole:
        result[f"mu_bucket/{name.partition('/')[2]}"] = [bucket[name] for bucket in buckets]
    result["mu_bucket/token_share"] = [chosen.double().mean().item() for chosen in inside]
    result["trust_region/w_histogram"] = _histogram(weight)
    result["mu_bucket/w_histogram"] = [count for chosen in inside for count in _histogram(weight[chosen])]
    return result


def _per_token(t: Tokens, weight: Tensor, algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """[N] by metric, see `_summarise`."""
    moves = t.advantage * (t.r - 1)
    engine_gap = (t.logmu - t.rollout).abs()
    values = {
        "policy/entropy": t.entropy,
        "policy/ratio_mean": t.r,
        "policy/ratio_max": t.r,
        "policy/kl_k1": -t.r.log(),
        "policy/kl_k3": t.r - 1 - t.r.log(),
        "policy/ess": t.r,
        "mismatch/logprob_abs_mean": (t.logpi - t.rollout).abs(),
        "mismatch/logprob_abs_max": (t.logpi - t.rollout).abs(),
        "mismatch/prob_abs_mean": (t.pi - t.rollout.exp()).abs(),
        "trust_region/outside_share": (EXCESS[algorithm.loss.name](t, algorithm.loss) > 0).double(),
        "trust_region/diverging_share": (moves > 0).double(),
        "trust_region/converging_share": (moves < 0).double(),
        "trust_region/corrective_share": (weight < 0).double(),
    }
    if algorithm.anchor is Anchor.recomputed:
        values |= {
            "mismatch/old_logprob_abs_mean": engine_gap,
            "mismatch/old_logprob_abs_max": engine_gap,
            "policy/anchor_prob_abs_mean": (t.pi - t.mu).abs(),
        }
    if algorithm.kl.coef:
        values |= {
            "policy/ref_kl": kl_estimate(t, algorithm.kl.estimator),
            "policy/ref_kl_k3": kl_estimate(t, KlEstimator.k3),
        }
    if has_corrections(algorithm.correction):
        factors = factor(t, algorithm.correction, algorithm.anchor)
        values |= {"correction/factor_mean": factors, "correction/masked_share": (factors == 0).double()}
    return values


def _summary(per_token: dict[str, Tensor], chosen: Tensor) -> dict[str, float]:
    """0 without tokens."""
    if not chosen.any():
        return dict.fromkeys(per_token, 0.0)
    return {name: _summarise(name, values[chosen]).item() for name, values in per_token.items()}


def _summarise(name: str, values: Tensor) -> Tensor:
    if name == "policy/ess":
        return values.sum() ** 2 / (len(values) * (values**2).sum())
    return values.max() if name.endswith("_max") else values.mean()


def _histogram(weight: Tensor) -> list[float]:
    edges = itertools.pairwise(W_EDGES)
    return [float(((weight >= low) & (weight < high)).sum()) for low, high in edges]
