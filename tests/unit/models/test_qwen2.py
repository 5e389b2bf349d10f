"""config.json of Qwen2."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from megatron_drpo.errors import ModelError
from megatron_drpo.models import qwen2
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.weights.hf_folder import HfConfig

QWEN2_5_0_5B = """{
  "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
  "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
  "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
  "use_sliding_window": false, "vocab_size": 151936
}"""
"""https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/config.json."""


def config(**changes: object) -> HfConfig:
    return HfConfig(json.loads(QWEN2_5_0_5B) | changes, "config.json")


def test_a_published_config() -> None:
    arch = qwen2.architecture(config())
    assert arch == ArchitectureConfig(
        num_layers=24,
        hidden_size=896,
        num_attention_heads=14,
        num_query_groups=2,
        head_dim=64,
        ffn_hidden_size=4864,
        norm_eps=1e-6,
        qk_norm=False,
        qkv_bias=True,
        rope_theta=1e6,
        max_position_embeddings=32768,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    fields = arch.transformer_config_fields()
    assert fields["add_qkv_bias"] is True
    assert fields["add_bias_linear"] is False


@pytest.mark.parametrize("tied", [True, False])
def test_the_published_models_parameters(tied: bool) -> None:
    """The names and shapes that transformers has: a bias on queries, keys and values only."""
    values = json.loads(QWEN2_5_0_5B) | {"tie_word_embeddings": tied}
    shapes = qwen2.FAMILY.mapping(qwen2.architecture(config(tie_word_embeddings=tied))).hf_shapes
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values))
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(ModelError) as error:
        qwen2.architecture(config(use_sliding_window=True))
    assert str(error.value) == "config.json: 'use_sliding_window' = true is not supported"
