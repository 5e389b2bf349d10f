"""Families by model_type."""

from __future__ import annotations

import pytest

from megatron_drpo.errors import ModelError
from megatron_drpo.models import llama, qwen2, qwen3, qwen3_moe
from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.hf_folder import HfConfig


def test_the_model_type_chooses() -> None:
    for name, family in {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe}.items():
        assert get_family(HfConfig({"model_type": name}, "f")) is family.FAMILY


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ModelError) as error:
        get_family(HfConfig({"model_type": "gpt2"}, "m/config.json"))
    assert str(error.value) == (
        "m/config.json: model_type 'gpt2' is not supported; known: llama, qwen2, qwen3, qwen3_moe"
    )
