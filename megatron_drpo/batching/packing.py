"""Sequences -> packed micro-batches under a token budget; values per position -> values per response.

Pure functions. Response token j of a sequence that starts at packed position s is predicted at position
s + prompt_length - 1 + j: whatever belongs to a response token is stored there ("the label shift").

Under context parallelism the tail of every sequence is padded with tokens that have no loss; causal
attention keeps them from changing anything.

    R  sampled response tokens of a sequence (" _" in annotations: each sequence has its own)
    L  tokens of a sequence                      K  most probable ids per response token
    T  packed tokens of one micro-batch          S  packed sequences of one micro-batch
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from megatron_drpo.errors import DataError
from megatron_drpo.types import MicroBatch, TrainSequence


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, pad_sequences_to: int = 1) -> list[list[int]]:
    """Split sequences into few micro-batches of about equal size and at most `max_tokens` tokens each.

    First-fit-decreasing gives their number; filling that many, longest sequence first and always the
    emptiest, evens them out. Where that breaks the budget, first-fit-decreasing's own plan stands. A
    sequence longer than the budget gets a micro-batch of its own. The plan depends on the arguments only.

    Args:
        lengths: tokens of each sequence, each at least 1.
        max_tokens: the budget: padded sequences count, the padding of the whole micro-batch does not.
        pad_sequences_to: see `pack`.

    Returns:
        Indices into `lengths`, ascending within a micro-batch; micro-batches ordered by their first index.
    """
    lengths = [_round_up(length, pad_sequences_to) for length in lengths]
    if lengths and sum(lengths) <= max_tokens:  # planning takes milliseconds
        return [list(range(len(lengths)))]
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    plan = _fill_first_fit(longest_first, lengths, max_tokens)
    even_plan = _fill_emptiest(longest_first, lengths, len(plan))
    if all(len(bin_) == 1 or sum(lengths[index] for index in bin_) <= max_tokens for bin_ in even_plan):
        plan = even_plan
    return sorted(sorted(bin_) for bin_ in plan)


def _fill_first_fit(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in order:
        length = lengths[index]
        number = next((n for n, load in enumerate(loads) if load + length <= max_tokens), len(bins))
        if number == len(bins):
            bins.append([])
            loads.append(0)
        bins[number].append(index)
        loads[number] += length
    return bins


def _fill_emptiest(order: list[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]  # a heap
    for index in order:
        load, number = loads[0]
        bins[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return bins


def pack(
    sequences: Sequence[TrainSequence],
    token_weights: Sequence[Float[Tensor, " _"]],
    *,
    pad_to_multiple: int,
    pad_sequences_to: int = 1,
    num_topk: int = 0,
) -> MicroBatch:
    """Lay sequences end to end and pad them with one sequence of zeros that has no loss.

    Args:
        sequences: in packed order; may be empty.
        token_weights: float32 [R] per sequence, see `losses.aggregation`.
        pad_to_multiple: T becomes a multiple of it, and at least 1 times it.
        pad_sequences_to: each sequence takes a multiple of this many tokens; divides pad_to_multiple.
        num_topk: K, where the loss asks for the most probable ids; 0: no such fields.

    Raises:
        DataError: a sequence without a prompt, whose first token nothing predicts, or without top-k ids.
        ValueError: pad_to_multiple is not a multiple of pad_sequences_to.
    """
    for sequence in sequences:
        _check_sequence(sequence, num_topk)
    layout = _lay_out(sequences, pad_to_multiple, pad_sequences_to)
    num_tokens = len(layout.position_ids_T)

    # One scatter per field, not one per sequence and field: there are thousands of short sequences in a step.
    def of_tokens(dtype: torch.dtype, parts: list[Tensor]) -> Tensor:
        values_T = torch.zeros(num_tokens, dtype=dtype)
        values_T[layout.is_token_T] = torch.cat([torch.zeros(0, dtype=dtype), *parts])
        return values_T

    def of_responses(dtype: torch.dtype, parts: Sequence[Tensor | None], *shape: int) -> Tensor:
        values_T = torch.zeros(num_tokens, *shape, dtype=dtype)
        present = [part for part in parts if part is not None]
        values_T[layout.predicts_response_T] = torch.cat([torch.zeros(0, *shape, dtype=dtype), *present])
        return values_T

    token_ids_T = of_tokens(torch.int64, [s.token_ids for s in sequences])
    optional: dict[str, Tensor] = _pack_routes(sequences, layout)
    if num_topk:
        optional["topk_ids_TK"] = of_responses(torch.int64, [s.topk_ids for s in sequences], num_topk)
        logprobs = [s.topk_logprobs for s in sequences]
        optional["topk_logprobs_TK"] = of_responses(torch.float32, logprobs, num_topk)
    return MicroBatch(
        token_ids_T=token_ids_T,
        position_ids_T=layout.position_ids_T,
        labels_T=token_ids_T.roll(-1).masked_fill(~layout.predicts_T, 0),
        loss_mask_T=of_responses(torch.bool, [s.loss_mask for s in sequences]),
        rollout_logprobs_T=of_responses(torch.float32, [s.rollout_logprobs for s in sequences]),
        advantages_T=of_responses(torch.float32, [s.advantages for s in sequences]),
        token_weights_T=of_responses(torch.float32, token_weights),
        sequence_index_T=layout.sequence_index_T,
        cu_seqlens=layout.cu_seqlens,
        max_seqlen=int(layout.cu_seqlens.diff().max()),
        sequence_ids=[s.id for s in sequences],
        prompt_lengths=[s.prompt_length for s in sequences],
        response_lengths=[len(s) - s.prompt_length for s in sequences],
        **optional,
    )


def _pack_routes(sequences: Sequence[TrainSequence], layout: _Layout) -> dict[str, Tensor]:
    """`routes_TMK` and `has_routes_T`, zeros where there are none; nothing if no sequence has routes."""
    num_tokens = len(layout.position_ids_T)
    present = next((s.routes for s in sequences if s.routes is not None), None)
    if present is None:
        return {}
    routes_TMK = present.new_zeros(num_tokens, *present.shape[1:])
    has_routes_T = torch.zeros(num_tokens, dtype=torch.bool)
    for start, sequence in zip(layout.cu_seqlens.tolist(), sequences, strict=False):
        if sequence.routes is not None:
            part = slice(start, start + len(sequence.routes))
            routes_TMK[part] = sequence.routes
            has_routes_T[part] = True
    return {"routes_TMK": routes_TMK, "has_routes_T": has_routes_T}


def _check_sequence(sequence: TrainSequence, num_topk: int) -> None:
    if sequence.prompt_length < 1:
        raise DataError(f"sequence {sequence.id}: its prompt has no token, so nothing predicts its response")
    if num_topk:
        for name in ("topk_ids", "topk_logprobs"):
            values = getattr(sequence, name)
            found = None if values is None else tuple(values.shape)
            if found != (len(sequence) - sequence.prompt_length, num_topk):
                raise DataError(
                    f"sequence {sequence.id}: {name} has the shape {found}, but the loss asks for "
                    f"{num_topk} ids at each of {len(sequence) - sequence.prompt_length} response tokens"
                )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the sequences of a micro-batch lie; the last one may be padding only."""

    cu_seqlens: Tensor
    sequence_index_T: Tensor
    position_ids_T: Tensor
    is_token_T: Tensor
    """False: padding."""
    predicts_T: Tensor
    """The next position holds a token of the same sequence."""
    predicts_response_T: Tensor
    """That token is a response token."""


def _lay_out(sequences: Sequence[TrainSequence], pad_to_multiple: int, pad_sequences_to: int) -> _Layout:
    if pad_to_multiple % pad_sequences_to:
        raise ValueError(
            f"pad_to_multiple={pad_to_multiple}: must be a multiple of pad_sequences_to={pad_sequences_to}"
        )
    lengths = [len(sequence) for sequence in sequences]
    prompts = [sequence.prompt_length for sequence in sequences]
    extents = [_round_up(length, pad_sequences_to) for length in lengths]
    num_tokens = _round_up(max(1, sum(extents)), pad_to_multiple)
    if num_tokens > sum(extents):
        extents.append(num_tokens - sum(extents))
        lengths.append(0)
        prompts.append(1)
    cu_seqlens = torch.tensor([0, *extents]).cumsum(0)
    sequence_index_T = torch.arange(len(extents)).repeat_interleave(torch.tensor(extents))
    position_ids_T = torch.arange(num_tokens) - cu_seqlens[sequence_index_T]
    length_T = torch.tensor(lengths)[sequence_index_T]
    predicts_T = position_ids_T < length_T - 1
    return _Layout(
        cu_seqlens=cu_seqlens.to(torch.int32),
        sequence_index_T=sequence_index_T,
        position_ids_T=position_ids_T,
        is_token_T=position_ids_T < length_T,
        predicts_T=predicts_T,
        predicts_response_T=predicts_T & (position_ids_T >= torch.tensor(prompts)[sequence_index_T] - 1),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def dummy_micro_batch(pad_to_multiple: int, num_topk: int = 0) -> MicroBatch:
    """`pad_to_multiple` padding tokens without loss: keeps the number of micro-batches equal on all ranks."""
    return pack([], [], pad_to_multiple=pad_to_multiple, num_topk=num_topk)


def pack_global_batch(
    sequences: Sequence[TrainSequence],
    token_weights: Sequence[Float[Tensor, " _"]],
    *,
    max_tokens: int,
    pad_to_multiple: int,
    pad_sequences_to: int = 1,
    num_topk: int = 0,
    num_micro_batches: int | None,
) -> list[MicroBatch]:
    """Plan and pack this rank's share of a global batch.

    Args:
        sequences: this data-parallel rank's share.
        token_weights: float32 [R] per sequence.
        max_tokens: token budget of a micro-batch, see `plan_micro_batches`.
        pad_to_multiple, pad_sequences_to, num_topk: see `pack`.
        num_micro_batches: fill up with dummies to this number, which must be equal on all data-parallel
            ranks: the largest `len(plan_micro_batches(...))` among them, rounded up as the schedule wants.
            None: no filling.

    Raises:
        ValueError: the plan needs more than num_micro_batches.
    """
    plan = plan_micro_batches([len(sequence) for sequence in sequences], max_tokens, pad_sequences_to)
    micro_batches = [
        pack(
            [sequences[i] for i in bin_],
            [token_weights[i] for i in bin_],
            pad_to_multiple=pad_to_multiple,
            pad_sequences_to=pad_sequences_to,
            num_topk=num_topk,
        )
        for bin_ in plan
    ]
    if num_micro_batches is None:
        return micro_batches
    num_missing = num_micro_batches - len(plan)
    if num_missing < 0:
        raise ValueError(f"num_micro_batches={num_micro_batches}: the plan needs {len(plan)}")
    return micro_batches + [dummy_micro_batch(pad_to_multiple, num_topk) for _ in range(num_missing)]


def unpack(values_T: Shaped[Tensor, " T"], micro_batch: MicroBatch) -> dict[int, Shaped[Tensor, " _"]]:
    """Values per packed position -> sequence id -> values per response token; the inverse of `pack`.

    Under context parallelism `values_T` are all ranks' values, see `context_parallel.merge_context_parallel`.
    """
    responses = _response_slices(micro_batch)
    return {id_: values_T[part] for id_, part in zip(micro_batch.sequence_ids, responses, strict=True)}


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with every tensor on `device`, and its `loss_rows_N`.

    Their number decides the sizes of what is computed, and the host knows it here without waiting for a GPU.
    """
    micro_batch = dataclasses.replace(micro_batch, loss_rows_N=micro_batch.loss_mask_T.nonzero()[:, 0])
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(micro_batch):
        value = getattr(micro_batch, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
    return dataclasses.replace(micro_batch, **moved)


def _response_slices(micro_batch: MicroBatch) -> Iterator[slice]:
    """For each real sequence, the positions that predict its response tokens."""
    starts = micro_batch.cu_seqlens.tolist()
    lengths = zip(micro_batch.prompt_lengths, micro_batch.response_lengths, strict=True)
    for start, (prompt_length, response_length) in zip(starts, lengths, strict=False):
        first = start + prompt_length - 1
        yield slice(first, first + response_length)
