"""A whole run through the command line: two ranks (EP2), one embedded server, real Megatron, real HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from megatron_drpo.checkpoint.checkpointer import Checkpointer
from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import Config, ParallelConfig
from megatron_drpo.data.tokenizer import load_tokenizer
from megatron_drpo.platform.base import Platform
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.policy import Policy
from megatron_drpo.weights.hf_folder import HfFolder

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.distributed, pytest.mark.timeout(200)]

NUM_STEPS = 3
REWARD = """
def score(rollout):
    return sum(character.isdigit() for character in rollout.text) / len(rollout.response_ids)
"""
ALWAYS = {
    "reward/mean",
    "reward/std",
    "response/length_mean",
    "response/truncated_share",
    "loss/value",
    "optimizer/grad_norm",
    "optimizer/lr",
    "policy/entropy",
    "policy/kl_k3",
    "policy/ess",
    "mismatch/logprob_abs_mean",
    "trust_region/w_histogram",
    "time/step_s",
    "time/rollout_s",
    "time/forward_backward_s",
    "time/weight_sync_s",
    "time/overhead_share",
    "throughput/tokens_per_s",
}


@pytest.fixture(scope="module")
def run_dir(
    train: Callable[[list[str]], None],
    tmp_path_factory: pytest.TempPathFactory,
    model_path: Path,
    prompts_path: Path,
) -> Path:
    """The folder of a run that has ended well; processes it started are gone."""
    path = tmp_path_factory.mktemp("train") / "run"
    held_out = path.parent / "held_out.jsonl"
    held_out.write_text("".join(prompts_path.read_text().splitlines(keepends=True)[:6]))
    (path.parent / "digit_share.py").write_text(REWARD)
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # where reward modules are looked for
        train(
            [
                f"run_dir={path}",
                "platform=cpu",
                f"policy.model_path={model_path}",
                "policy.dtype=fp32",
                "policy.routing_replay=rollout",
                "policy.max_tokens_per_micro_batch=48",
                f"data.train_path={prompts_path}",
                f"data.eval_path={held_out}",
                f"train.num_steps={NUM_STEPS}",
                "rollout.num_prompts_per_step=8",
                "rollout.num_samples_per_prompt=4",
                "rollout.max_response_tokens=6",
                "rollout.temperature=0.8",
                "rollout.deterministic=true",
                "rollout.embedded.num_threads=1",
                "parallel.data_parallel_size=2",
                "parallel.expert_parallel_size=2",
                "reward.name=digit_share:score",
                "reward.num_workers=1",
                "reward.keep_special_tokens=true",
                "algorithm.advantage=uncentred",
                "optimizer.lr=3e-3",
                "checkpoint.save_every_steps=1",
                "checkpoint.keep_last=2",
                "eval.every_steps=3",
                "metrics.num_rollouts_dumped=5",
            ]
        )
    left = set(psutil.Process().children(recursive=True)) - before
    commands = [" ".join(child.cmdline()) for child in left]
    assert not [command for command in commands if "megatron_drpo" in command]
    return path


@pytest.fixture(scope="module")
def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def config(run_dir: Path) -> Config:
    """As it was saved with the run, for one rank."""
    loaded = load_config([f"config={run_dir / 'config.yaml'}"])
    loaded.parallel = ParallelConfig()
    return loaded


def test_metrics(metrics: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert [line["step"] for line in metrics if "eval/accuracy" in line] == [0, 3]
    assert {line["eval/num_samples"] for line in metrics if "eval/accuracy" in line} == {6}
    for line in metrics[1:]:
        assert line.keys() >= ALWAYS
        assert line["data/num_samples"] == 32
        assert 0 <= line["time/overhead_share"] <= 1


def test_the_policy_scores_tokens_as_the_server_sampled_them(metrics: list[dict[str, Any]]) -> None:
    """One update per step, so pi = mu when it is made: a missed or wrong weight update would show at once.
    The routers agree but for ties, which are replayed."""
    for line in metrics[1:]:
        assert line["routing/agreement"] > 0.99
        assert line["mismatch/logprob_abs_mean"] < 1e-5
        assert line["mismatch/logprob_abs_max"] < 5e-5
        assert line["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert line["reward/mean"] > 0
        assert line["optimizer/grad_norm"] > 0
    entropies = [line["policy/entropy"] for line in metrics[1:]]
    assert max(entropies) - min(entropies) > 1e-3  # the weights did change


def test_rollouts_tell_versions(run_dir: Path) -> None:
    """Step n samples with the weights of n - 1 publications."""
    for step in range(1, NUM_STEPS + 1):
        lines = (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 5
        for record in records:
            assert record["policy_versions"] == [[step - 1, record["response_tokens"]]]
            assert record["response_tokens"] <= 6
    assert "<html" in (run_dir / "rollouts" / "index.html").read_text()


def test_special_tokens_are_in_the_texts(run_dir: Path, model_path: Path) -> None:
    special = load_tokenizer(str(model_path)).all_special_tokens
    lines = [
        line for path in (run_dir / "rollouts").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    responses = [json.loads(line)["response"] for line in lines]
    assert any(token in response for token in special for response in responses)


def test_what_the_folder_holds(run_dir: Path) -> None:
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").iterdir())
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_000003"
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())
    assert names == ["step_000002", "step_000003"]
    state = json.loads((run_dir / "checkpoints" / "step_000003" / "run_state.json").read_text())
    assert (state["step"], state["policy_version"], state["num_updates"]) == (3, 3, 3)
    assert state["metrics_position"] == (run_dir / "metrics.jsonl").stat().st_size


def test_the_export_is_the_last_checkpoint(
    run_dir: Path, config: Config, cpu_platform: Platform, one_rank: ParallelState
) -> None:
    """Bit for bit, read back on one rank instead of two; and it is not what the run began with."""
    policy = Policy(config, cpu_platform, one_rank)
    Checkpointer(config.run_dir, config.checkpoint).load(run_dir / "checkpoints" / "step_000003", policy)
    exported, before = HfFolder(run_dir / "hf"), HfFolder(config.policy.model_path)
    for name, tensor in policy.hf_tensors():
        assert torch.equal(exported.get(name), tensor), name
    assert list(exported) == list(before)
    moved = [name for name in exported if not torch.equal(exported.get(name), before.get(name))]
    assert moved == list(exported)


def test_transformers_loads_the_export(run_dir: Path, model_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)
    tokenizer = load_tokenizer(str(run_dir / "hf"))
    original = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("1+2=")])
    with torch.no_grad():
        change = (model(ids).logits - original(ids).logits).abs().max()
    assert change > 1e-2


def test_a_run_starts_from_a_checkpoint(
    train: Callable[[list[str]], None],
    run_dir: Path,
    run_arguments: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """Of the run above, on one rank instead of two: the server, which started from model_path, has the
    checkpoint's weights before it samples for the first time, and the policy goes on from them."""
    train(
        run_arguments(
            f"policy.weights_path={run_dir}",
            "policy.routing_replay=rollout",
            "train.num_steps=1",
            "optimizer.lr=1e-9",
            "rollout.deterministic=true",
        )
    )
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["mismatch/logprob_abs_mean"] < 1e-5
    assert line["mismatch/logprob_abs_max"] < 5e-5
    found, expected = HfFolder(tmp_path / "run" / "hf"), HfFolder(run_dir / "hf")
    for name in expected:
        torch.testing.assert_close(found.get(name), expected.get(name), atol=1e-7, rtol=0)
