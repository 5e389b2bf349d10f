"""Packing loses nothing, shifts labels right, keeps the budget, and can be undone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.errors import DataError
from megatron_drpo.packing import (
    dummy_micro_batch,
    pack,
    pack_global_batch,
    plan_micro_batches,
    to_device,
    unpack,
)
from megatron_drpo.types import TrainSequence

lengths_and_budget = st.tuples(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 80))
shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), max_size=12)
"""(prompt tokens, response tokens) per sequence."""


def _sequences(pairs: list[tuple[int, int]]) -> tuple[list[TrainSequence], list[torch.Tensor]]:
    """Sequences whose every number differs, with ids that are not indices."""
    generator = torch.Generator().manual_seed(len(pairs))
    sequences: list[TrainSequence] = []
    weights: list[torch.Tensor] = []
    for index, (prompt_length, num_response) in enumerate(pairs):
        mask = torch.rand(num_response, generator=generator) < 0.7
        sequences.append(
            TrainSequence(
                id=100 + 7 * index,
                token_ids=torch.randint(1, 1000, (prompt_length + num_response,), generator=generator),
                prompt_length=prompt_length,
                advantages=torch.randn(num_response, generator=generator),
                rollout_logprobs=-torch.rand(num_response, generator=generator),
                loss_mask=mask,
            )
        )
        weights.append(torch.rand(num_response, generator=generator) * mask)
    return sequences, weights


@given(lengths_and_budget)
def test_plan_uses_every_sequence_once_within_the_budget(case: tuple[list[int], int]) -> None:
    lengths, max_tokens = case
    plan = plan_micro_batches(lengths, max_tokens)
    assert sorted(index for bin_ in plan for index in bin_) == list(range(len(lengths)))
    for bin_ in plan:
        assert bin_ == sorted(bin_)
        assert len(bin_) == 1 or sum(lengths[index] for index in bin_) <= max_tokens
    assert plan == sorted(plan)
    # First-fit-decreasing leaves at most one micro-batch half empty or less; evening out keeps the number.
    assert len(plan) <= 2 * sum(lengths) / max_tokens + 1


def test_plan_is_even() -> None:
    """First-fit-decreasing alone would give 60 + 20."""
    assert plan_micro_batches([20, 20, 20, 20], 60) == [[0, 2], [1, 3]]


def test_plan_falls_back_where_evening_out_breaks_the_budget() -> None:
    """Always filling the emptiest gives 6 + 3 and 4 + 4 + 3, which is over 10."""
    lengths = [6, 4, 4, 3, 3]
    plan = plan_micro_batches(lengths, 10)
    assert [sum(lengths[index] for index in bin_) for bin_ in plan] == [10, 10]


def test_a_sequence_over_the_budget_is_alone() -> None:
    assert plan_micro_batches([5, 50, 5], 10) == [[0, 2], [1]]


def test_packed_fields_by_hand() -> None:
    """Prompt 11 12, response 13 14; then prompt 21, response 22 23 24; padded from 8 to 10."""
    first = TrainSequence(
        id=5,
        token_ids=torch.tensor([11, 12, 13, 14]),
        prompt_length=2,
        advantages=torch.tensor([1.0, 2.0]),
        rollout_logprobs=torch.tensor([-0.1, -0.2]),
        loss_mask=torch.tensor([True, False]),
    )
    second = TrainSequence(
        id=3,
        token_ids=torch.tensor([21, 22, 23, 24]),
        prompt_length=1,
        advantages=torch.tensor([3.0, 4.0, 5.0]),
        rollout_logprobs=torch.tensor([-0.3, -0.4, -0.5]),
        loss_mask=torch.tensor([True, True, True]),
    )
    weights = [torch.tensor([0.5, 0.0]), torch.tensor([0.25, 0.125, 1.0])]
    batch = pack([first, second], weights, pad_to_multiple=5)
    assert batch.token_ids_T.tolist() == [11, 12, 13, 14, 21, 22, 23, 24, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert batch.labels_T.tolist() == [12, 13, 14, 0, 22, 23, 24, 0, 0, 0]
    assert batch.loss_mask_T.int().tolist() == [0, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(
        batch.rollout_logprobs_T, torch.tensor([0, -0.1, -0.2, 0, -0.3, -0.4, -0.5, 0, 0, 0])
    )
    assert batch.advantages_T.tolist() == [0, 1, 2, 0, 3, 4, 5, 0, 0, 0]
    assert batch.token_weights_T.tolist() == [0, 0.5, 0, 0, 0.25, 0.125, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 10]
    assert batch.cu_seqlens.dtype is torch.int32
    assert (batch.max_seqlen, batch.sequence_ids, batch.prompt_lengths) == (4, [5, 3], [2, 1])


def test_topk_is_where_the_prediction_is() -> None:
    """Prompts of 2 and 1, responses of 2 and 3: the rows of the response tokens, and zeros elsewhere."""
    sequences, weights = _sequences([(2, 2), (1, 3)])
    for number, sequence in enumerate(sequences):
        length = len(sequence) - sequence.prompt_length
        sequence.topk_ids = torch.arange(1, 2 * length + 1).view(length, 2) + 10 * number
        sequence.topk_logprobs = -sequence.topk_ids / 8
    batch = pack(sequences, weights, pad_to_multiple=5)
    assert batch.topk_ids_TK is not None
    assert batch.topk_logprobs_TK is not None
    zero = [0, 0]
    assert batch.topk_ids_TK.tolist() == [
        *(zero, [1, 2], [3, 4], zero),
        *([11, 12], [13, 14], [15, 16], zero),
        *(zero, zero),
    ]
    assert torch.equal(batch.topk_logprobs_TK, -batch.topk_ids_TK / 8)
    assert (batch.topk_ids_TK.dtype, batch.topk_logprobs_TK.dtype) == (torch.int64, torch.float32)
    one = unpack(batch.topk_ids_TK[:, 1], batch)[sequences[1].id]
    assert one.tolist() == [12, 14, 16]
    moved = to_device(batch, torch.device("meta"))
    assert moved.topk_ids_TK is not None
    assert moved.topk_ids_TK.device.type == "meta"


def test_no_topk_where_the_sequences_have_none() -> None:
    sequences, weights = _sequences([(2, 2), (1, 3)])
    assert pack(sequences, weights, pad_to_multiple=5).topk_ids_TK is None
    assert dummy_micro_batch(4).topk_logprobs_TK is None


def test_no_padding_sequence_when_none_is_needed() -> None:
    sequences, weights = _sequences([(1, 3), (2, 2)])
    assert pack(sequences, weights, pad_to_multiple=4).cu_seqlens.tolist() == [0, 4, 8]


@given(shapes, st.integers(1, 8), st.integers(5, 30))
def test_pack_conserves_tokens_and_unpack_undoes_it(
    pairs: list[tuple[int, int]], pad_to_multiple: int, max_tokens: int
) -> None:
    sequences, weights = _sequences(pairs)
    batches = pack_global_batch(
        sequences, weights, max_tokens=max_tokens, pad_to_multiple=pad_to_multiple, num_micro_batches=None
    )
    unpacked: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == batch.num_tokens
        assert all(start < stop for start, stop in itertools.pairwise(bounds))
        assert batch.num_tokens % pad_to_multiple == 0
        assert batch.max_seqlen == max(stop - start for start, stop in itertools.pairwise(bounds))
        fields = (batch.labels_T, batch.advantages_T, batch.rollout_logprobs_T, batch.loss_mask_T)
        parts = [unpack(field, batch) for field in (*fields, batch.token_weights_T)]
        for id_ in batch.sequence_ids:
            assert id_ not in unpacked
            unpacked[id_] = [part[id_] for part in parts]
    for sequence, weights_R in zip(sequences, weights, strict=True):
        response = sequence.token_ids[sequence.prompt_length :]
        expected = (response, sequence.advantages, sequence.rollout_logprobs, sequence.loss_mask, weights_R)
        for value, wanted in zip(unpacked.pop(sequence.id), expected, strict=True):
            assert torch.equal(value, wanted)
    assert not unpacked
    num_loss_tokens = sum(int(batch.loss_mask_T.sum()) for batch in batches)
    assert num_loss_tokens == sum(int(sequence.loss_mask.sum()) for sequence in sequences)


def test_dummies_fill_up_to_the_agreed_number() -> None:
    sequences, weights = _sequences([(2, 3), (2, 3), (2, 3)])
    batches = pack_global_batch(sequences, weights, max_tokens=10, pad_to_multiple=4, num_micro_batches=4)
    assert [batch.sequence_ids for batch in batches] == [[100, 114], [107], [], []]
    for dummy in batches[2:]:
        assert dummy.cu_seqlens.tolist() == [0, 4]
        assert not dummy.loss_mask_T.any()
        assert not dummy.token_weights_T.any()
    with pytest.raises(ValueError, match="num_micro_batches=1: the plan needs 2"):
        pack_global_batch(sequences, weights, max_tokens=10, pad_to_multiple=4, num_micro_batches=1)


def test_a_dummy_has_nothing_to_unpack() -> None:
    dummy = dummy_micro_batch(6)
    assert dummy.num_tokens == 6
    assert unpack(torch.arange(6), dummy) == {}


def test_a_sequence_without_a_prompt_is_refused() -> None:
    sequences, weights = _sequences([(1, 2)])
    sequences[0].prompt_length = 0
    sequences[0].token_ids = sequences[0].token_ids[1:]
    with pytest.raises(DataError, match="sequence 100: its prompt has no token"):
        pack(sequences, weights, pad_to_multiple=1)


def test_to_device_moves_every_tensor() -> None:
    sequences, weights = _sequences([(2, 3)])
    moved = to_device(pack(sequences, weights, pad_to_multiple=8), torch.device("meta"))
    tensors = [moved.token_ids_T, moved.position_ids_T, moved.labels_T, moved.loss_mask_T, moved.cu_seqlens]
    tensors += [moved.rollout_logprobs_T, moved.advantages_T, moved.token_weights_T]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.max_seqlen, moved.sequence_ids) == (5, [100])
