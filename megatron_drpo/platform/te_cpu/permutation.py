"""Bring the tokens of each expert together, and back again.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/permutation.py

    T  tokens      E  experts      H  hidden size      R  rows: tokens, each as often as it has experts
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from megatron_drpo.errors import PlatformError


def moe_permute(
    inp: Tensor,
    routing_map: Tensor,
    num_out_tokens: int = -1,
    max_token_num: int = -1,
    map_type: str = "mask",
) -> tuple[Tensor, Tensor]:
    """The rows [R, H] of all experts, expert by expert in the tokens' order, and where each came from.

    Args:
        inp: [T, H].
        routing_map: [T, E], which experts a token goes to.
    """
    if map_type != "mask":
        _refuse_map(map_type)
    row_id_map = routing_map.bool().t().nonzero()  # [R, 2]: expert, token
    return inp[row_id_map[:, 1]], row_id_map


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """See moe_permute; the second is [R], each row's probability of `probs` [T, E]."""
    rows_RH, row_id_map = moe_permute(inp, routing_map, num_out_tokens)
    return rows_RH, probs[row_id_map[:, 1], row_id_map[:, 0]], row_id_map


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    pad_offsets: None = None,
) -> Tensor:
    """The sum of each token's rows, times its probabilities if there are any, added in fp32: [T, H]."""
    if map_type != "mask":
        _refuse_map(map_type)
    expert_R, token_R = row_id_map.unbind(1)
    rows_RH = inp.float()
    if merging_probs is not None:
        rows_RH = rows_RH * merging_probs.float()[token_R, expert_R, None]
    shape = inp.shape if restore_shape is None else restore_shape
    return rows_RH.new_zeros(shape).index_add(0, token_R, rows_RH).to(inp.dtype)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """The chunks of `inp` [R, H], of the given sizes, in another order."""
    return inp[_chunk_rows(split_sizes, sorted_index)]


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of rows and of their probabilities [R]."""
    rows_R = _chunk_rows(split_sizes, sorted_index)
    return inp[rows_R], probs[rows_R]


def _chunk_rows(split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """[R]: for each row of the new order, which one it was."""
    sizes = split_sizes.reshape(-1).tolist()
    chunks = torch.arange(sum(sizes)).split(sizes)
    return torch.cat([chunks[index] for index in sorted_index.tolist()])


def _refuse_map(map_type: str) -> NoReturn:
    raise PlatformError(f"permutation by {map_type}: Transformer Engine's CPU stand-in has masks only")
