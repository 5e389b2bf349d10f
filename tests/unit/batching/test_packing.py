"""Packing loses nothing, shifts labels right, keeps the budget, and can be undone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.batching.packing import (
    dummy_micro_batch,
    pack,
    pack_global_batch,
    plan_micro_batches,
    to_device,
    unpack,
)
from megatron_drpo.errors import DataError
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
    assert batch.response_lengths == [2, 3]
    assert batch.sequence_index_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_sequences_padded_by_hand() -> None:
    """Prompt 11 12, response 13 14 15, padded from 5 to 8; prompt 21, response 22; all padded to 16."""
    first = TrainSequence(
        id=5,
        token_ids=torch.tensor([11, 12, 13, 14, 15]),
        prompt_length=2,
        advantages=torch.tensor([1.0, 2.0, 3.0]),
        rollout_logprobs=torch.tensor([-0.5, -0.25, -0.125]),
        loss_mask=torch.tensor([True, True, True]),
    )
    second = TrainSequence(
        id=3,
        token_ids=torch.tensor([21, 22]),
        prompt_length=1,
        advantages=torch.tensor([4.0]),
        rollout_logprobs=torch.tensor([-2.0]),
        loss_mask=torch.tensor([True]),
    )
    weights = [torch.tensor([0.5, 0.25, 1.0]), torch.tensor([2.0])]
    batch = pack([first, second], weights, pad_to_multiple=16, pad_sequences_to=4)
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.max_seqlen == 8
    assert batch.token_ids_T.tolist() == [11, 12, 13, 14, 15, 0, 0, 0, 21, 22, 0, 0, 0, 0, 0, 0]
    assert batch.position_ids_T.tolist() == [*range(8), *range(4), *range(4)]
    assert batch.labels_T.tolist() == [12, 13, 14, 15, 0, 0, 0, 0, 22, 0, 0, 0, 0, 0, 0, 0]
    assert batch.loss_mask_T.int().tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert batch.advantages_T.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    assert batch.token_weights_T.tolist() == [0, 0.5, 0.25, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    assert batch.sequence_index_T.tolist() == [0] * 8 + [1] * 4 + [2] * 4
    assert (batch.sequence_ids, batch.prompt_lengths, batch.response_lengths) == ([5, 3], [2, 1], [3, 1])
    unpacked = unpack(batch.labels_T, batch)
    assert {id_: values.tolist() for id_, values in unpacked.items()} == {5: [13, 14, 15], 3: [22]}


def test_the_plan_counts_padded_sequences() -> None:
    """Two sequences of 5 fit into 12, but not once each takes 8."""
    assert plan_micro_batches([5, 5], 12) == [[0, 1]]
    assert plan_micro_batches([5, 5], 12, pad_sequences_to=8) == [[0], [1]]
    assert plan_micro_batches([5, 5], 16, pad_sequences_to=8) == [[0, 1]]


def test_paddings_must_agree() -> None:
    with pytest.raises(ValueError, match="pad_to_multiple=6: must be a multiple of pad_sequences_to=4"):
        pack([], [], pad_to_multiple=6, pad_sequences_to=4)


def test_most_probable_ids_stand_where_their_token_is_predicted() -> None:
    sequences, weights = _sequences([(2, 2), (1, 1)])
    sequences[0].topk_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    sequences[0].topk_logprobs = torch.tensor([[-0.5, -1.0, -2.0], [-0.25, -3.0, -4.0]])
    sequences[1].topk_ids = torch.tensor([[7, 8, 9]])
    sequences[1].topk_logprobs = torch.tensor([[-0.125, -5.0, -6.0]])
    batches = pack_global_batch(
        sequences, weights, max_tokens=9, pad_to_multiple=7, num_topk=3, num_micro_batches=2
    )
    ids, logprobs = batches[0].topk_ids_TK, batches[0].topk_logprobs_TK
    assert ids is not None
    assert logprobs is not None
    none = [0, 0, 0]
    assert ids.tolist() == [none, [1, 2, 3], [4, 5, 6], none, [7, 8, 9], none, none]
    assert logprobs[1].tolist() == [-0.5, -1.0, -2.0]
    assert logprobs[4].tolist() == [-0.125, -5.0, -6.0]
    assert logprobs.abs().sum(1).count_nonzero() == 3
    dummy_ids, dummy_logprobs = batches[1].topk_ids_TK, batches[1].topk_logprobs_TK
    assert dummy_ids is not None
    assert dummy_logprobs is not None
    assert dummy_ids.tolist() == [none] * 7
    assert dummy_logprobs.tolist() == [none] * 7
    assert pack(sequences, weights, pad_to_multiple=1).topk_ids_TK is None


def test_missing_most_probable_ids_are_refused() -> None:
    sequences, weights = _sequences([(2, 2)])
    with pytest.raises(DataError, match="sequence 100: topk_ids has the shape None, but the loss asks for 3"):
        pack(sequences, weights, pad_to_multiple=1, num_topk=3)
    sequences[0].topk_ids = torch.zeros(2, 3, dtype=torch.int64)
    sequences[0].topk_logprobs = torch.zeros(2, 2)
    with pytest.raises(DataError, match=r"topk_logprobs has the shape \(2, 2\), .* at each of 2 response"):
        pack(sequences, weights, pad_to_multiple=1, num_topk=3)


def test_no_padding_sequence_when_none_is_needed() -> None:
    sequences, weights = _sequences([(1, 3), (2, 2)])
    assert pack(sequences, weights, pad_to_multiple=4).cu_seqlens.tolist() == [0, 4, 8]


@given(shapes, st.integers(1, 8), st.sampled_from([1, 2, 4, 8]), st.integers(5, 30))
def test_pack_conserves_tokens_and_unpack_undoes_it(
    pairs: list[tuple[int, int]], multiple: int, pad_sequences_to: int, max_tokens: int
) -> None:
    sequences, weights = _sequences(pairs)
    pad_to_multiple = multiple * pad_sequences_to
    batches = pack_global_batch(
        sequences,
        weights,
        max_tokens=max_tokens,
        pad_to_multiple=pad_to_multiple,
        pad_sequences_to=pad_sequences_to,
        num_micro_batches=None,
    )
    unpacked: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == batch.num_tokens
        assert all(start < stop for start, stop in itertools.pairwise(bounds))
        assert batch.num_tokens % pad_to_multiple == 0
        assert all(bound % pad_sequences_to == 0 for bound in bounds)
        num_padded = bounds[len(batch.sequence_ids)]
        assert num_padded <= max_tokens or len(batch.sequence_ids) == 1
        assert batch.max_seqlen == max(stop - start for start, stop in itertools.pairwise(bounds))
        fields = (batch.labels_T, batch.advantages_T, batch.rollout_logprobs_T, batch.loss_mask_T)
        parts = [unpack(field, batch) for field in (*fields, batch.token_weights_T)]
        for id_ in batch.sequence_ids:
            assert id_ not in unpacked
            unpacked[id_] = [part[id_] for part in parts]
    token_ids = sum(int(batch.token_ids_T.sum()) for batch in batches)
    assert token_ids == sum(int(sequence.token_ids.sum()) for sequence in sequences)
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


def test_to_device_finds_the_rows_that_have_a_loss() -> None:
    sequences, weights = _sequences([(2, 3), (4, 2)])
    sequences[0].loss_mask = torch.tensor([True, False, True])
    sequences[1].loss_mask = torch.tensor([True, True])
    moved = to_device(pack(sequences, weights, pad_to_multiple=8), torch.device("cpu"))
    assert moved.loss_rows_N is not None
    assert moved.loss_rows_N.tolist() == [1, 3, 8, 9]


def test_to_device_moves_every_tensor() -> None:
    sequences, weights = _sequences([(2, 3)])
    moved = to_device(pack(sequences, weights, pad_to_multiple=8), torch.device("meta"))
    tensors = [moved.token_ids_T, moved.position_ids_T, moved.labels_T, moved.loss_mask_T, moved.cu_seqlens]
    tensors += [moved.rollout_logprobs_T, moved.advantages_T, moved.token_weights_T]
    assert moved.loss_rows_N is not None
    tensors.append(moved.loss_rows_N)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.max_seqlen, moved.sequence_ids) == (5, [100])
