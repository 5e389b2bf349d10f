"""Llama 1 to 3 and models of the same form, e.g. SmolLM2 (HF model_type `llama`).

https://huggingface.co/docs/transformers/model_doc/llama. Configs of the first Llamas leave out what only
later ones vary: key-value heads, the size of a head, the rotary base.
"""

from __future__ import annotations

from megatron_drpo.models import decoder
from megatron_drpo.models.base import ArchitectureConfig, ModelFamily
from megatron_drpo.weights.hf_folder import HfConfig


def architecture(config: HfConfig) -> ArchitectureConfig:
    """config.json of a Llama -> its numbers; ModelError names what is missing or not supported."""
    decoder.refuse_flags(config, "attention_bias", "mlp_bias")
    num_heads = config.get("num_attention_heads", int)
    return decoder.read_decoder(
        config,
        head_dim=decoder.read_head_dim(config),
        num_query_groups=config.get("num_key_value_heads", int, num_heads),
        default_rope_theta=10_000.0,
    )


FAMILY = ModelFamily(model_type="llama", architecture=architecture, mapping=decoder.mapping)
