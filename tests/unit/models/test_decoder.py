"""What all families read from config.json, and the parts of the mapping that only some have."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_drpo.errors import ModelError
from megatron_drpo.models import decoder
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.weights.hf_folder import HfConfig

CONFIG = {
    "hidden_act": "silu",
    "hidden_size": 12,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 11,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(changes: dict[str, object] | None = None, **arguments: Any) -> ArchitectureConfig:
    config = HfConfig(CONFIG | (changes or {}), "config.json")
    return decoder.read_decoder(config, head_dim=3, **arguments)


def test_absent_keys() -> None:
    """Untied; the rest must be there unless the family gives a default."""
    assert not read().tie_word_embeddings
    assert read({"num_key_value_heads": None}, num_query_groups=4).num_query_groups == 4
    assert read({"rope_theta": None}, default_rope_theta=5.0).rope_theta == 5.0
    assert read(default_rope_theta=5.0).rope_theta == 1e6


def test_heads_share_the_hidden_size_unless_the_config_says_otherwise() -> None:
    assert decoder.read_head_dim(HfConfig(CONFIG, "f")) == 3
    assert decoder.read_head_dim(HfConfig(CONFIG | {"head_dim": 8}, "f")) == 8


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, (1e6, None)),
        ({"rope_scaling": {"type": "default"}}, (1e6, None)),
        ({"rope_parameters": {"rope_theta": 2e4}}, (2e4, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, (2e4, None)),
        ({"rope_scaling": LLAMA3}, (1e6, 8.0)),
        ({"rope_scaling": LLAMA3 | {"factor": 32}}, (1e6, 32.0)),
        ({"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, (5e5, 8.0)),
    ],
)
def test_rotary_embedding(rope: dict[str, object], expected: tuple[float, float | None]) -> None:
    """As transformers 4 and 5 write it."""
    found = read(rope)
    assert (found.rope_theta, found.rope_scaling_factor) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json: 'hidden_act' is 'gelu', only 'silu' is supported"),
        ({"num_hidden_layers": None}, "config.json: 'num_hidden_layers' is missing"),
        ({"hidden_size": "64"}, "config.json: 'hidden_size' is '64', expected int"),
        ({"rope_theta": None}, "config.json: 'rope_theta' is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.json: rope_scaling: rope_type 'linear' is not supported, only 'default' and 'llama3' are",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "config.json: rope_parameters: rope_type 'yarn' is not supported, "
            "only 'default' and 'llama3' are",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "config.json: rope_parameters: 'partial_rotary_factor' other than 1 is not supported",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}},
            "config.json: rope_scaling: 'low_freq_factor' is 2, Megatron supports 1 only",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}},
            "config.json: rope_scaling: 'high_freq_factor' is 8, Megatron supports 4 only",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}},
            "config.json: rope_scaling: 'original_max_position_embeddings' is 4096, "
            "Megatron supports 8192 only",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "config.json: rope_scaling: 'low_freq_factor' is missing",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError) as error:
        read(changes)
    assert str(error.value) == message


@pytest.mark.parametrize("arguments", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_biases_and_head_norms_only_where_the_family_has_them(arguments: dict[str, Any]) -> None:
    names = [name for name in decoder.mapping(read(**arguments)).hf_shapes if "layers.1.self_attn" in name]
    suffixes = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    suffixes += ["q_proj.bias", "k_proj.bias", "v_proj.bias"] if "qkv_bias" in arguments else []
    suffixes += ["q_norm.weight", "k_norm.weight"] if "qk_norm" in arguments else []
    assert names == [f"model.layers.1.self_attn.{suffix}" for suffix in [*suffixes, "o_proj.weight"]]
