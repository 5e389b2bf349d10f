"""What a step takes of the GPUs: their memory, and when they are done."""

from __future__ import annotations

import torch
import torch.distributed as dist

_GIB = 2.0**30


def device_memory(device: torch.device) -> dict[str, float]:
    """Of the fullest rank, in GiB: allocated and reserved now, and the largest allocated since the last call.

    Collective over all ranks on GPUs; nothing on a CPU.
    """
    if device.type != "cuda":
        return {}
    found = {
        "memory/allocated_gib": torch.cuda.memory_allocated(device) / _GIB,
        "memory/reserved_gib": torch.cuda.memory_reserved(device) / _GIB,
        "memory/peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return dict(zip(found, _largest(list(found.values()), device), strict=True))


def wait_for_kernels() -> None:
    """Until this process's GPU has done what was queued; at once where it uses none."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _largest(values: list[float], device: torch.device) -> list[float]:
    """Each over all ranks."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()
