"""The frozen policy that the KL penalty compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_drpo.policy.model import PolicyModel


def freeze(chunks: Sequence[PolicyModel], config: TransformerConfig) -> list[torch.nn.Module]:
    """These chunks without gradients, for scoring alone."""
    frozen: list[torch.nn.Module] = []
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
        module: Any = Float16Module(config, chunk) if config.bf16 else chunk
        frozen.append(module)
    return frozen
