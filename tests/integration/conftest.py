"""A tiny model and prompt files, and the arguments of a run on them."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_drpo import cli


@pytest.fixture(scope="session")
def model_path(hf_model: Callable[[str], Path]) -> Path:
    """A Qwen3-MoE of 4 layers and 8 experts whose tokens are characters."""
    return hf_model("moe_renormalised")


@pytest.fixture(scope="session")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 sums, each with answer and demonstration."""
    path = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    sums = [(a, b) for a in range(10) for b in range(10)]
    lines = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a, b in sums]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run_arguments(model_path: Path, prompts_path: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`run_arguments("key=value", ...)`: of a run of two small steps in fp32, in tmp_path/run."""

    def arguments(*overrides: str) -> list[str]:
        return [
            f"run_dir={tmp_path / 'run'}",
            "platform=cpu",
            f"policy.model_path={model_path}",
            "policy.dtype=fp32",
            f"data.train_path={prompts_path}",
            "train.num_steps=2",
            "rollout.num_prompts_per_step=4",
            "rollout.num_samples_per_prompt=2",
            "rollout.max_response_tokens=8",
            "rollout.embedded.num_threads=1",
            "rollout.embedded.num_slots=8",
            "reward.name=exact_match",
            "reward.num_workers=1",
            "optimizer.lr=1e-3",
            "metrics.progress=false",
            *overrides,
        ]

    return arguments


@pytest.fixture(scope="session")
def train() -> Callable[[list[str]], None]:
    """`train(arguments)`: `megatron-drpo train` in this process; it must end well."""

    def train(arguments: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # torch's launcher leaves log files open
            assert cli.main(["train", *arguments]) == 0
            gc.collect()

    return train
