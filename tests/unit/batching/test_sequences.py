"""What becomes of a rollout, and every way in which one can be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_drpo.batching.sequences import build_sequences
from megatron_drpo.config.schema import Aggregation
from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.losses.aggregation import compute_token_weights, count_loss
from megatron_drpo.types import FinishReason, Prompt, Rollout, TrainSequence

NUM_TOPK = 3
VOCAB_SIZE = 50


def make_rollout(number: int, length: int) -> Rollout:
    """Of prompt 10 * number, which has number + 1 tokens."""
    return Rollout(
        prompt=Prompt(id=10 * number, text="", token_ids=tuple(range(1, number + 2))),
        sample_index=number % 2,
        response_ids=[20 + p for p in range(length)],
        rollout_logprobs=[-0.25 * (p + 1) for p in range(length)],
        policy_versions=[0] * length,
        finish_reason=FinishReason.stop,
        text="",
        topk_ids=[[20 + p, 1, 2] for p in range(length)],
        topk_logprobs=[[math.log(0.5), math.log(0.25), math.log(0.2) - p] for p in range(length)],
    )


def make_rollouts() -> list[Rollout]:
    return [make_rollout(0, 2), make_rollout(1, 3), make_rollout(2, 1)]


def build(rollouts: list[Rollout], num_topk: int = NUM_TOPK) -> list[TrainSequence]:
    advantages = torch.arange(len(rollouts)) - 0.5
    return build_sequences(
        rollouts, advantages, [False] * len(rollouts), vocab_size=VOCAB_SIZE, num_topk=num_topk
    )


def test_values_by_hand() -> None:
    _, sequence, _ = build(make_rollouts())
    assert sequence.id == 1
    assert sequence.prompt_length == 2
    assert sequence.token_ids.tolist() == [1, 2, 20, 21, 22]
    assert sequence.advantages.tolist() == [0.5, 0.5, 0.5]
    assert sequence.rollout_logprobs.tolist() == [-0.25, -0.5, -0.75]
    assert sequence.loss_mask.tolist() == [True, True, True]
    assert sequence.topk_ids is not None
    assert sequence.topk_logprobs is not None
    assert sequence.topk_ids.tolist() == [[20, 1, 2], [21, 1, 2], [22, 1, 2]]
    expected = torch.tensor([[0.5, 0.25, 0.2 * math.exp(-p)] for p in range(3)], dtype=torch.float64).log()
    torch.testing.assert_close(sequence.topk_logprobs.double(), expected, atol=1e-6, rtol=0)
    assert sequence.topk_ids.dtype is torch.int64
    assert sequence.rollout_logprobs.dtype is sequence.topk_logprobs.dtype is torch.float32


def test_a_sequence_knows_who_sampled_each_token() -> None:
    rollout = replace(make_rollout(1, 5), servers=[("http://a", 2), ("http://b", 3)])
    (sequence,) = build([rollout])
    assert sequence.origin is not None
    assert sequence.origin.where == "prompt 10 (line 11), sample 1"
    found = [sequence.origin.server_of(position) for position in range(6)]
    assert found == ["http://a"] * 2 + ["http://b"] * 3 + ["an unknown server"]


def test_a_loss_without_topk_gets_none() -> None:
    """Also where the engine reported it."""
    for sequence in build(make_rollouts(), num_topk=0):
        assert sequence.topk_ids is None
        assert sequence.topk_logprobs is None


def test_a_left_out_rollout_keeps_its_tokens() -> None:
    rollouts = [make_rollout(1, 2), make_rollout(2, 3)]
    kept, sequence = build_sequences(rollouts, torch.tensor([0.5, 1.5]), [False, True], vocab_size=50)
    assert kept.loss_mask.all()
    assert kept.advantages.tolist() == [0.5] * 2
    assert sequence.id == 1
    assert len(sequence) == 3 + 3
    assert not sequence.loss_mask.any()
    assert sequence.advantages.tolist() == [1.5] * 3


@pytest.mark.parametrize("aggregation", Aggregation)
def test_a_left_out_rollout_counts_nowhere(aggregation: Aggregation) -> None:
    """The others' weights are those of a batch without it, and its own are 0."""

    def weights(rollouts: list[Rollout], left_out: list[bool]) -> tuple[list[list[float]], tuple[int, int]]:
        sequences = build_sequences(rollouts, torch.ones(len(rollouts)), left_out, vocab_size=50)
        counts = count_loss(sequences)
        computed = compute_token_weights(
            sequences, aggregation, num_loss_tokens=counts[0], num_sequences=counts[1], horizon_tokens=8
        )
        return [weight_R.tolist() for weight_R in computed], counts

    with_it, counts = weights(make_rollouts(), [False, True, False])
    without, counts_without = weights([make_rollout(0, 2), make_rollout(2, 1)], [False, False])
    assert counts == counts_without == (3, 2)
    assert with_it == [without[0], [0.0, 0.0, 0.0], without[1]]


def test_an_empty_response_becomes_no_sequence() -> None:
    """The others keep their ids and values; nothing else changes."""
    rollouts = [make_rollout(0, 2), make_rollout(1, 0), make_rollout(2, 0), make_rollout(3, 1)]
    sequences = build(rollouts)
    assert [sequence.id for sequence in sequences] == [0, 3]
    assert [sequence.advantages.tolist() for sequence in sequences] == [[-0.5, -0.5], [2.5]]
    assert sequences[1].token_ids.tolist() == [1, 2, 3, 4, 20]
    assert sequences[1].topk_ids is not None
    assert sequences[1].topk_ids.tolist() == [[20, 1, 2]]
    assert build([make_rollout(0, 0)]) == []
    assert build([]) == []


Damage = Callable[[Rollout], object]


def put(field: str, position: int, value: object) -> Damage:
    return lambda rollout: getattr(rollout, field).__setitem__(position, value)


def log(*probs: float) -> list[float]:
    return [math.log(prob) for prob in probs]


BAD: list[tuple[Damage, str]] = [
    (put("rollout_logprobs", 2, math.nan), ", response token 2: its logprob is nan"),
    (put("rollout_logprobs", 0, math.inf), ", response token 0: its logprob is inf"),
    (put("rollout_logprobs", 1, -math.inf), ", response token 1: its logprob is -inf"),
    (put("rollout_logprobs", 1, 0.002), ", response token 1: its logprob is 0.002"),
    (put("response_ids", 2, 50), ", response token 2: the id 50 is not in 0..49"),
    (put("response_ids", 0, -1), ", response token 0: the id -1 is not in 0..49"),
    (
        lambda rollout: rollout.rollout_logprobs.pop(),
        ": lengths disagree: 3 response_ids, 2 rollout_logprobs, 3 policy_versions, 3 topk_ids",
    ),
    (lambda rollout: rollout.policy_versions.append(0), ": lengths disagree: 3 response_ids"),
    (lambda rollout: rollout.response_ids.append(1), ": lengths disagree: 4 response_ids"),
    (
        lambda rollout: setattr(rollout, "topk_ids", None),
        ": lengths disagree: .* 0 topk_ids, 3 topk_logprobs",
    ),
    (put("topk_ids", 1, [20, 1]), ", response token 1: topk_ids has 2 entries, the loss needs 3"),
    (put("topk_logprobs", 2, log(0.5)), ", response token 2: topk_logprobs has 1 entries, the loss needs 3"),
    (
        put("topk_ids", 1, [20, 1, 50]),
        r", response token 1: its top-k ids \[20, 1, 50\] are not all in 0..49",
    ),
    (put("topk_ids", 0, [-1, 1, 2]), r", response token 0: its top-k ids \[-1, 1, 2\] are not all in"),
    (put("topk_ids", 2, [7, 1, 7]), r", response token 2: its top-k ids \[7, 1, 7\] are not distinct"),
    (put("topk_logprobs", 1, [math.nan, -2, -3]), r", response token 1: its top-k logprobs are \[nan, -2.0"),
    (put("topk_logprobs", 1, [-1, -2, -math.inf]), ", response token 1: its top-k logprobs are .*-inf"),
    (put("topk_logprobs", 0, [0.1, -9, -9]), ", response token 0: its top-k logprobs are"),
    (
        put("topk_logprobs", 2, log(0.6, 0.3, 0.102)),
        ", response token 2: its top-k probabilities add up to 1.002",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_a_bad_rollout_is_refused_by_name(damage: Damage, message: str) -> None:
    """The second of three, after an empty one, so that positions must be told apart."""
    rollouts = [make_rollout(0, 0), *make_rollouts()]
    damage(rollouts[2])
    with pytest.raises(DataError, match=rf"^sequence 2, prompt 10 \(line 11\), sample 1{message}"):
        build(rollouts)


def test_rounding_is_no_error() -> None:
    rollouts = make_rollouts()
    rollouts[1].rollout_logprobs[0] = 0.0009
    assert rollouts[1].topk_logprobs is not None
    rollouts[1].topk_logprobs[0] = log(0.6, 0.3, 0.1009)
    build(rollouts)


@pytest.mark.parametrize("advantage", [math.nan, math.inf, -math.inf])
def test_an_advantage_that_is_no_number_is_refused(advantage: float) -> None:
    advantages = torch.tensor([0.0, advantage, 0.0])
    with pytest.raises(
        RewardError, match=rf"^sequence 1, prompt 10 \(line 11\), sample 1: .* is {advantage}"
    ):
        build_sequences(make_rollouts(), advantages, [False] * 3, vocab_size=50)


def test_rollouts_are_not_changed() -> None:
    rollouts = make_rollouts()
    before = [replace(rollout, response_ids=[*rollout.response_ids]) for rollout in rollouts]
    for sequence in build(rollouts):
        sequence.token_ids += 1
    assert rollouts == before
