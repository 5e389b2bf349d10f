"""What reads and writes a chunk of logits: one interface, one module per backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_drpo.config.schema import LogprobBackend
from megatron_drpo.errors import PlatformError

if TYPE_CHECKING:
    from megatron_drpo.policy.kernels.base import RowKernels


def build_row_kernels(backend: LogprobBackend, device: torch.device) -> RowKernels:
    """The row kernels for logits on `device`.

    auto takes Triton on CUDA where it is installed (torch's CUDA builds bring it), and torch elsewhere.

    Raises:
        PlatformError: backend=triton, and Triton is not installed or has nothing to run on.
    """
    from megatron_drpo.policy.kernels.torch_rows import TorchRows

    if backend is LogprobBackend.torch or (backend is LogprobBackend.auto and device.type != "cuda"):
        return TorchRows()
    try:
        from megatron_drpo.policy.kernels.triton_rows import INTERPRETED, TritonRows
    except ModuleNotFoundError as error:
        if backend is LogprobBackend.auto:
            return TorchRows()
        raise PlatformError(
            f"policy.logprob_backend=triton: {error}; install triton, or use policy.logprob_backend=torch"
        ) from error
    if device.type != "cuda" and not INTERPRETED:
        raise PlatformError(
            f"policy.logprob_backend=triton needs a CUDA device, and the logits are on {device}: use "
            "policy.logprob_backend=auto, or, to debug, set TRITON_INTERPRET=1 in the environment (slow)"
        )
    return TritonRows()
