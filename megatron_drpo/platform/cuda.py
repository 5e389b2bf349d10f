"""NVIDIA GPUs: nothing is patched; Transformer Engine and apex are used where they are installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from megatron_drpo.config import PlatformName
from megatron_drpo.platform.versions import installed_version, require_supported


class CudaPlatform:
    """One rank per GPU, NCCL between them."""

    name = PlatformName.cuda
    backend = "nccl"

    def prepare(self, local_rank: int) -> torch.device:
        require_supported()
        # Megatron overlaps communication with GEMMs by issue order, which one queue keeps.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def describe(self) -> list[tuple[str, str]]:
        te = installed_version("transformer-engine")
        fused = "Transformer Engine" if te else ("NVIDIA apex" if has_apex() else "torch AdamW")
        return [
            ("device", f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}, NCCL"),
            ("layers", f"Transformer Engine {te}" if te else "megatron-core local, torch SDPA attention"),
            ("optimizer", f"{fused}, distributed"),
            ("gradient accumulation", "fused" if has_fused_gradient_accumulation() else "torch"),
        ]


def has_transformer_engine() -> bool:
    """Transformer Engine can be imported."""
    return find_spec("transformer_engine") is not None


def has_apex() -> bool:
    """NVIDIA apex (a source build). PyPI's `apex` is another project and has no `apex.optimizers`."""
    return find_spec("apex") is not None and find_spec("apex.optimizers") is not None


def has_fused_gradient_accumulation() -> bool:
    """Weight gradients can be accumulated into fp32 main_grad inside the GEMM (TE, or apex's extension)."""
    return has_transformer_engine() or find_spec("fused_weight_gradient_mlp_cuda") is not None
