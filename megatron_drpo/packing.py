"""Sequences -> packed micro-batches under a token budget; values per position -> values per response.

Pure functions. Response token j of a sequence that starts at packed position s is predicted at position
s + prompt_length - 1 + j: whatever belongs to a response token is stored there ("the label shift").

    R  sampled response tokens of a sequence (" _" in annotations: each sequence has its own)
    L  tokens of a sequence
    T  packed tokens of one micro-batch          S  packed sequences of one micro-batch
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from megatron_drpo.errors import DataError
from megatron_drpo.types import MicroBatch, TrainSequence


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequences into few micro-batches of about equal size and at most `max_tokens` tokens each.

    First-fit-decreasing gives their number; filling that many, longest sequence first and always the
    emptiest, evens them out. Where that breaks the budget, first-fit-decreasing's own plan stands. A
    sequence longer than the budget gets a micro-batch of its own. The plan depends on the arguments only.

    Args:
        lengths: tokens of each sequence, each at least 1.
        max_tokens: the budget, before padding.

    Returns:
        Indices into `lengths`, ascending within a micro-batch; micro-batches ordered by their first index.
    """
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
) -> MicroBatch:
    """Lay sequences end to end and pad them with one sequence of zeros that has no loss.

    Args:
        sequences: in packed order; may be empty.
        token_weights: float32 [R] per sequence, see `losses.aggregation`.
        pad_to_multiple: T becomes a multiple of it, and at least 1 times it.

    Raises:
        DataError: a sequence without a prompt, whose first token nothing predicts.
    """
    for sequence in sequences:
        if sequence.prompt_length < 1:
            raise DataError(
                f"sequence {sequence.id}: its prompt has no token, so nothing predicts its response"
            )
    lengths = [len(sequence) for sequence in sequences]
    num_tokens = sum(lengths)
    num_padded = max(1, -(-num_tokens // pad_to_multiple)) * pad_to_multiple
    num_padding = num_padded - num_tokens
    prompt_lengths = [sequence.prompt_length for sequence in sequences]
    if num_padding:
        lengths.append(num_padding)
    # One gather per field, not one per sequence and field: there are thousands of short sequences in a step.
    lengths_S = torch.tensor(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    position_ids_T = torch.arange(num_padded) - cu_seqlens[:-1].repeat_interleave(lengths_S)
    # The padding sequence has a prompt only.
    first_T = torch.tensor([*prompt_lengths, num_padding][: len(lengths)]).repeat_interleave(lengths_S)
    is_last_T = position_ids_T == lengths_S.repeat_interleave(lengths_S) - 1
    predicts_response_T = (position_ids_T >= first_T - 1) & ~is_last_T

    def of_tokens(dtype: torch.dtype, parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=dtype), *parts, torch.zeros(num_padding, dtype=dtype)])

    def of_responses(dtype: torch.dtype, parts: list[Tensor]) -> Tensor:
        values_T = torch.zeros(num_padded, dtype=dtype)
        values_T[predicts_response_T] = torch.cat([torch.zeros(0, dtype=dtype), *parts])
        return values_T

    token_ids_T = of_tokens(torch.int64, [sequence.token_ids for sequence in sequences])
    return MicroBatch(
        token_ids_T=token_ids_T,
        position_ids_T=position_ids_T,
        labels_T=token_ids_T.roll(-1).masked_fill(is_last_T, 0),
        loss_mask_T=of_responses(torch.bool, [sequence.loss_mask for sequence in sequences]),
        rollout_logprobs_T=of_responses(torch.float32, [sequence.rollout_logprobs for sequence in sequences]),
        advantages_T=of_responses(torch.float32, [sequence.advantages for sequence in sequences]),
        token_weights_T=of_responses(torch.float32, list(token_weights)),
        sequence_index_T=torch.arange(len(lengths)).repeat_interleave(lengths_S),
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(lengths),
        sequence_ids=[sequence.id for sequence in sequences],
        prompt_lengths=prompt_lengths,
        **_pack_topk(sequences, predicts_response_T),
    )


def _pack_topk(
    sequences: Sequence[TrainSequence], predicts_response_T: Bool[Tensor, " T"]
) -> dict[str, Tensor]:
    """The top-k fields of a micro-batch; none where the sequences have none or there is no sequence."""
    fields: dict[str, Tensor] = {}
    for name in ("topk_ids", "topk_logprobs"):
        parts = [part for sequence in sequences if (part := getattr(sequence, name)) is not None]
        if parts:
            values_TK = parts[0].new_zeros(len(predicts_response_T), parts[0].shape[1])
            values_TK[predicts_response_T] = torch.cat(parts)
            fields[f"{name}_TK"] = values_TK
    return fields


def dummy_micro_batch(pad_to_multiple: int) -> MicroBatch:
    """`pad_to_multiple` padding tokens without loss: keeps the number of micro-batches equal on all ranks."""
    return pack([], [], pad_to_multiple=pad_to_multiple)


def pack_global_batch(
    sequences: Sequence[TrainSequence],
    token_weights: Sequence[Float[Tensor, " _"]],
    *,
    max_tokens: int,
    pad_to_multiple: int,
    num_micro_batches: int | None,
) -> list[MicroBatch]:
    """Plan and pack this rank's share of a global batch.

    Args:
        sequences: this data-parallel rank's share.
        token_weights: float32 [R] per sequence.
        max_tokens: token budget of a micro-batch before padding.
        pad_to_multiple: tokens of each micro-batch are a multiple of it.
        num_micro_batches: fill up with dummies to this number, which must be equal on all data-parallel
            ranks: the largest `len(plan_micro_batches(...))` among them, rounded up as the schedule wants.
            None: no filling.

    Raises:
        ValueError: the plan needs more than num_micro_batches.
    """
    plan = plan_micro_batches([len(sequence) for sequence in sequences], max_tokens)
    micro_batches = [
        pack([sequences[i] for i in bin_], [token_weights[i] for i in bin_], pad_to_multiple=pad_to_multiple)
        for bin_ in plan
    ]
    if num_micro_batches is None:
        return micro_batches
    num_missing = num_micro_batches - len(plan)
    if num_missing < 0:
        raise ValueError(f"num_micro_batches={num_micro_batches}: the plan needs {len(plan)}")
    return micro_batches + [dummy_micro_batch(pad_to_multiple) for _ in range(num_missing)]


def unpack(values_T: Shaped[Tensor, " T"], micro_batch: MicroBatch) -> dict[int, Shaped[Tensor, " _"]]:
    """Values per packed position -> sequence id -> values per response token; the inverse of `pack`."""
    responses = _response_slices(micro_batch)
    return {id_: values_T[part] for id_, part in zip(micro_batch.sequence_ids, responses, strict=True)}


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with every tensor on `device`."""
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(micro_batch):
        value = getattr(micro_batch, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
    return dataclasses.replace(micro_batch, **moved)


def _response_slices(micro_batch: MicroBatch) -> Iterator[slice]:
    """For each real sequence, the positions that predict its response tokens."""
    bounds = micro_batch.cu_seqlens.tolist()
    for prompt_length, start, stop in zip(micro_batch.prompt_lengths, bounds, bounds[1:], strict=False):
        yield slice(start + prompt_length - 1, stop - 1)
