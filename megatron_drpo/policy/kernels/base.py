"""The row kernels: all that the logprob op does to a chunk of logits, besides the matrix products.

A chunk is [C, V]: C tokens, the V ids of this rank's vocabulary shard (padding is not among them), as the
matrix product left it: not yet divided by the temperature. It is fp32, or float64 where the hidden states
are; rows lie one after the other. `first_id` is the global id of column 0.

    C  tokens of the chunk        V  ids of this shard        K  given ids per token
    z  logits        T  temperature        p  probabilities over the whole vocabulary        H  their entropy
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_STATISTICS = 5
"""Columns of `RowKernels.statistics` before those of the given ids."""


@runtime_checkable  # tests check annotations at run time
class RowKernels(Protocol):
    """No method communicates, and none makes the host wait for the device."""

    def statistics(
        self,
        logits_CV: Float[Tensor, "C V"],
        labels_C: Int[Tensor, " C"],
        inverse_temperature_C: Float[Tensor, " C"],
        topk_ids_CK: Int[Tensor, "C K"] | None,
        *,
        first_id: int,
    ) -> Float[Tensor, "C S"]:
        """Per token, S = 5 + K numbers of this shard's columns; the logits stay as they are.

        0. log-sum-exp of z / T;
        1. entropy of the softmax over these columns alone, in nats;
        2. z / T of the label, -inf where the label is not here;
        3. the largest z / T;
        4. its global id, as a number (exact below 2^24); the lowest of equals;
        5. and on: z / T of each given id, -inf where it is not here.

        A shard of padding only, V = 0, gives -inf, 0, -inf, -inf, 0, -inf, ...
        """
        ...

    def grad_logits_(
        self,
        logits_CV: Float[Tensor, "C V"],
        labels_C: Int[Tensor, " C"],
        inverse_temperature_C: Float[Tensor, " C"],
        logsumexp_C: Float[Tensor, " C"],
        entropy_C: Float[Tensor, " C"],
        grad_logprobs_C: Float[Tensor, " C"],
        grad_entropy_C: Float[Tensor, " C"] | None,
        *,
        first_id: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, "C V"]:
        """dLoss/dz, for gradients g of the label's logprob and h of the entropy; overwrites the logits.

            dLoss/dz_j = [g (1[j = label] - p_j) - h p_j (log p_j + H)] / T

        Args:
            logsumexp_C: of z / T over the whole vocabulary.
            entropy_C: over the whole vocabulary; not read without grad_entropy_C.
            grad_entropy_C: None: the entropy has no gradient.
            dtype: of the result, which may lie in the logits' memory.
        """
        ...
