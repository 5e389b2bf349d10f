"""Runs whose trainer and server take turns in memory, beside the same runs without: not a bit differs.

The embedded server fills the weights that it takes back with NaN, so a weight that is not published again
shows at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo import cli
from megatron_drpo.weights.hf_folder import HfFolder

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.distributed, pytest.mark.timeout(200)]

SAME = ("reward/mean", "loss/value", "optimizer/grad_norm", "policy/entropy", "eval/accuracy")


@pytest.fixture
def metrics_of(
    train: Callable[[list[str]], None], run_arguments: Callable[..., list[str]], prompts_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """`metrics_of(run_dir, "key=value", ...)`: of a deterministic run of 3 steps on two ranks."""

    def run(run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
        arguments = run_arguments(
            f"run_dir={run_dir}",
            f"data.eval_path={prompts_path}",
            "data.shuffle=false",
            "train.num_steps=3",
            "rollout.deterministic=true",
            "parallel.data_parallel_size=2",
            "parallel.expert_parallel_size=2",
            "reward.name=tools.digit_reward:digit_share",
            "algorithm.kl.coef=0.05",
            "eval.every_steps=2",
            "checkpoint.save_every_steps=1",
            *overrides,
        )
        train(arguments)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return run


def test_not_a_bit_differs(metrics_of: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    """Also after a restart from a checkpoint."""
    apart = metrics_of(tmp_path / "apart")
    metrics_of(tmp_path / "together", "rollout.colocated=true", "train.num_steps=2")
    together = metrics_of(tmp_path / "together", "rollout.colocated=true")
    assert [line["step"] for line in together] == [line["step"] for line in apart] == [0, 1, 2, 3]
    for expected, found in zip(apart, together, strict=True):
        if found["step"] == 2:  # the first run ended here, and evaluated as every run does at its end
            found = {name: value for name, value in found.items() if not name.startswith("eval/")}
        for name in SAME:
            assert found.get(name, expected.get(name)) == expected.get(name), (found["step"], name)
        assert ("time/handover_s" in found) == (found["step"] > 0)
    exported = [HfFolder(tmp_path / name / "hf") for name in ("apart", "together")]
    for name in exported[0]:
        assert torch.equal(exported[0].get(name), exported[1].get(name)), name


def test_it_excludes_sampling_ahead(run_arguments: Callable[..., list[str]], capsys: Any) -> None:
    arguments = run_arguments("rollout.colocated=true", "rollout.max_staleness=1")
    assert cli.main(["train", *arguments]) != 0
    assert "rollout.colocated=True needs 0" in capsys.readouterr().err
