"""config.json of dense Qwen3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatron_drpo.errors import ModelError
from megatron_drpo.models import qwen3
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.weights.hf_folder import HfConfig, HfFolder

QWEN3_0_6B = """{
  "model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
  "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "use_sliding_window": false, "vocab_size": 151936
}"""
"""https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json, as transformers 4 writes it."""


def config(**changes: object) -> HfConfig:
    return HfConfig(json.loads(QWEN3_0_6B) | changes, "config.json")


def test_a_published_config() -> None:
    assert qwen3.architecture(config()) == ArchitectureConfig(
        num_layers=28,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=128,
        ffn_hidden_size=3072,
        norm_eps=1e-6,
        qk_norm=True,
        rope_theta=1e6,
        max_position_embeddings=40960,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


def test_the_published_models_parameters() -> None:
    """The names and shapes that transformers has, lm_head tied."""
    shapes = qwen3.FAMILY.mapping(qwen3.architecture(config())).hf_shapes
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**json.loads(QWEN3_0_6B)))
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_transformers_5_writes_rope_parameters(hf_model: Callable[[str], Path]) -> None:
    written = HfFolder(hf_model("dense")).config
    assert written.has("rope_parameters")
    assert qwen3.architecture(written).rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "config.json: 'attention_bias' = true is not supported"),
        ({"use_sliding_window": True}, "config.json: 'use_sliding_window' = true is not supported"),
        # An absent size is transformers' default, which is not the published models'.
        ({"head_dim": None}, "config.json: 'head_dim' is missing"),
        ({"num_key_value_heads": None}, "config.json: 'num_key_value_heads' is missing"),
        ({"rope_theta": None}, "config.json: 'rope_theta' is missing"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError) as error:
        qwen3.architecture(config(**changes))
    assert str(error.value) == message
