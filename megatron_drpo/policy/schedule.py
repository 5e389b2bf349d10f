"""Micro-batches through Megatron's pipeline schedule, and its gradient reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_drpo.batching.packing import to_device
from megatron_drpo.types import MicroBatch


def run_schedule(
    forward: Any,
    chunks: Sequence[torch.nn.Module],
    micro_batches: list[MicroBatch],
    device: torch.device,
    **kwargs: Any,
) -> list[Any]:
    """One pass over all micro-batches; what `forward` reports of each, on the last stage.

    Args:
        forward: Megatron's forward_step_func, see `forward.py`.
        chunks: this rank's model chunks.
        kwargs: further arguments of Megatron's forward_backward_func, such as forward_only.
    """
    on_device = [to_device(micro_batch, device) for micro_batch in micro_batches]
    iterators = [iter(on_device) for _ in chunks]
    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if several else iterators[0],
        model=cast(Any, list(chunks) if several else chunks[0]),
        num_microbatches=len(micro_batches),
        seq_length=max(int(micro_batch.cu_seqlens[-1]) for micro_batch in micro_batches),
        micro_batch_size=1,
        **kwargs,
    )


def finalize_gradients(model: list[torch.nn.Module], _: object = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction, without its division by a token count.

    The one place where Megatron's own scaling is cancelled: with `calculate_per_token_loss` neither the
    schedule nor DDP divides by micro-batches or replicas, and the token count it would divide by here is
    dropped. What remains is the plain sum that `token_weights_T` already normalises.
    """
    finalize_model_grads(model, num_tokens=None, **kwargs)
