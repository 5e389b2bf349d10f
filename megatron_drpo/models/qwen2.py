"""Qwen2 and Qwen2.5, dense (HF model_type `qwen2`).

https://huggingface.co/docs/transformers/model_doc/qwen2. The config does not mention the bias that
queries, keys and values have.
"""

from __future__ import annotations

from megatron_drpo.models import decoder
from megatron_drpo.models.base import ArchitectureConfig, ModelFamily
from megatron_drpo.weights.hf_folder import HfConfig


def architecture(config: HfConfig) -> ArchitectureConfig:
    """config.json of a Qwen2 -> its numbers; ModelError names what is missing or not supported."""
    decoder.refuse_flags(config, "use_sliding_window")
    return decoder.read_decoder(config, head_dim=decoder.read_head_dim(config), qkv_bias=True)


FAMILY = ModelFamily(model_type="qwen2", architecture=architecture, mapping=decoder.mapping)
