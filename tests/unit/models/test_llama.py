"""config.json of Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatron_drpo.errors import ModelError
from megatron_drpo.models import llama
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.weights.hf_folder import HfConfig, HfFolder

LLAMA_3_2_1B = """{
  "model_type": "llama", "attention_bias": false, "attention_dropout": 0.0, "head_dim": 64,
  "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
  "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
  "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256
}"""
"""https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json."""

LLAMA_7B = """{
  "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
  "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
  "rms_norm_eps": 1e-06, "tie_word_embeddings": false, "vocab_size": 32000
}"""
"""https://huggingface.co/huggyllama/llama-7b/blob/main/config.json: neither key-value heads nor a base."""


def config(**changes: object) -> HfConfig:
    return HfConfig(json.loads(LLAMA_3_2_1B) | changes, "config.json")


def test_a_published_config() -> None:
    assert llama.architecture(config()) == ArchitectureConfig(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=64,
        ffn_hidden_size=8192,
        norm_eps=1e-5,
        qk_norm=False,
        rope_theta=5e5,
        rope_scaling_factor=32.0,
        max_position_embeddings=131072,
        vocab_size=128256,
        tie_word_embeddings=True,
    )


def test_an_early_config_leaves_out_what_later_ones_vary() -> None:
    arch = llama.architecture(HfConfig(json.loads(LLAMA_7B), "config.json"))
    assert (arch.num_query_groups, arch.head_dim, arch.rope_theta) == (32, 128, 10_000.0)
    assert arch.rope_scaling_factor is None


@pytest.mark.parametrize("text", [LLAMA_3_2_1B, LLAMA_7B])
def test_the_published_models_parameters(text: str) -> None:
    """The names and shapes that transformers has; the first is tied, the second is not."""
    values = json.loads(text)
    shapes = llama.FAMILY.mapping(llama.architecture(HfConfig(values, "config.json"))).hf_shapes
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_transformers_5_writes_rope_parameters(hf_model: Callable[[str], Path]) -> None:
    written = HfFolder(hf_model("llama")).config
    assert written.has("rope_parameters")
    arch = llama.architecture(written)
    assert (arch.rope_theta, arch.rope_scaling_factor) == (5e5, 32.0)


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_what_is_not_supported_is_named(flag: str) -> None:
    with pytest.raises(ModelError) as error:
        llama.architecture(config(**{flag: True}))
    assert str(error.value) == f"config.json: {flag!r} = true is not supported"
