"""Qwen3, dense (HF model_type `qwen3`): https://huggingface.co/docs/transformers/model_doc/qwen3."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_drpo.hf_io import HfConfig
from megatron_drpo.models.base import ArchitectureConfig, ModelFamily, read_rope_theta, refuse_unsupported
from megatron_drpo.models.mapping import (
    HfTensor,
    MegatronName,
    ParameterMapping,
    TensorMap,
    direct,
    gate_up,
    qkv,
)

IGNORED = (".rotary_emb.inv_freq",)
"""Computed from the config; old checkpoints have it."""


def architecture(config: HfConfig) -> ArchitectureConfig:
    """config.json of a dense Qwen3 -> its numbers; ModelError names what is missing or not supported."""
    refuse_unsupported(config, ("attention_bias", "use_sliding_window"))
    return ArchitectureConfig(
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=config.get("hidden_size", int),
        num_attention_heads=config.get("num_attention_heads", int),
        num_query_groups=config.get("num_key_value_heads", int),
        head_dim=config.get("head_dim", int),
        ffn_hidden_size=config.get("intermediate_size", int),
        norm_eps=config.get("rms_norm_eps", float),
        qk_norm=True,
        rope_theta=read_rope_theta(config),
        max_position_embeddings=config.get("max_position_embeddings", int),
        vocab_size=config.get("vocab_size", int),
        tie_word_embeddings=config.get("tie_word_embeddings", bool, False),
    )


def mapping(arch: ArchitectureConfig) -> ParameterMapping:
    """The parameter mapping of a dense Qwen3."""
    ignored = (*IGNORED, "lm_head.weight") if arch.tie_word_embeddings else IGNORED
    return ParameterMapping(_tensor_maps(arch), ignored)


def _tensor_maps(arch: ArchitectureConfig) -> Iterator[TensorMap]:
    yield embedding(arch)
    for layer in range(arch.num_layers):
        yield from attention(arch, layer)
        yield from dense_mlp(arch, layer)
    yield from head(arch)


def embedding(arch: ArchitectureConfig) -> TensorMap:
    """[V, H], padded by Megatron."""
    name = MegatronName("embedding.word_embeddings.weight")
    return direct(name, "model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size), padded=True)


def attention(arch: ArchitectureConfig, layer: int) -> Iterator[TensorMap]:
    """Input norm and attention of one layer."""
    hf = f"model.layers.{layer}."
    hidden, head_dim = arch.hidden_size, arch.head_dim
    q_rows, kv_rows = arch.num_attention_heads * head_dim, arch.num_query_groups * head_dim

    def name(suffix: str) -> MegatronName:
        return MegatronName(f"decoder.layers.self_attention.{suffix}", layer)

    yield direct(name("linear_qkv.layer_norm_weight"), f"{hf}input_layernorm.weight", (hidden,))
    yield qkv(
        name("linear_qkv.weight"),
        q=HfTensor(f"{hf}self_attn.q_proj.weight", (q_rows, hidden)),
        k=HfTensor(f"{hf}self_attn.k_proj.weight", (kv_rows, hidden)),
        v=HfTensor(f"{hf}self_attn.v_proj.weight", (kv_rows, hidden)),
        num_query_groups=arch.num_query_groups,
    )
    yield direct(name("q_layernorm.weight"), f"{hf}self_attn.q_norm.weight", (head_dim,))
    yield direct(name("k_layernorm.weight"), f"{hf}self_attn.k_norm.weight", (head_dim,))
    yield direct(name("linear_proj.weight"), f"{hf}self_attn.o_proj.weight", (hidden, q_rows))


def dense_mlp(arch: ArchitectureConfig, layer: int) -> Iterator[TensorMap]:
    """Norm and SwiGLU of one dense layer."""
    hf = f"model.layers.{layer}."
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size

    def name(suffix: str) -> MegatronName:
        return MegatronName(f"decoder.layers.mlp.{suffix}", layer)

    yield direct(name("linear_fc1.layer_norm_weight"), f"{hf}post_attention_layernorm.weight", (hidden,))
    yield gate_up(
        name("linear_fc1.weight"), f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight", (ffn, hidden)
    )
    yield direct(name("linear_fc2.weight"), f"{hf}mlp.down_proj.weight", (hidden, ffn))


def head(arch: ArchitectureConfig) -> Iterator[TensorMap]:
    """Final norm, and the output matrix [V, H] unless it is the embedding."""
    yield direct(MegatronName("decoder.final_layernorm.weight"), "model.norm.weight", (arch.hidden_size,))
    if not arch.tie_word_embeddings:
        name = MegatronName("output_layer.weight")
        yield direct(name, "lm_head.weight", (arch.vocab_size, arch.hidden_size), padded=True)


FAMILY = ModelFamily(model_type="qwen3", architecture=architecture, mapping=mapping)
