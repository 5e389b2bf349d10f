"""A whole run over real SGLang servers, with each way of weight sync."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_drpo.fleet.fleet import Fleet
from tools.tiny_model import write_tiny_moe

ROOT = Path(__file__).parents[2]
MAX_MISMATCH = 1e-5
MIN_AGREEMENT = 0.99
NUM_PROMPTS = 8


@pytest.fixture(scope="module")
def arithmetic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows the quickstart's prompts."""
    path = tmp_path_factory.mktemp("model")
    write_tiny_moe(path)
    return path


@pytest.fixture(scope="module")
def fleet(start_fleet: Callable[..., Fleet], arithmetic_model: Path) -> Fleet:
    return start_fleet(arithmetic_model)


@pytest.mark.sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("path", "max_staleness", "colocated"),
    [("tensor", 0, False), ("distributed", 1, False), ("disk", 2, False), ("tensor", 0, True)],
)
def test_tokens_are_those_of_the_trainers_weights(
    fleet: Fleet, arithmetic_model: Path, tmp_path: Path, path: str, max_staleness: int, colocated: bool
) -> None:
    """EP2 over each way of weight sync, verified by checksum, and taking turns in memory; the trainer
    computes all logprobs again."""
    arguments = [
        *(
            "platform=cpu",
            f"run_dir={tmp_path / 'run'}",
            "data.train_path=examples/data/arithmetic_train.jsonl",
        ),
        *(f"policy.model_path={arithmetic_model}", "policy.dtype=fp32", "optimizer.lr=1e-3"),
        "policy.routing_replay=rollout",  # a router's tie is no other version of the weights
        *(f"rollout.fleet_file={fleet.path}", f"rollout.max_staleness={max_staleness}"),
        *(f"rollout.colocated={colocated}", "checkpoint.save_every_steps=2"),
        *(f"weight_sync.path={path}", "weight_sync.verify_every=1"),
        *("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2", "train.num_steps=4"),
        *(f"rollout.num_prompts_per_step={NUM_PROMPTS}", "rollout.num_samples_per_prompt=4"),
        *("rollout.max_response_tokens=16", "reward.name=tools.digit_reward:digit_share"),
        *("reward.num_workers=1", "checkpoint.export_hf=false", "metrics.tensorboard=false"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_drpo.cli", "train", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fenced" not in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for number, step in enumerate(steps):
        assert step["rollout/staleness_max"] <= min(number, max_staleness)
    assert (steps[-1]["rollout/staleness_max"] > 0) == (max_staleness > 0)
    for step in steps:
        if max_staleness == 0:  # else the weights have changed since
            assert step["mismatch/first_update_logprob_abs_mean"] <= MAX_MISMATCH
            assert step["routing/agreement"] > MIN_AGREEMENT
        assert step["optimizer/grad_norm"] > 0
