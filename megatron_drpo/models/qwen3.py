"""Qwen3, dense (HF model_type `qwen3`): https://huggingface.co/docs/transformers/model_doc/qwen3."""

from __future__ import annotations

from megatron_drpo.models import decoder
from megatron_drpo.models.base import ArchitectureConfig, ModelFamily
from megatron_drpo.weights.hf_folder import HfConfig


def architecture(config: HfConfig) -> ArchitectureConfig:
    """config.json of a dense Qwen3 -> its numbers; ModelError names what is missing or not supported."""
    decoder.refuse_flags(config, "attention_bias", "use_sliding_window")
    return decoder.read_decoder(config, head_dim=config.get("head_dim", int), qk_norm=True)


FAMILY = ModelFamily(model_type="qwen3", architecture=architecture, mapping=decoder.mapping)
