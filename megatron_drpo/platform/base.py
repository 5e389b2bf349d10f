"""The platform protocol and the choice between CPU and CUDA."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_drpo.config.schema import Layers, PlatformName
from megatron_drpo.errors import PlatformError


class Platform(Protocol):
    """One kind of machine."""

    name: PlatformName
    backend: str
    """torch.distributed backend: "gloo" or "nccl"."""
    token_multiple: int
    """Each context-parallel rank's tokens of a packed micro-batch are padded to a multiple of this number."""

    def prepare(self, local_rank: int) -> torch.device:
        """Make this process able to run Megatron-Core; returns the device it uses. Idempotent."""
        ...

    def require_layers(self, layers: Layers) -> None:
        """Check that Megatron can build them here.

        Raises:
            PlatformError: it cannot; says what to install or to set.
        """
        ...

    def describe(self, layers: Layers) -> list[tuple[str, str]]:
        """(what, which) lines for the start-up banner: versions and the implementations in use."""
        ...


def build_platform(name: PlatformName) -> Platform:
    """The platform by name; `auto` is cuda where there is a GPU, else cpu.

    Raises:
        PlatformError: cuda was asked for and torch sees no GPU.
    """
    from megatron_drpo.platform.cpu import CpuPlatform
    from megatron_drpo.platform.cuda import CudaPlatform

    has_gpu = torch.cuda.is_available()
    if name is PlatformName.cuda and not has_gpu:
        raise PlatformError("platform=cuda, but torch sees no GPU: check the driver, or use platform=cpu")
    if name is PlatformName.cuda or (name is PlatformName.auto and has_gpu):
        return CudaPlatform()
    return CpuPlatform()
