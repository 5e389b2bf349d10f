"""Settings and fixtures of all unit tests."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.embedded_server.server import EmbeddedServer
from megatron_drpo.rollout.engine import RolloutEngine

# A deadline per example measures how busy the machine is.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`write_module(name, source)`: a user's module in the current directory, from now on a temporary one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return write


# ----------------------------------------------------------- a tiny model and servers of it in threads

Serve = Callable[..., str]
MakeEngine = Callable[..., RolloutEngine]


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF folder of a random Qwen3-MoE: 2 layers, 4 experts, 256 positions, 64 tokens: the words t0 .. t63."""
    path = tmp_path_factory.mktemp("tiny_moe")
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def serve(tiny_moe: Path, serve_in_thread: Callable[..., AbstractContextManager[str]]) -> Iterator[Serve]:
    """`serve(num_slots=8, deterministic=False)`: an embedded server of `tiny_moe`; its base URL."""
    with ExitStack() as stack:

        def serve(*, num_slots: int = 8, deterministic: bool = False) -> str:
            server = EmbeddedServer(
                model_path=tiny_moe, dtype=torch.float32, num_slots=num_slots, deterministic=deterministic
            )
            return stack.enter_context(serve_in_thread(server.serve, server.stop))

        yield serve


@pytest.fixture
def make_engine(tiny_moe: Path) -> Iterator[MakeEngine]:
    """`make_engine(endpoints, seed=0, stop_token_ids=(1,), **config)`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_moe)
    with ExitStack() as stack:

        def make(
            endpoints: list[str],
            *,
            seed: int = 0,
            stop_token_ids: tuple[int, ...] = (1,),
            policy_version: int = 0,
            keep_special_tokens: bool = False,
            **fields: Any,
        ) -> RolloutEngine:
            base = RolloutConfig(num_samples_per_prompt=3, max_response_tokens=20, num_retries=0)
            config = dataclasses.replace(base, **fields)
            engine = RolloutEngine(
                config,
                tokenizer,
                list(stop_token_ids),
                64,
                seed,
                keep_special_tokens=keep_special_tokens,
            )
            stack.callback(engine.close)
            engine.set_servers(endpoints, policy_version)
            return engine

        yield make
