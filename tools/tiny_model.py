"""A tiny random Qwen3-MoE in an HF folder, for tools and examples: a megabyte of weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-=*() ?"


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token per character; `<eos>` ends a response."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_tiny_moe(
    folder: Path,
    *,
    num_layers: int = 4,
    hidden_size: int = 64,
    num_key_value_heads: int = 2,
    num_experts: int = 8,
    expert_size: int = 32,
    initializer_range: float = 0.08,
    seed: int = 0,
) -> PreTrainedModel:
    """A Qwen3-MoE with random fp32 weights and its tokenizer, saved to `folder`.

    Norm weights are perturbed as well, so that no part of the model is a no-op.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // 4,
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=expert_size,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=initializer_range,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = write_tiny_moe(**vars(arguments))
    print(f"{arguments.folder}: {model.num_parameters():,} random parameters")


if __name__ == "__main__":
    main()
