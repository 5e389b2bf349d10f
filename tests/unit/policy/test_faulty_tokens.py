"""An update with faulty tokens is the one in which they are masked, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from megatron_drpo.config.schema import Aggregation, AlgorithmConfig, Anchor, Config, LogprobMode, LossConfig
from megatron_drpo.losses.registry import LOSSES
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.types import MicroBatch, TrainSequence

BuildPolicy = Callable[[Config], Policy]
MakeSequences = Callable[..., list[TrainSequence]]
Update = Callable[[Policy, Sequence[TrainSequence]], UpdateResult]

LOGMU = -29.0
"""A random model of 101 ids finds any token at least e^21 times more probable."""


def spoil(sequences: list[TrainSequence], places: list[tuple[int, int]]) -> list[TrainSequence]:
    """The same with faulty tokens at these (sequence, response token)."""
    spoiled = [replace(s, rollout_logprobs=s.rollout_logprobs.clone()) for s in sequences]
    for number, position in places:
        assert spoiled[number].loss_mask[position]
        spoiled[number].rollout_logprobs[position] = LOGMU
    return spoiled


def mask(sequences: list[TrainSequence], places: list[tuple[int, int]]) -> list[TrainSequence]:
    """The same without a loss there."""
    masked = [replace(s, loss_mask=s.loss_mask.clone()) for s in sequences]
    for number, position in places:
        masked[number].loss_mask[position] = False
    return masked


def gradients(policy: Policy) -> list[torch.Tensor]:
    return [vars(parameter)["main_grad"].clone() for parameter in policy.chunks[0].parameters()]


def assert_same(found: tuple[Policy, UpdateResult], expected: tuple[Policy, UpdateResult]) -> None:
    (policy, result), (reference, plain) = found, expected
    assert result.loss == plain.loss
    assert result.grad_norm == plain.grad_norm
    assert torch.equal(result.diagnostics.sums, plain.diagnostics.sums)
    assert torch.equal(result.diagnostics.maxima, plain.diagnostics.maxima)
    for mine, theirs in zip(gradients(policy), gradients(reference), strict=True):
        assert torch.equal(mine, theirs)
    theirs_by_name = {name: tensor.clone() for name, tensor in reference.hf_tensors()}
    for name, tensor in policy.hf_tensors():
        assert torch.equal(tensor, theirs_by_name[name])


@pytest.mark.timeout(300)
def test_one_token_among_10_000(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    update: Update,
) -> None:
    config = policy_config("dense", max_tokens_per_micro_batch=1000)
    sequences = [
        replace(s, token_ids=s.token_ids[39:], prompt_length=1, loss_mask=torch.ones(80, dtype=torch.bool))
        for s in make_sequences([120] * 125)
    ]
    assert sum(int(s.loss_mask.sum()) for s in sequences) == 10_000
    places = [(61, 40)]
    policy, reference = build_policy(config), build_policy(config)
    result, plain = update(policy, spoil(sequences, places)), update(reference, mask(sequences, places))
    (fault,) = result.faulty
    assert (fault.replica, fault.sequence_id, fault.position, fault.rollout_logprob) == (0, 61, 40, LOGMU)
    assert -10 < fault.logprob < -1
    assert plain.faulty == []
    assert result.diagnostics.num_tokens == 9_999
    assert_same((policy, result), (reference, plain))


@pytest.mark.parametrize(
    ("name", "aggregation", "mode"),
    [
        *((name, Aggregation.sequence_mean_token_mean, LogprobMode.auto) for name in LOSSES),
        ("drpo", Aggregation.token_mean, LogprobMode.recompute),
        ("drpo", Aggregation.sequence_mean_token_sum, LogprobMode.auto),
    ],
)
def test_every_loss_leaves_them_out(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    update: Update,
    name: str,
    aggregation: Aggregation,
    mode: LogprobMode,
) -> None:
    """Several micro-batches; one sequence loses its only loss token and no longer counts as one."""
    config = policy_config("dense", max_tokens_per_micro_batch=32, logprob_mode=mode)
    config.algorithm = AlgorithmConfig(loss=LossConfig(name=name, num_topk=3), aggregation=aggregation)
    sequences = make_sequences([5, 17, 2, 9, 31, 3, 12])
    for sequence in sequences:
        shape = (len(sequence.loss_mask), 3)
        sequence.topk_ids = torch.tensor([5, 50, 100]).expand(shape)
        sequence.topk_logprobs = torch.full(shape, -5.0)
    places = [(1, 4), (2, 0), (4, 0), (4, 19)]
    assert len(sequences[2].loss_mask) == 1
    policy, reference = build_policy(config), build_policy(config)
    result = update(policy, spoil(sequences, places))
    assert [(fault.sequence_id, fault.position) for fault in result.faulty] == places
    assert_same((policy, result), (reference, update(reference, mask(sequences, places))))


def test_the_limit_is_on_pi_over_the_engines_mu(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]],
    update: Update,
) -> None:
    """Whatever the anchor; and not on the other side, where a ratio goes to 0 by itself."""
    config = policy_config("dense", max_tokens_per_micro_batch=100)
    config.algorithm.anchor = Anchor.recomputed
    sequences = make_sequences([17, 31])
    policy = build_policy(config)
    (micro_batches,) = policy.add_logprobs([pack_all(policy, spoil(sequences, [(1, 2)]))])
    result = policy.train_step(micro_batches, StepTimer())
    assert [(fault.sequence_id, fault.position) for fault in result.faulty] == [(1, 2)]
    config.algorithm.anchor = Anchor.rollout
    config.algorithm.correction.faulty_log_ratio = 28.0
    assert update(build_policy(config), spoil(sequences, [(1, 2)])).faulty == []
    config.algorithm.correction.faulty_log_ratio = 1.0
    sequences[0].rollout_logprobs[:] = sequences[1].rollout_logprobs[:] = -1e-3
    assert update(build_policy(config), sequences).faulty == []
