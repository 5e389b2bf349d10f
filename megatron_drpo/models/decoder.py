"""What the families share: reading config.json of a Llama-like decoder, and its parameter mapping.

Hugging Face names the tensors of Llama, Qwen2 and Qwen3 alike; they differ in biases and head norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_drpo.errors import ModelError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.weights.hf_folder import HfConfig
from megatron_drpo.weights.mapping import (
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

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
"""What Megatron's RotaryEmbedding has built in, beside the factor:
https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/models/common/embeddings/rotary_pos_embedding.py."""

# ---------------------------------------------------------------------------------------- config.json


def read_decoder(
    config: HfConfig,
    *,
    head_dim: int,
    num_query_groups: int | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    default_rope_theta: float | None = None,
) -> ArchitectureConfig:
    """config.json -> the numbers of a dense decoder.

    Args:
        head_dim: of queries, keys and values; families differ in what an absent one means.
        num_query_groups: key-value heads; None: `num_key_value_heads` must say.
        qk_norm: queries and keys are normalised per head.
        qkv_bias: queries, keys and values have a bias.
        default_rope_theta: the rotary base of a config without one; None: it must say.

    Raises:
        ModelError: a key is missing, mistyped or set to what is not supported.
    """
    _check_activation(config)
    rope_theta, rope_scaling_factor = _read_rope(config, default_rope_theta)
    return ArchitectureConfig(
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=config.get("hidden_size", int),
        num_attention_heads=config.get("num_attention_heads", int),
        num_query_groups=num_query_groups or config.get("num_key_value_heads", int),
        head_dim=head_dim,
        ffn_hidden_size=config.get("intermediate_size", int),
        norm_eps=config.get("rms_norm_eps", float),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        rope_theta=rope_theta,
        rope_scaling_factor=rope_scaling_factor,
        max_position_embeddings=config.get("max_position_embeddings", int),
        vocab_size=config.get("vocab_size", int),
        tie_word_embeddings=config.get("tie_word_embeddings", bool, False),
    )


def read_head_dim(config: HfConfig) -> int:
    """`head_dim`; where it is absent, the heads share the hidden size."""
    if config.has("head_dim"):
        return config.get("head_dim", int)
    return config.get("hidden_size", int) // config.get("num_attention_heads", int)


def refuse_flags(config: HfConfig, *flags: str) -> None:
    """Raise ModelError for the first of these flags that is set."""
    for key in flags:
        if config.get(key, bool, False):
            raise ModelError(f"{config.source}: {key!r} = true is not supported")


def _check_activation(config: HfConfig) -> None:
    activation = config.get("hidden_act", str)
    if activation != "silu":
        raise ModelError(f"{config.source}: 'hidden_act' is {activation!r}, only 'silu' is supported")


def _read_rope(config: HfConfig, default_theta: float | None) -> tuple[float, float | None]:
    """Base and scaling factor of the rotary embedding.

    transformers 5 writes all of it into `rope_parameters`; earlier versions write `rope_theta`, and
    `rope_scaling` for what scales the positions.
    """
    rope = next(
        (config.section(key) for key in ("rope_scaling", "rope_parameters") if config.has(key)), config
    )
    factor = None if rope is config else _read_rope_scaling(rope)
    return (rope if rope.has("rope_theta") else config).get("rope_theta", float, default_theta), factor


def _read_rope_scaling(rope: HfConfig) -> float | None:
    """The factor of Llama 3's scaling; None where positions are not scaled."""
    if rope.get("partial_rotary_factor", float, 1.0) != 1.0:
        raise ModelError(f"{rope.source}: 'partial_rotary_factor' other than 1 is not supported")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(
            f"{rope.source}: rope_type {kind!r} is not supported, only 'default' and 'llama3' are"
        )
    for key, built_in in LLAMA3_ROPE.items():
        if rope.get(key, float) != built_in:
            raise ModelError(
                f"{rope.source}: {key!r} is {rope.get(key, float):g}, Megatron supports {built_in:g} only"
            )
    return rope.get("factor", float)


# -------------------------------------------------------------------------------------------- mapping

LayerMaps = Callable[[ArchitectureConfig, int], Iterator[TensorMap]]
"""(architecture, layer) -> a part of that layer."""


def mapping(arch: ArchitectureConfig, mlp: LayerMaps | None = None) -> ParameterMapping:
    """The parameter mapping of the whole model.

    Args:
        mlp: what follows attention in each layer, with its norm; None: `dense_mlp`.
    """
    ignored = (*IGNORED, "lm_head.weight") if arch.tie_word_embeddings else IGNORED
    return ParameterMapping(_tensor_maps(arch, mlp or dense_mlp), ignored)


def _tensor_maps(arch: ArchitectureConfig, mlp: LayerMaps) -> Iterator[TensorMap]:
    yield embedding(arch)
    for layer in range(arch.num_layers):
        yield from attention(arch, layer)
        yield from mlp(arch, layer)
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
    if arch.qkv_bias:
        yield qkv(
            name("linear_qkv.bias"),
            q=HfTensor(f"{hf}self_attn.q_proj.bias", (q_rows,)),
            k=HfTensor(f"{hf}self_attn.k_proj.bias", (kv_rows,)),
            v=HfTensor(f"{hf}self_attn.v_proj.bias", (kv_rows,)),
            num_query_groups=arch.num_query_groups,
        )
    if arch.qk_norm:
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
