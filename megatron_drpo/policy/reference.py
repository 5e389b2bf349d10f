"""The frozen policy that the KL penalty compares with."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_drpo.hf_io import HfFolder
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.load import load_hf_weights
from megatron_drpo.models.mapping import ParameterMapping
from megatron_drpo.platform import Platform
from megatron_drpo.policy.model import build_model_chunks


def build_reference_chunks(
    path: str,
    config: TransformerConfig,
    architecture: ArchitectureConfig,
    mapping: ParameterMapping,
    platform: Platform,
    device: torch.device,
) -> list[torch.nn.Module]:
    """This rank's chunks of the reference policy, under the policy's own layout, without gradients.

    Args:
        path: HF folder of a model with the policy's architecture.
    """
    chunks = build_model_chunks(config, architecture, platform, device)
    load_hf_weights(chunks, HfFolder(path), mapping)
    frozen: list[torch.nn.Module] = []
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
        module: Any = Float16Module(config, chunk) if config.bf16 else chunk
        frozen.append(module)
    return frozen
