"""NVIDIA GPUs: nothing is patched. Transformer Engine is expected; apex is used where it is installed."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec

import torch

from megatron_drpo.config.schema import Layers, PlatformName
from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.versions import (
    installed_version,
    require,
    require_supported,
    transformer_engine_bounds,
)

_WITHOUT = "or set policy.layers=local, which is far slower"


class CudaPlatform:
    """One rank per GPU, NCCL between them."""

    name = PlatformName.cuda
    backend = "nccl"
    token_multiple = 128
    """Activations have few sizes, so that the allocator finds freed blocks that fit, and their rows meet the
    alignment of Transformer Engine's FP8 GEMMs (16, or blocks of 128)."""

    def prepare(self, local_rank: int) -> torch.device:
        require_supported()
        # Megatron overlaps communication with GEMMs by issue order, which one queue keeps.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def require_layers(self, layers: Layers) -> None:
        if layers is Layers.local:
            return
        bounds = transformer_engine_bounds()
        megatron = f"megatron-core {installed_version('megatron-core')}"
        reason = f"policy.layers=transformer_engine with {megatron}; install megatron-drpo[te], {_WITHOUT}"
        require("transformer-engine", bounds, reason)
        try:
            # Not only found: one that was built for another torch fails here, where it can be told.
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:
            found = f"Transformer Engine {installed_version('transformer-engine')}"
            raise PlatformError(
                f"{found} is installed and cannot be imported with torch {torch.__version__} "
                f"({type(error).__name__}: {error}): build it anew for this torch (pip install "
                f"--force-reinstall --no-build-isolation transformer-engine-torch), {_WITHOUT}"
            ) from error

    def describe(self, layers: Layers) -> list[tuple[str, str]]:
        te = installed_version("transformer-engine")
        fused = "Transformer Engine" if te else ("NVIDIA apex" if has_apex() else "torch AdamW")
        is_local = layers is Layers.local
        is_fused = not is_local or has_apex_weight_gradients()
        return [
            ("device", f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}, NCCL"),
            (
                "layers",
                "megatron-core local, torch SDPA attention" if is_local else f"Transformer Engine {te}",
            ),
            ("optimizer", f"{fused}, distributed"),
            ("gradient accumulation", "fused" if is_fused else "torch"),
        ]


def has_apex() -> bool:
    """NVIDIA apex (a source build). PyPI's `apex` is another project and has no `apex.optimizers`."""
    return find_spec("apex") is not None and find_spec("apex.optimizers") is not None


def has_apex_weight_gradients() -> bool:
    """apex's extension is there, by which Megatron's own layers add weight gradients to fp32 main_grad."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None
