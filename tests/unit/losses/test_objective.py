"""The objective: its gradient in closed form for every combination, and what masking means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config.schema import (
    AlgorithmConfig,
    Anchor,
    CorrectionConfig,
    KlConfig,
    KlEstimator,
    LossConfig,
    TokenCorrection,
)
from megatron_drpo.errors import ConfigError
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.corrections import Correction, IcePop, TruncatedImportanceSampling
from megatron_drpo.losses.objective import Objective, build_objective
from megatron_drpo.losses.registry import LOSSES
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.losses.tokens import LossTokens
from megatron_drpo.metrics.diagnostics import compute_diagnostics
from tests.host_syncs import count_host_syncs

CORRECTIONS: list[dict[str, Any]] = [
    {},
    {"token": TokenCorrection.tis, "token_high": 1.3},
    {"token": TokenCorrection.mis, "token_high": 1.3},
    {"token": TokenCorrection.icepop, "token_low": 0.8, "token_high": 1.3},
    {"sequence_low": 0.9, "sequence_high": 1.15},
    {"opsm_delta": 0.01},
    {"token": TokenCorrection.icepop, "sequence_low": 0.9, "sequence_high": 1.2, "opsm_delta": 0.01},
]
PENALTIES: list[tuple[float, KlEstimator]] = [(0.0, KlEstimator.k3), *((0.05, e) for e in KlEstimator)]


def _gradients(objective: Objective, tokens: LossTokens, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gradient to logprobs, gradient to entropy), by autograd."""
    logprobs, entropy = tokens.logprobs_N.clone().requires_grad_(), entropy.clone().requires_grad_()
    value = objective.value(tokens.with_logprobs(logprobs), entropy)
    to_logprobs, to_entropy = torch.autograd.grad(
        value.sum(), (logprobs, entropy), allow_unused=True, materialize_grads=True
    )
    return value.detach(), to_logprobs, to_entropy


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("anchor", list(Anchor))
def test_closed_form_is_the_gradient_of_every_combination(
    name: str, anchor: Anchor, random_tokens: LossTokens
) -> None:
    """Losses x corrections x KL estimators x entropy, in float64."""
    tokens = random_tokens
    if anchor is Anchor.rollout:
        tokens = replace(tokens, anchor_logprobs_N=tokens.rollout_logprobs_N)
    entropy = torch.linspace(0.1, 3.0, 200, dtype=torch.float64)
    for correction, (coef, estimator), entropy_coef in itertools.product(CORRECTIONS, PENALTIES, (0.0, 0.02)):
        if anchor is Anchor.rollout and correction.get("token") is TokenCorrection.tis:
            continue
        objective = build_objective(
            AlgorithmConfig(
                loss=LossConfig(name=name, mask_high=0.05, clip_low=0.05, clip_high=0.06),
                anchor=anchor,
                correction=CorrectionConfig(**correction),
                kl=KlConfig(coef=coef, estimator=estimator),
                entropy_coef=entropy_coef,
            )
        )
        _, to_logprobs, to_entropy = _gradients(objective, tokens, entropy)
        closed = objective.logprob_gradient(tokens.with_logprobs(tokens.logprobs_N.clone().requires_grad_()))
        assert not closed.requires_grad
        torch.testing.assert_close(closed, to_logprobs, rtol=1e-12, atol=1e-12)
        assert (to_entropy == -entropy_coef).all()
        needs = name == "gspo" or "sequence_low" in correction or "opsm_delta" in correction
        assert objective.needs_sequences == needs


@pytest.mark.parametrize("name", LOSSES)
def test_the_host_waits_for_no_value(name: str, random_tokens: LossTokens) -> None:
    """On a GPU a loss, its gradient and its diagnostics are queued: none needs a number on the host."""
    entropy = torch.linspace(0.1, 3.0, 200, dtype=torch.float64)
    objectives = [
        build_objective(
            AlgorithmConfig(
                loss=LossConfig(name=name),
                anchor=Anchor.recomputed,
                correction=CorrectionConfig(**correction),
                kl=KlConfig(coef=0.1),
                entropy_coef=0.01,
            )
        )
        for correction in CORRECTIONS
    ]
    compute_diagnostics(random_tokens, entropy, objectives[0])  # bucket edges are copied once
    with count_host_syncs() as syncs:
        for objective in objectives:
            objective.value(random_tokens, entropy)
            objective.logprob_gradient(random_tokens)
            objective.is_faulty(random_tokens)
            compute_diagnostics(random_tokens, entropy, objective)
    assert syncs.counts == {}


def test_value_by_hand(make_tokens: Callable[..., LossTokens]) -> None:
    """A = 2, pi = 0.4, old = 0.2, mu = 0.1, ref = 0.1: c = min(2, 1.5), r = 2, k3 = 1/4 - 1 + log 4."""
    old, mu = torch.tensor([[0.2], [0.1]], dtype=torch.float64).log()
    tokens = make_tokens([0.4], [0.2], [2.0], anchor_logprobs_N=old, rollout_logprobs_N=mu, ref_logprobs_N=mu)
    objective = build_objective(
        AlgorithmConfig(
            loss=LossConfig(name="surrogate"),
            anchor=Anchor.recomputed,
            correction=CorrectionConfig(token=TokenCorrection.tis, token_high=1.5),
            kl=KlConfig(coef=0.1),
            entropy_coef=0.01,
        )
    )
    assert objective.factor(tokens).item() == 1.5
    value = objective.value(tokens, torch.tensor([0.7], dtype=torch.float64))
    assert value.item() == pytest.approx(-2 * 2 * 1.5 + 0.1 * (0.25 - 1 + math.log(4)) - 0.007, rel=1e-12)
    assert objective.logprob_gradient(tokens).item() == pytest.approx(-6 + 0.1 * 0.75, rel=1e-12)


def test_faulty_is_what_the_engine_cannot_have_sampled(make_tokens: Callable[..., LossTokens]) -> None:
    """log(pi / mu) above the limit: on one side, of the engine's mu and not the anchor's, never for NaN."""
    logmu = torch.tensor([-21.0, -20.9, -1.0, -21.0, math.nan], dtype=torch.float32)
    tokens = LossTokens(
        logprobs_N=torch.tensor([-0.5, -1.0, -30.0, -1.5, -1.0]),
        anchor_logprobs_N=torch.tensor([-0.5, -25.0, -1.0, -25.0, -1.0]),
        rollout_logprobs_N=logmu,
        advantages_N=torch.ones(5),
    )
    objective = build_objective(AlgorithmConfig())
    assert objective.is_faulty(tokens).tolist() == [True, False, False, False, False]
    objective = build_objective(AlgorithmConfig(correction=CorrectionConfig(faulty_log_ratio=19.0)))
    assert objective.is_faulty(tokens).tolist() == [True, True, False, True, False]


def test_factor_at_hand_is_used(random_tokens: LossTokens) -> None:
    icepop = IcePop(low=0.8, high=1.3, anchor=Anchor.recomputed)
    objective = Objective(loss=SurrogateLoss(), corrections=(icepop,))
    entropy = torch.zeros(200, dtype=torch.float64)
    factor = objective.factor(random_tokens)
    assert torch.equal(
        objective.value(random_tokens, entropy, factor), objective.value(random_tokens, entropy)
    )
    halved = objective.value(random_tokens, entropy, factor / 2)
    torch.testing.assert_close(halved, objective.value(random_tokens, entropy) / 2, rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "field"),
    # A NaN logprob makes the mean over its sequence NaN, so GSPO's other tokens are not finite either.
    [
        *((name, "advantages_N") for name in LOSSES),
        *((name, "logprobs_N") for name in LOSSES if name != "gspo"),
    ],
)
def test_a_masked_token_contributes_exactly_0_whatever_its_value(
    name: str, field: str, bad: float, random_tokens: LossTokens
) -> None:
    """And all others contribute what they do without it."""
    config = AlgorithmConfig(
        loss=LossConfig(name=name),
        anchor=Anchor.recomputed,
        correction=CorrectionConfig(token=TokenCorrection.icepop, token_low=0.8, token_high=1.3),
    )
    objective = build_objective(config)
    masked = objective.factor(random_tokens) == 0
    assert 20 < int(masked.sum()) < 180
    changed: dict[str, Any] = {field: torch.where(masked, bad, getattr(random_tokens, field))}
    broken = replace(random_tokens, **changed)
    entropy = torch.zeros(200, dtype=torch.float64)
    value, gradient, _ = _gradients(objective, broken, entropy)
    closed = objective.logprob_gradient(broken)
    for tensor in (value, gradient, closed):
        assert (tensor[masked] == 0).all()
    expected_value, expected_gradient, _ = _gradients(objective, random_tokens, entropy)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(closed, objective.logprob_gradient(random_tokens))


def test_a_mask_wins_over_a_factor_that_is_not_a_number(random_tokens: LossTokens) -> None:
    class NotANumber(Correction):
        name = "nan"

        def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
            return torch.full_like(tokens.logprobs_N, math.nan)

    icepop = IcePop(low=0.8, high=1.3, anchor=Anchor.recomputed)
    for corrections in ((icepop, NotANumber()), (NotANumber(), icepop)):
        factor = Objective(loss=SurrogateLoss(), corrections=corrections).factor(random_tokens)
        masked = icepop.factor(random_tokens) == 0
        assert (factor[masked] == 0).all()
        assert factor[~masked].isnan().all()  # not hidden: the trainer stops at it


def test_factors_multiply_and_default_to_1(random_tokens: LossTokens) -> None:
    tis = TruncatedImportanceSampling(high=1.2, anchor=Anchor.recomputed)
    mask = IcePop(low=0.8, high=1.3, anchor=Anchor.rollout)
    both = Objective(loss=SurrogateLoss(), corrections=(tis, mask)).factor(random_tokens)
    assert torch.equal(both, tis.factor(random_tokens) * mask.factor(random_tokens))
    assert (Objective(loss=SurrogateLoss()).factor(random_tokens) == 1).all()


def test_masked_tokens_keep_penalty_and_bonus(random_tokens: LossTokens) -> None:
    config = AlgorithmConfig(
        loss=LossConfig(name="drpo"),
        anchor=Anchor.recomputed,
        correction=CorrectionConfig(token=TokenCorrection.icepop, token_low=0.8, token_high=1.3),
        kl=KlConfig(coef=0.1),
        entropy_coef=0.01,
    )
    objective = build_objective(config)
    entropy = torch.linspace(0.1, 3.0, 200, dtype=torch.float64)
    masked = objective.factor(random_tokens) == 0
    assert objective.kl is not None
    expected = objective.kl.value(random_tokens) - 0.01 * entropy
    assert torch.equal(objective.value(random_tokens, entropy)[masked], expected[masked])
    gradient = objective.kl.logprob_gradient(random_tokens)
    assert torch.equal(objective.logprob_gradient(random_tokens)[masked], gradient[masked])


def test_warnings_of_loss_and_penalty_come_together() -> None:
    config = AlgorithmConfig(loss=LossConfig(delta=12.5), kl=KlConfig(coef=0.1, estimator=KlEstimator.k1))
    delta, k1 = build_objective(config).warnings()
    assert "algorithm.loss.delta=12.5" in delta
    assert "algorithm.kl.estimator=k1" in k1
    assert build_objective(AlgorithmConfig()).warnings() == []


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown loss"):
        build_objective(AlgorithmConfig(loss=LossConfig(name="none")))


def test_a_loss_may_be_any_object_of_the_contract(random_tokens: LossTokens) -> None:
    class Square(Loss):
        def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
            return tokens.advantages_N * tokens.logprobs_N.square()

        @torch.no_grad()
        def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
            return 2 * tokens.advantages_N * tokens.logprobs_N

    objective = Objective(loss=Square())
    entropy = torch.zeros(200, dtype=torch.float64)
    _, gradient, _ = _gradients(objective, random_tokens, entropy)
    torch.testing.assert_close(objective.logprob_gradient(random_tokens), gradient, rtol=1e-14, atol=0)
