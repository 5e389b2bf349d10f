"""What a model cannot do for a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    SGLangServerConfig,
)
from megatron_drpo.launch.check import check_config
from megatron_drpo.launch.check_model import check_megatron, check_tokens
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.hf_folder import HfFolder


@pytest.fixture
def architecture(hf_model: Callable[[str], Path]) -> ArchitectureConfig:
    folder = HfFolder(hf_model("moe"))
    return get_family(folder.config).architecture(folder.config)


@pytest.fixture
def config(hf_model: Callable[[str], Path], tmp_path: Path) -> Config:
    """Of a run that can start; its longest prompt has 5 tokens."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "11+1=", "answer": "12"}\n')
    return Config(
        platform=PlatformName.cpu,
        data=DataConfig(train_path=str(prompts)),
        policy=PolicyConfig(model_path=str(hf_model("moe"))),
    )


@pytest.mark.parametrize("overrides", [{"num_layers": 0}, {"recompute_granularity": "full"}])
def test_what_megatron_refuses(
    config: Config, architecture: ArchitectureConfig, overrides: dict[str, Any]
) -> None:
    assert check_megatron(config, architecture) == []
    config.policy.megatron_overrides = overrides
    (problem,) = check_megatron(config, architecture)
    assert problem.startswith("Megatron refuses this configuration: ")
    assert problem in check_config(config)


def test_only_a_machine_with_gpus_knows_what_megatron_says_there(
    config: Config, architecture: ArchitectureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config.platform = PlatformName.cuda
    assert check_megatron(config, architecture) == []


RESPONSE_TOO_LONG = "rollout.max_response_tokens={}: must be less than {}, {}, which the prompt needs as well"


@pytest.mark.parametrize(
    ("rollout", "context_length", "expected"),
    [
        ({"max_response_tokens": 2047}, None, []),
        (
            {"max_response_tokens": 2048},
            None,
            [RESPONSE_TOO_LONG.format(2048, "the model's max_position_embeddings", 2048)],
        ),
        ({"max_response_tokens": 64}, 65, []),
        (
            {"max_response_tokens": 65},
            65,
            [RESPONSE_TOO_LONG.format(65, "rollout.sglang.context_length", 65)],
        ),
        ({"max_response_tokens": 65, "endpoints": ["http://there"]}, 65, []),
        (
            {},
            2049,
            ["rollout.sglang.context_length=2049: must not exceed the model's max_position_embeddings, 2048"],
        ),
        ({"stop_token_ids": [0, 100]}, None, []),
        (
            {"stop_token_ids": [5, 101, 102]},
            None,
            ["rollout.stop_token_ids=[5, 101, 102]: 101 is outside the model's vocabulary of 101"],
        ),
    ],
)
def test_positions_and_tokens_that_the_model_has_not(
    architecture: ArchitectureConfig,
    rollout: dict[str, Any],
    context_length: int | None,
    expected: list[str],
) -> None:
    engine = RolloutEngineName.embedded if context_length is None else RolloutEngineName.sglang
    sglang = SGLangServerConfig(context_length=context_length)
    assert check_tokens(RolloutConfig(engine=engine, sglang=sglang, **rollout), architecture) == expected


def test_a_prompt_and_its_response_share_the_positions(config: Config) -> None:
    config.rollout = RolloutConfig(max_response_tokens=2043)
    assert check_config(config) == []
    config.rollout = RolloutConfig(max_response_tokens=2044)
    assert check_config(config) == [
        f"{config.data.train_path} line 2: the prompt has 5 tokens, but rollout.max_response_tokens leaves "
        "room for 4; ask for shorter responses, or leave such prompts out with data.max_prompt_tokens=4"
    ]
    config.data.max_prompt_tokens = 4
    assert check_config(config) == []
    config.rollout = RolloutConfig(max_response_tokens=2048)
    (problem,) = check_config(config)
    assert problem.startswith("rollout.max_response_tokens=2048: ")
