"""config.json of Qwen3-MoE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatron_drpo.errors import ModelError
from megatron_drpo.models import qwen3_moe
from megatron_drpo.models.base import MoeConfig
from megatron_drpo.weights.hf_folder import HfConfig, HfFolder

QWEN3_30B_A3B = """{
  "model_type": "qwen3_moe", "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
  "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
  "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": null,
  "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936
}"""
"""https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json."""


def config(**changes: object) -> HfConfig:
    return HfConfig(json.loads(QWEN3_30B_A3B) | changes, "config.json")


def test_a_published_config() -> None:
    arch = qwen3_moe.architecture(config())
    assert arch.moe == MoeConfig(
        num_experts=128,
        num_experts_per_token=8,
        ffn_hidden_size=768,
        renormalise=True,
        is_moe_layer=(True,) * 48,
    )
    fields = arch.transformer_config_fields()
    assert fields["moe_layer_freq"] == 1
    assert fields["moe_router_pre_softmax"] is False


def test_the_published_models_parameters() -> None:
    """As many values as in transformers, and the 18,867 tensors that the model's safetensors index lists."""
    shapes = qwen3_moe.mapping(qwen3_moe.architecture(config())).hf_shapes
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**json.loads(QWEN3_30B_A3B)))
    assert sum(math.prod(shape) for shape in shapes.values()) == model.num_parameters() == 30_532_122_624
    assert len(shapes) == 18_867


def test_transformers_5_calls_the_experts_local(hf_model: Callable[[str], Path]) -> None:
    written = HfFolder(hf_model("moe")).config
    assert written.has("num_local_experts")
    assert not written.has("num_experts")
    moe = qwen3_moe.architecture(written).moe
    assert moe is not None
    assert moe.num_experts == 8


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"mlp_only_layers": [0, 2]}, [0, 1, 0, 1, 1, 1]),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1, 0, 1]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [5]}, [0, 0, 1, 0, 0, 0]),
    ],
)
def test_which_layers_have_experts(changes: dict[str, object], moe_layers: list[int]) -> None:
    """Where (layer + 1) is a multiple of decoder_sparse_step and the layer is not in mlp_only_layers."""
    arch = qwen3_moe.architecture(config(num_hidden_layers=6, **changes))
    assert [int(arch.is_moe_layer(layer)) for layer in range(6)] == moe_layers
    assert arch.transformer_config_fields()["moe_layer_freq"] == moe_layers
    routers = [name for name in qwen3_moe.mapping(arch).hf_shapes if name.endswith("mlp.gate.weight")]
    assert len(routers) == sum(moe_layers)


def test_one_renormalised_expert_is_refused() -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok = 1 with norm_topk_prob = true"):
        qwen3_moe.architecture(config(num_experts_per_tok=1))
