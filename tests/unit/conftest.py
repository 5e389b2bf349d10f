"""Tiny Hugging Face models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "dense": ("qwen3", {}),
    "dense_tied": ("qwen3", {"tie_word_embeddings": True}),
    "moe": ("qwen3_moe", {"norm_topk_prob": False}),
    "moe_renormalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "moe_bf16": ("qwen3_moe", {"norm_topk_prob": True}),
    "moe_mixed": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "moe_sparse_step_tied": ("qwen3_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hf_model(name)`: the folder of one of `MODELS`, with 4 layers and a vocabulary of 101."""
    root = tmp_path_factory.mktemp("hf_models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            _save(name, root / name)
        return root / name

    return folder


def _save(name: str, path: Path) -> None:
    model_type, fields = MODELS[name]
    experts = EXPERTS if model_type == "qwen3_moe" else {}
    config = transformers.AutoConfig.for_model(model_type, **SHAPE, **experts, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms: ones would hide a swap
                parameter.uniform_(0.5, 1.5)
    dtype = torch.bfloat16 if name == "moe_bf16" else torch.float32
    model.to(dtype).save_pretrained(path)
