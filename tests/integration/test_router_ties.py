"""Router logits that are equal within rounding: server and trainer choose different experts of the same
weights, and replaying the server's choices tells that apart from stale weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.fault_run import count_ties, find_mismatches

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
GROUP_SIZE = 4
"""Experts with the same router row, but for rounding: more than the two that a token goes to."""
ROUNDING = 2.0**-24
"""Half a unit in the last place of fp32, relative."""


@pytest.fixture(scope="module")
def tied_model_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with routers that cannot decide: every token's best experts are four, not two."""
    path = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(model_path, path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    gates = [name for name in tensors if name.endswith("mlp.gate.weight")]
    assert gates
    for name in gates:
        first = tensors[name][::GROUP_SIZE].double().repeat_interleave(GROUP_SIZE, 0)
        noise = ROUNDING * torch.randn(first.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (first * (1 + noise)).float()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_ties_vanish_when_the_servers_experts_are_replayed(
    train: Callable[[list[str]], None],
    run_arguments: Callable[..., list[str]],
    tied_model_path: Path,
    tmp_path: Path,
) -> None:
    """Under the same weights: with other experts nearly every logprob is another."""
    for replay in ("none", "rollout"):
        arguments = (f"policy.model_path={tied_model_path}", f"policy.routing_replay={replay}")
        train(run_arguments(*arguments, f"run_dir={tmp_path / replay}", "train.num_steps=1"))
    [own], [replayed] = read_metrics(tmp_path / "none"), read_metrics(tmp_path / "rollout")
    assert own["mismatch/logprob_abs_mean"] > 1e-2
    assert replayed["routing/agreement"] < 0.9
    assert find_mismatches([replayed | {"routing/agreement": 1.0}]) == []
    [problem] = find_mismatches([replayed])
    assert "too many for ties" in problem
    share = 1 - replayed["routing/agreement"]
    num_choices, num_ties = count_ties([replayed])
    assert num_ties / num_choices == pytest.approx(share, abs=1 / num_choices)


def test_stale_weights_do_not(
    train: Callable[[list[str]], None],
    run_arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the second step on, tokens are of the weights before the latest update, as they say."""
    monkeypatch.chdir(ROOT)  # where the reward is looked for
    arguments = ("policy.routing_replay=rollout", "rollout.max_staleness=1", "train.num_steps=3")
    train(run_arguments(*arguments, "reward.name=tools.digit_reward:digit_share"))
    first, *later = read_metrics(tmp_path / "run")
    assert find_mismatches([first]) == []
    for step in later:
        assert step["rollout/staleness_max"] == 1
        assert f"step {step['step']}: |logprobs - rollout_logprobs| is" in find_mismatches([step])[0]
