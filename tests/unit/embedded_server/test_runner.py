"""Logits of the slotted cache against a plain forward of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from megatron_drpo.embedded_server import runner as runner_module
from megatron_drpo.embedded_server.runner import ModelRunner, load_model
from megatron_drpo.errors import ModelError

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def runner(tiny_moe: Path) -> ModelRunner:
    return ModelRunner(load_model(tiny_moe, torch.float32), num_slots=6)


@pytest.fixture(scope="module")
def reference(tiny_moe: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_moe, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def last_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0, -1]


def decode_and_compare(
    runner: ModelRunner, reference: torch.nn.Module, sequences: list[list[int]], num_steps: int
) -> None:
    """Feed every row's last token, compare, extend by fixed tokens, and again."""
    for step in range(num_steps):
        logits = runner.decode([s[-1] for s in sequences], [len(s) - 1 for s in sequences])
        for row, sequence in enumerate(sequences):
            torch.testing.assert_close(logits[row], last_logits(reference, sequence), **TOLERANCE)
            sequence.append((7 * step + 3 * row + 5) % 64)


def test_rows_of_any_length_match_a_plain_forward(runner: ModelRunner, reference: torch.nn.Module) -> None:
    """Among them equal prompts, a prompt of one token, and growth past the cache's first 64 tokens."""
    prompts = [[5, 6, 7], [9], list(range(2, 62)), [5, 6, 7], [8, 3, 8, 3, 8]]
    runner.reset()
    runner.prefill([tuple(prompt) for prompt in prompts], rows=[0, 1, 2, 3, 4])
    decode_and_compare(runner, reference, prompts, num_steps=8)


def test_a_moved_row_and_a_refilled_row_go_on_correctly(
    runner: ModelRunner, reference: torch.nn.Module
) -> None:
    runner.reset()
    runner.prefill([(5, 6, 7), (9, 10), (11, 12, 13, 14)], rows=[0, 1, 2])
    sequences = [[5, 6, 7], [9, 10], [11, 12, 13, 14]]
    decode_and_compare(runner, reference, sequences, num_steps=2)
    runner.move(2, 0)
    runner.prefill([(40, 41)], rows=[2])
    decode_and_compare(runner, reference, [sequences[2], sequences[1], [40, 41]], num_steps=2)


def test_prefill_in_several_chunks(
    runner: ModelRunner, reference: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_PREFILL_TOKENS", 8)
    calls: list[tuple[int, ...]] = []

    def record(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        calls.append(tuple(kwargs["input_ids"].shape))

    hook = runner.model.register_forward_pre_hook(record, with_kwargs=True)
    prompts = [[3, 4, 5], list(range(2, 14)), [6, 7, 8, 9, 10], [3, 4, 5], [9, 8, 7, 6]]
    runner.reset()
    runner.prefill([tuple(prompt) for prompt in prompts], rows=[0, 1, 2, 3, 4])
    hook.remove()
    assert calls == [(1, 11), (2, 4), (1, 2)]
    decode_and_compare(runner, reference, prompts, num_steps=1)


def test_routes_are_the_experts_of_each_token(
    runner: ModelRunner, reference: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the routers' logits in a plain forward; of padded and equal prompts, in two chunks, and of decoded
    tokens."""
    monkeypatch.setattr(runner_module, "_PREFILL_TOKENS", 12)
    prompts = [[5, 6, 7], [9], list(range(2, 14)), [5, 6, 7], [8, 3, 8, 3, 8]]

    def expected(tokens: list[int]) -> torch.Tensor:
        logits = reference(input_ids=torch.tensor([tokens]), output_router_logits=True).router_logits
        return torch.stack([layer.topk(2).indices for layer in logits], 1)

    runner.reset()
    routes = runner.prefill([tuple(prompt) for prompt in prompts], rows=[0, 1, 2, 3, 4])
    assert sorted(routes) == [0, 2, 3, 4], "a prompt of one token has nothing to prefill"
    for row, part in routes.items():
        torch.testing.assert_close(part, expected(prompts[row][:-1]))
    runner.decode([prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts])
    for prompt, part in zip(prompts, runner.routes(), strict=True):
        torch.testing.assert_close(part, expected(prompt)[-1])


def test_experts_whose_rows_are_not_aligned_are_served(tmp_path: Path) -> None:
    """grouped_mm refuses rows that are no multiple of 16 bytes."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=16,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=5,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    runner = ModelRunner(load_model(tmp_path, torch.float32), num_slots=1)
    runner.prefill([(1, 2, 3)], rows=[0])
    with torch.no_grad():
        expected = last_logits(model, [1, 2, 3])
    torch.testing.assert_close(runner.decode([3], [2])[0], expected, **TOLERANCE)


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=4,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"full attention only.*SlidingWindow"):
        load_model(tmp_path, torch.float32)
