"""Zigzag parts by hand and by a slow definition; splitting loses nothing and can be undone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.batching.context_parallel import (
    local_positions,
    merge_context_parallel,
    sequence_order,
    split_context_parallel,
)
from megatron_drpo.batching.packing import pack, unpack
from megatron_drpo.types import MicroBatch, TrainSequence

PER_TOKEN = [
    "token_ids_T",
    "position_ids_T",
    "labels_T",
    "loss_mask_T",
    "rollout_logprobs_T",
    "advantages_T",
    "token_weights_T",
    "sequence_index_T",
    "topk_ids_TK",
    "topk_logprobs_TK",
    "old_logprobs_T",
    "ref_logprobs_T",
]
sizes_and_parts = st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=6))
"""Ranks, and the length of one part of each sequence."""


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([4], 1, [[0, 1, 2, 3]]),
        ([4, 8], 2, [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]),
        ([8], 4, [[0, 7], [1, 6], [2, 5], [3, 4]]),
        (
            [8, 0, 16],
            4,
            [
                [0, 7, 8, 9, 22, 23],
                [1, 6, 10, 11, 20, 21],
                [2, 5, 12, 13, 18, 19],
                [3, 4, 14, 15, 16, 17],
            ],
        ),
    ],
)
def test_parts_by_hand(lengths: list[int], size: int, expected: list[list[int]]) -> None:
    found = [local_positions(bounds_of(lengths), rank, size) for rank in range(size)]
    assert [positions.tolist() for positions in found] == expected
    assert {positions.dtype for positions in found} == {torch.int64}


@given(sizes_and_parts)
def test_parts_by_definition(case: tuple[int, list[int]]) -> None:
    """Every sequence cut into 2C chunks; rank r has chunks r and 2C - 1 - r."""
    size, parts = case
    cu_seqlens = bounds_of([2 * size * part for part in parts])
    for rank in range(size):
        expected: list[Tensor] = []
        for start, stop in pairwise(cu_seqlens.tolist()):
            chunks = torch.arange(start, stop).tensor_split(2 * size)
            expected += [chunks[rank], chunks[2 * size - 1 - rank]]
        assert torch.equal(local_positions(cu_seqlens, rank, size), torch.cat(expected))


@given(sizes_and_parts)
def test_merging_undoes_the_split(case: tuple[int, list[int]]) -> None:
    size, parts = case
    cu_seqlens = bounds_of([2 * size * part for part in parts])
    values_TK = torch.rand(int(cu_seqlens[-1]), 3)
    pieces = [values_TK[local_positions(cu_seqlens, rank, size)] for rank in range(size)]
    assert torch.equal(merge_context_parallel(pieces, cu_seqlens), values_TK)
    assert torch.equal(torch.cat(pieces)[sequence_order(cu_seqlens, size)], values_TK)


def test_lengths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \[4, 6\] of packed sequences: each .* multiple of 4"):
        local_positions(bounds_of([4, 6]), 0, 2)


@pytest.fixture
def micro_batch(make_sequences: Callable[..., list[TrainSequence]]) -> MicroBatch:
    """Sequences of 5, 8 and 3 tokens, padded to multiples of 8; every optional field is there."""
    sequences = make_sequences([5, 8, 3])
    generator = torch.Generator().manual_seed(0)
    for sequence in sequences:
        shape = (len(sequence.advantages), 2)
        sequence.topk_ids = torch.randint(1, 101, shape, generator=generator)
        sequence.topk_logprobs = -torch.rand(shape, generator=generator)
    weights = [torch.rand(len(s.advantages), generator=generator) for s in sequences]
    batch = pack(sequences, weights, pad_to_multiple=32, pad_sequences_to=8, num_topk=2)
    batch.old_logprobs_T = -torch.rand(batch.num_tokens, generator=generator)
    batch.ref_logprobs_T = -torch.rand(batch.num_tokens, generator=generator)
    return batch


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_micro_batch_merges_into_itself(micro_batch: MicroBatch, size: int) -> None:
    """Every field per token is cut, every other one left as it is."""
    pieces = [split_context_parallel(micro_batch, rank, size) for rank in range(size)]
    for field in dataclasses.fields(MicroBatch):
        whole = getattr(micro_batch, field.name)
        local = [getattr(piece, field.name) for piece in pieces]
        if field.name in PER_TOKEN:
            assert {len(value) for value in local} == {32 // size}
            assert torch.equal(merge_context_parallel(local, micro_batch.cu_seqlens), whole)
        else:
            assert all(value is whole for value in local)
    assert [name for name in PER_TOKEN if not hasattr(micro_batch, name)] == []


def test_labels_are_those_of_the_whole_sequence(micro_batch: MicroBatch) -> None:
    """The last token of a part predicts a token that another rank may hold."""
    piece = split_context_parallel(micro_batch, 0, 2)
    positions = local_positions(micro_batch.cu_seqlens, 0, 2)
    assert positions[:4].tolist() == [0, 1, 6, 7]
    assert piece.labels_T[1] == micro_batch.token_ids_T[2]


def test_merged_values_unpack_into_responses(micro_batch: MicroBatch) -> None:
    pieces = [split_context_parallel(micro_batch, rank, 2) for rank in range(2)]
    merged = merge_context_parallel([piece.labels_T for piece in pieces], micro_batch.cu_seqlens)
    bounds = micro_batch.cu_seqlens.tolist()
    found = unpack(merged, pieces[1])
    for id_, start, prompt, length in zip(range(3), bounds, (1, 2, 1), (5, 8, 3), strict=False):
        response = micro_batch.token_ids_T[start + prompt : start + length]
        assert torch.equal(found[id_], response)


def test_one_rank_keeps_the_micro_batch(micro_batch: MicroBatch) -> None:
    assert split_context_parallel(micro_batch, 0, 1) is micro_batch
    assert merge_context_parallel([micro_batch.labels_T], micro_batch.cu_seqlens) is micro_batch.labels_T
