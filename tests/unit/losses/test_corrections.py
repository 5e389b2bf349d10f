"""Corrections: hand-computed factors, both anchors, whole sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import Anchor, CorrectionConfig, TokenCorrection
from megatron_drpo.losses.corrections import Correction, build_corrections
from megatron_drpo.losses.tokens import LossTokens, Sequences

RHO = [0.4, 0.5, 1.0, 2.0, 2.1, 1e-9, 1e9]
NAMES = ["tis", "mis", "icepop"]


def _build(anchor: Anchor, **settings: Any) -> Correction:
    (correction,) = build_corrections(CorrectionConfig(**settings), anchor)
    return correction


def _with_rho(rho: list[float], anchor: Anchor) -> LossTokens:
    """The trainer's probability is rho / 4096, the engine's 1 / 4096: quotients of powers of 2 are exact."""
    trainer = torch.tensor(rho, dtype=torch.float64).log() - 12 * math.log(2)
    engine = torch.full_like(trainer, -12 * math.log(2))
    is_recomputed = anchor is Anchor.recomputed
    return LossTokens(
        logprobs_N=engine + 5 if is_recomputed else trainer,
        anchor_logprobs_N=trainer if is_recomputed else engine,
        rollout_logprobs_N=engine,
        advantages_N=torch.ones_like(trainer),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tis", [0.4, 0.5, 1.0, 2.01, 2.01, 1e-9, 2.01]),
        ("mis", [0.4, 0.5, 1.0, 2.0, 0.0, 1e-9, 0.0]),
        ("icepop", [0.0, 0.5, 1.0, 2.0, 0.0, 0.0, 0.0]),
    ],
)
def test_token_factors_with_recomputed_anchor(name: str, expected: list[float]) -> None:
    correction = _build(Anchor.recomputed, token=TokenCorrection(name), token_low=0.49, token_high=2.01)
    assert correction.name == name
    assert not correction.needs_sequences
    expected[3] = 2.0
    assert correction.factor(_with_rho(RHO, Anchor.recomputed)).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"), [("mis", [1, 1, 1, 1, 0, 1, 0]), ("icepop", [0, 1, 1, 1, 0, 0, 0])]
)
def test_with_rollout_anchor_only_the_mask_is_left(name: str, expected: list[int]) -> None:
    """r = pi / mu is in the loss already; rho is taken from the current policy."""
    correction = _build(Anchor.rollout, token=TokenCorrection(name), token_low=0.49, token_high=2.01)
    tokens = _with_rho(RHO, Anchor.rollout)
    tokens.logprobs_N.requires_grad_()
    factor = correction.factor(tokens)
    assert factor.tolist() == expected
    assert not factor.requires_grad


@pytest.mark.parametrize("name", ["mis", "icepop"])  # tis is refused with anchor=rollout
def test_total_importance_weight_is_the_same_under_both_anchors(name: str, random_tokens: LossTokens) -> None:
    """Before the first update pi = old, and c r, the weight of A in the gradient, does not depend on it."""
    recomputed = random_tokens.with_logprobs(random_tokens.anchor_logprobs_N)
    rollout = replace(recomputed, anchor_logprobs_N=recomputed.rollout_logprobs_N)
    totals = []
    for anchor, tokens in ((Anchor.recomputed, recomputed), (Anchor.rollout, rollout)):
        correction = _build(anchor, token=TokenCorrection(name), token_low=0.7, token_high=1.4)
        totals.append(correction.factor(tokens) * tokens.ratio_N)
    assert 0 < int((totals[0] == 0).sum()) < 200
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_rho_beyond_float32_is_capped_or_masked(name: str) -> None:
    correction = _build(Anchor.recomputed, token=TokenCorrection(name))
    tokens = LossTokens(
        logprobs_N=torch.zeros(2),
        anchor_logprobs_N=torch.tensor([0.0, -1e4]),
        rollout_logprobs_N=torch.tensor([-1e4, 0.0]),
        advantages_N=torch.ones(2),
    )
    assert correction.factor(tokens).tolist() == [2.0 if name == "tis" else 0.0, 0.0]


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        (0.6, 1.9, [0, 0, 1, 0]),
        (None, 1.9, [1, 0, 1, 1]),
        (0.6, None, [0, 1, 1, 0]),
        (0.4, 2.1, [1, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("anchor", list(Anchor))
def test_sequence_mask_by_the_geometric_mean(
    low: float | None, high: float | None, kept: list[int], anchor: Anchor
) -> None:
    """Sequences of rho (1/4, 1), (8, 2, 1/2), (1/16, 16), (0.1): means 1/2, 2, 1, 0.1."""
    rho, index = [0.25, 1.0, 8.0, 2.0, 0.5, 0.0625, 16.0, 0.1], [0, 0, 1, 1, 1, 2, 2, 3]
    sequences = Sequences(index_N=torch.tensor(index), num_sequences=4)
    tokens = replace(_with_rho(rho, anchor), sequences=sequences)
    correction = _build(anchor, sequence_low=low, sequence_high=high)
    assert correction.name == "sequence_mask"
    assert correction.needs_sequences
    assert correction.factor(tokens).tolist() == [kept[i] for i in index]


def test_opsm_masks_negative_advantages_of_sequences_that_drifted(
    make_tokens: Callable[..., LossTokens],
) -> None:
    """Sequence 0 fell from mu by log 2 on average, sequence 1 rose, sequence 2 fell by (log 4) / 2."""
    sequences = Sequences(index_N=torch.tensor([0, 0, 1, 1, 2, 2]), num_sequences=3)
    tokens = make_tokens(
        [0.1, 0.2, 0.4, 0.4, 0.1, 0.3],
        [0.2, 0.4, 0.2, 0.2, 0.4, 0.3],
        [-1.0, 1.0, -1.0, -1.0, -0.5, 0.0],
        sequences=sequences,
    )
    for delta, expected in ((0.69, [0, 1, 1, 1, 0, 1]), (0.7, [1, 1, 1, 1, 1, 1])):
        correction = _build(Anchor.rollout, opsm_delta=delta)
        assert correction.name == "opsm"
        assert correction.needs_sequences
        assert correction.factor(tokens).tolist() == expected


def test_opsm_is_taken_from_the_anchor(random_tokens: LossTokens) -> None:
    """Another engine gap changes nothing."""
    (correction,) = build_corrections(CorrectionConfig(opsm_delta=0.01), Anchor.recomputed)
    shifted = replace(random_tokens, rollout_logprobs_N=random_tokens.rollout_logprobs_N - 3)
    factor = correction.factor(random_tokens)
    assert 0 < int(factor.sum()) < 200
    assert torch.equal(factor, correction.factor(shifted))


def test_nothing_is_on_by_default_and_everything_may_be() -> None:
    assert build_corrections(CorrectionConfig(), Anchor.rollout) == ()
    config = CorrectionConfig(token=TokenCorrection.icepop, sequence_high=2.0, opsm_delta=0.1)
    assert [c.name for c in build_corrections(config, Anchor.rollout)] == ["icepop", "sequence_mask", "opsm"]
