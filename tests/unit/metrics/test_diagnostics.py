"""The diagnostics against definitions written out in Python, and their additivity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.metrics.diagnostics import (
    W_HISTOGRAM_EDGES,
    Diagnostics,
    compute_diagnostics,
    summarise,
)
from megatron_drpo.packing import dummy_micro_batch, pack
from megatron_drpo.types import MicroBatch, TrainSequence

LOSS = DrpoLoss(delta=0.1)
CPU = torch.device("cpu")


def _micro_batch(seed: int, num_response: int) -> tuple[MicroBatch, torch.Tensor, torch.Tensor]:
    """(micro-batch, log pi, entropy), with numbers at positions without loss that must not be read."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.rand(num_response, generator=generator) * 0.8 + 0.1
    sequence = TrainSequence(
        id=seed,
        token_ids=torch.arange(2 + num_response),
        prompt_length=2,
        advantages=torch.randn(num_response, generator=generator).round(decimals=1),
        rollout_logprobs=mu.log(),
        loss_mask=torch.rand(num_response, generator=generator) < 0.7,
    )
    batch = pack([sequence], [sequence.loss_mask.float()], pad_to_multiple=4)
    pi = (
        batch.rollout_logprobs_T.exp() + 0.2 * torch.rand(batch.num_tokens, generator=generator) - 0.1
    ).clamp(0.01, 1)
    unread = ~batch.loss_mask_T
    entropy = torch.rand(batch.num_tokens, generator=generator)
    return batch, pi.log().masked_fill(unread, 55.0), entropy.masked_fill(unread, math.nan)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_summary_is_the_definition_over_all_micro_batches() -> None:
    cases = [_micro_batch(seed, 9 + seed) for seed in range(3)]
    total = Diagnostics.zeros(CPU)
    for batch, logprobs, entropy in cases:
        total = total + compute_diagnostics(batch, logprobs, entropy, LOSS)
    metrics = summarise(total)

    rows = [
        (p.item(), m.item(), a.item(), h.item())
        for batch, logprobs, entropy in cases
        for p, m, a, h, used in zip(
            logprobs.double().exp(),
            batch.rollout_logprobs_T.double().exp(),
            batch.advantages_T.double(),
            entropy.double(),
            batch.loss_mask_T,
            strict=True,
        )
        if used
    ]
    ratios = [pi / mu for pi, mu, _, _ in rows]
    gaps = [abs(math.log(ratio)) for ratio in ratios]
    weights = [1 - math.copysign(1, a * (p - m)) * abs(p - m) / 0.1 if a else 1.0 for p, m, a, _ in rows]
    expected = {
        "policy/entropy": _mean([h for *_, h in rows]),
        "policy/ratio_mean": _mean(ratios),
        "policy/ratio_max": max(ratios),
        "policy/kl_k1": _mean([-math.log(r) for r in ratios]),
        "policy/kl_k3": _mean([r - 1 - math.log(r) for r in ratios]),
        "policy/ess": sum(ratios) ** 2 / (len(rows) * sum(r * r for r in ratios)),
        "mismatch/logprob_abs_mean": _mean(gaps),
        "mismatch/logprob_abs_max": max(gaps),
        "mismatch/prob_abs_mean": _mean([abs(p - m) for p, m, _, _ in rows]),
        "trust_region/outside_share": _mean([abs(p - m) > 0.1 for p, m, _, _ in rows]),
        "trust_region/diverging_share": _mean([a * (p - m) > 0 for p, m, a, _ in rows]),
        "trust_region/converging_share": _mean([a * (p - m) < 0 for p, m, a, _ in rows]),
        "trust_region/corrective_share": _mean([w < 0 for w in weights]),
    }
    histogram = metrics.pop("trust_region/w_histogram")
    assert metrics == pytest.approx(expected, rel=1e-9)
    bounds = [-math.inf, *W_HISTOGRAM_EDGES, math.inf]
    counts = [sum(low <= w < high for w in weights) for low, high in itertools.pairwise(bounds)]
    assert histogram == counts
    assert sum(counts) == len(rows) > 15


def test_extreme_weights_fall_into_the_outer_bins() -> None:
    sequence = TrainSequence(
        id=0,
        token_ids=torch.arange(4),
        prompt_length=1,
        advantages=torch.tensor([1.0, -1.0, 1.0]),
        rollout_logprobs=torch.tensor([0.1, 0.1, 0.5]).log(),
        loss_mask=torch.tensor([True, True, True]),
    )
    batch = pack([sequence], [torch.ones(3)], pad_to_multiple=1)
    logprobs = torch.tensor([0.9, 0.9, 0.5, 1.0]).log()  # w = -7, 9 and exactly 1
    metrics = summarise(compute_diagnostics(batch, logprobs, torch.zeros(4), LOSS))
    histogram = metrics["trust_region/w_histogram"]
    assert isinstance(histogram, list)
    assert {index: count for index, count in enumerate(histogram) if count} == {
        0: 1,
        W_HISTOGRAM_EDGES.index(1.0) + 1: 1,
        len(W_HISTOGRAM_EDGES): 1,
    }


def test_no_loss_tokens_give_zeros() -> None:
    dummy = dummy_micro_batch(4)
    diagnostics = compute_diagnostics(dummy, torch.zeros(4), torch.zeros(4), LOSS)
    zeros = Diagnostics.zeros(CPU)
    assert torch.equal(diagnostics.sums, zeros.sums)
    assert torch.equal(diagnostics.maxima, zeros.maxima)
    histogram = summarise(diagnostics)
    assert histogram.pop("trust_region/w_histogram") == [0.0] * (len(W_HISTOGRAM_EDGES) + 1)
    assert set(histogram.values()) == {0.0}
