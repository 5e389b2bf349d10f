"""What is checked before anything starts; the messages of real damage are in tests/integration."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

from megatron_drpo.config.schema import (
    Advantage,
    AlgorithmConfig,
    Anchor,
    CheckpointConfig,
    Config,
    DataConfig,
    DynamicSamplingConfig,
    FleetConfig,
    KlConfig,
    LossConfig,
    Mode,
    Overlong,
    ParallelConfig,
    Placement,
    PlatformName,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    RolloutEngineName,
    RoutingReplay,
    SGLangServerConfig,
    TrainConfig,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.errors import ConfigError
from megatron_drpo.launch.check import _check_gpus, check_config, refuse_problems, warn_config


@pytest.fixture
def config(hf_model: Callable[[str], Path], tmp_path: Path) -> Config:
    """Of a run that can start."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return Config(
        data=DataConfig(train_path=str(prompts)), policy=PolicyConfig(model_path=str(hf_model("moe")))
    )


def test_a_run_that_can_start(config: Config) -> None:
    assert check_config(config) == []
    assert warn_config(config) == []


def test_problems_of_every_kind_come_together(config: Config, tmp_path: Path) -> None:
    config.policy = replace(config.policy, megatron_overrides={"moe_topk": 1})
    config.parallel = ParallelConfig(pipeline_parallel_size=3)
    config.data = DataConfig(train_path=str(tmp_path / "no.jsonl"), eval_path=str(tmp_path / "gone.jsonl"))
    config.algorithm = AlgorithmConfig(loss=LossConfig(name="none"))
    config.reward = RewardConfig(name="other")
    config.checkpoint = CheckpointConfig(load_path=str(tmp_path / "nowhere"))
    expected = ["moe_topk", "num_hidden_layers, 4", "no.jsonl", "gone.jsonl", "none: unknown", "reward.name"]
    expected.append("nowhere: no such folder")
    problems = check_config(config)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem


def test_warnings_come_with_problems(config: Config) -> None:
    config.algorithm = AlgorithmConfig(loss=LossConfig(delta=2.0))
    refuse_problems(config, [])
    with pytest.raises(ConfigError) as caught:
        refuse_problems(config, ["a=1: is wrong"])
    assert caught.value.problems == ("a=1: is wrong",)
    first, warning = str(caught.value).splitlines()
    assert first == "a=1: is wrong"
    assert warning.startswith("warning: algorithm.loss.delta=2.0: ")


@pytest.mark.parametrize("loss", [LossConfig(name="none"), LossConfig(delta=math.nan), LossConfig(delta=0.0)])
def test_warnings_of_what_is_not_broken(config: Config, loss: LossConfig) -> None:
    config.algorithm = AlgorithmConfig(loss=loss)
    config.rollout = RolloutConfig(top_k=8)
    (warning,) = warn_config(config)
    assert warning.startswith("rollout.top_k=8: ")
    config.rollout = RolloutConfig(top_k=10**5000)
    (warning,) = warn_config(config)
    assert warning.startswith("rollout.top_k=(a number of over 4300 digits): ")


def test_sft_needs_responses_and_neither_loss_nor_reward(config: Config, tmp_path: Path) -> None:
    config.train = TrainConfig(mode=Mode.sft)
    config.algorithm = AlgorithmConfig(loss=LossConfig(name="none", delta=3.0))
    config.reward = RewardConfig(name="other")
    config.data.eval_path = str(tmp_path / "gone.jsonl")
    (problem,) = check_config(config)
    assert "line 1" in problem
    assert "response" in problem
    Path(config.data.train_path).write_text('{"prompt": "1+1=", "response": "2"}\n')
    assert check_config(config) == []
    assert warn_config(config) == []


def test_a_users_reward_may_do_without_answers(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(config.data.train_path).write_text('{"prompt": "Tell a joke."}\n')
    (problem,) = check_config(config)
    assert "answer" in problem
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "humour.py").write_text("def score(rollout): return 1.0\n")
    config.reward = RewardConfig(name="humour:score")
    assert check_config(config) == []


def test_prompts_are_read_as_the_run_reads_them(config: Config) -> None:
    """With the model's tokenizer, unless another process does it."""
    line = '{"messages": [{"role": "user", "content": "1+1="}], "answer": "2"}\n'
    Path(config.data.train_path).write_text('{"prompt": "1+1=", "answer": "2"}\n' + line)
    (problem,) = check_config(config)
    assert problem.startswith(f"{config.data.train_path} line 2: `messages` needs a chat template")
    assert check_config(config, reads_prompts=False) == []


def test_ground_truths_are_parsed(config: Config) -> None:
    lines = ['{"prompt": "1+1=", "answer": "$2"}', '{"prompt": "1+1=", "answer": "2 \\\\frac{"}']
    Path(config.data.train_path).write_text("\n".join(lines))
    (problem,) = check_config(config)
    assert problem == (
        f"{config.data.train_path} line 2: expected an `answer` that math-verify can parse, "
        r"found '2 \\frac{'"
    )
    config.reward = RewardConfig(name="exact_match")
    assert check_config(config) == []


def test_a_damaged_tokenizer(config: Config, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(config.policy.model_path, tmp_path / "model"))
    (folder / "tokenizer.json").write_text('{"model": 3}')
    config.policy = PolicyConfig(model_path=str(folder))
    Path(config.data.train_path).write_text("{\n")
    model, prompts = check_config(config)
    assert model.startswith(f"policy.model_path: {folder}: no tokenizer can be loaded: ")
    assert prompts.startswith(f"{config.data.train_path} line 1: expected a JSON object")


def test_a_damaged_model_hides_no_other_problem(
    config: Config, tmp_path: Path, hf_model: Callable[[str], Path]
) -> None:
    folder = Path(shutil.copytree(hf_model("moe"), tmp_path / "model"))
    os.truncate(folder / "model.safetensors", 1000)
    config.policy = PolicyConfig(model_path=str(folder))
    config.algorithm = AlgorithmConfig(loss=LossConfig(name="none"))
    model, loss = check_config(config)
    assert model.startswith("policy.model_path: ")
    assert "model.safetensors" in model
    assert loss.startswith("algorithm.loss.name=none")


def test_a_head_of_its_own_beside_tied_embeddings(
    config: Config, tmp_path: Path, hf_model: Callable[[str], Path]
) -> None:
    """Of the policy and of the reference policy."""
    folder = Path(shutil.copytree(hf_model("dense_tied"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, folder / "model.safetensors")
    config.policy = PolicyConfig(model_path=str(folder))
    assert check_config(config) == []
    save_file({**tensors, "lm_head.weight": copy + 1}, folder / "model.safetensors")
    config.algorithm = AlgorithmConfig(kl=KlConfig(coef=0.1, reference_path=str(folder)))
    (policy,) = check_config(config)
    assert policy.startswith("policy.model_path: ")
    assert "'lm_head.weight'" in policy
    config.policy = PolicyConfig(model_path=str(hf_model("dense_tied")))
    (reference,) = check_config(config)
    assert reference.startswith("algorithm.kl.reference_path: ")
    assert "'lm_head.weight'" in reference


def test_a_checkpoint_to_start_from(config: Config, tmp_path: Path) -> None:
    """A wrong one is reported beside other problems, with and without a model to compare with."""
    weights = tmp_path / "weights"
    tensors = {"embedding.word_embeddings.weight": torch.zeros(128, 32)}
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save(tensors, checkpoint_id=weights, no_dist=True)
    (weights / "metadata.json").write_text("{}")
    config.policy = replace(config.policy, weights_path=str(tmp_path / "nowhere"))
    config.reward = RewardConfig(name="other")
    nowhere, reward = check_config(config)
    assert nowhere.startswith(f"policy.weights_path: {tmp_path / 'nowhere'}: no such folder")
    assert reward.startswith("reward.name")
    config.policy.weights_path = str(weights)
    other, _ = check_config(config)
    assert other.startswith(
        f"policy.weights_path: {weights} is not a checkpoint of this model: "
        "tensor 'embedding.word_embeddings.weight': expected shape [101, 64], found [128, 32]; "
    )
    config.policy.model_path = str(tmp_path / "gone")
    model, _ = check_config(config)
    assert model.startswith("policy.model_path: ")
    config.policy.weights_path = str(tmp_path / "nowhere")
    model, nowhere, _ = check_config(config)
    assert nowhere.startswith("policy.weights_path: ")


@pytest.mark.parametrize(
    ("rollout", "delta", "expected"),
    [
        (RolloutConfig(top_p=0.5), 0.1, ["rollout.top_p=0.5"]),
        (RolloutConfig(top_k=8), 0.1, ["rollout.top_k=8"]),
        (RolloutConfig(), 1.0, ["algorithm.loss.delta=1.0"]),
        (RolloutConfig(top_k=8), 2.0, ["algorithm.loss.delta=2.0", "rollout.top_k=8"]),
    ],
)
def test_warnings(config: Config, rollout: RolloutConfig, delta: float, expected: list[str]) -> None:
    config.rollout = rollout
    config.algorithm = AlgorithmConfig(loss=LossConfig(delta=delta))
    found = warn_config(config)
    assert len(found) == len(expected)
    for warning, text in zip(found, expected, strict=True):
        assert text in warning


@pytest.mark.parametrize(
    ("rollout", "reward", "algorithm", "expected"),
    [
        ({"num_samples_per_prompt": 1}, {}, {}, ["algorithm.advantage=group_mean: a sample that is its own"]),
        ({"num_samples_per_prompt": 1}, {}, {"advantage": Advantage.uncentred}, []),
        (
            {"num_samples_per_prompt": 1},
            {},
            {"advantage": Advantage.uncentred, "dynamic_sampling": DynamicSamplingConfig(enabled=True)},
            ["algorithm.dynamic_sampling.enabled=True needs rollout.num_samples_per_prompt of at least 2"],
        ),
        ({"num_samples_per_prompt": 2}, {}, {"dynamic_sampling": DynamicSamplingConfig(enabled=True)}, []),
        ({}, {}, {"loss": LossConfig(name="dppo_topk_tv", num_topk=101)}, []),
        (
            {},
            {},
            {"loss": LossConfig(name="dppo_topk_tv", num_topk=102)},
            ["algorithm.loss.num_topk=102: must not exceed the model's vocab_size, 101"],
        ),
        ({}, {}, {"loss": LossConfig(name="drpo", num_topk=102)}, []),
        (
            {"max_response_tokens": 8},
            {"overlong": Overlong.soft_penalty, "overlong_buffer_tokens": 9},
            {},
            ["reward.overlong_buffer_tokens=9: must not exceed rollout.max_response_tokens=8"],
        ),
        (
            {"max_response_tokens": 8},
            {"overlong": Overlong.soft_penalty, "overlong_buffer_tokens": 8},
            {},
            [],
        ),
    ],
)
def test_settings_that_do_not_go_together(
    config: Config,
    rollout: dict[str, Any],
    reward: dict[str, Any],
    algorithm: dict[str, Any],
    expected: list[str],
) -> None:
    config.rollout = RolloutConfig(**rollout)
    config.reward = RewardConfig(**reward)
    config.algorithm = AlgorithmConfig(**algorithm)
    problems = check_config(config)
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem
    Path(config.data.train_path).write_text('{"prompt": "1+1=", "response": "2"}\n')
    config.train = TrainConfig(mode=Mode.sft)
    assert check_config(config) == [], "nothing of this matters without rollouts"


@pytest.mark.parametrize(
    ("rollout", "sync", "expected"),
    [
        ({"function": "nowhere:solve"}, {}, ["rollout.function=nowhere:solve"]),
        ({"engine": RolloutEngineName.sglang}, {}, ["rollout.sglang.python=.venv-none/python: no such file"]),
        (
            {"engine": RolloutEngineName.sglang, "deterministic": True},
            {},
            ["no such file", "rollout.deterministic=True: SGLang's deterministic inference needs a GPU"],
        ),
        ({"engine": RolloutEngineName.sglang, "endpoints": ["http://there"]}, {}, []),
        (
            {"fleet": FleetConfig(placement=Placement.ray), "colocated": True},
            {},
            ["rollout.fleet.placement=ray: rollout.colocated=True needs servers on the trainer's own GPUs"],
        ),
        ({"fleet": FleetConfig(placement=Placement.ray)}, {}, []),
        ({}, {"path": WeightSyncPath.distributed}, ["weight_sync.path=distributed needs rollout.engine=sg"]),
        ({"endpoints": ["http://there"]}, {"path": WeightSyncPath.distributed, "host": "here"}, []),
    ],
)
def test_servers_that_cannot_be_as_wanted(
    config: Config, rollout: dict[str, Any], sync: dict[str, Any], expected: list[str]
) -> None:
    config.platform = PlatformName.cpu
    config.rollout = RolloutConfig(sglang=SGLangServerConfig(python=".venv-none/python"), **rollout)
    config.weight_sync = WeightSyncConfig(**sync)
    problems = check_config(config)
    assert len(problems) == len(expected), problems
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem


def test_weights_that_cannot_reach_the_servers(config: Config) -> None:
    """Beside other problems; SGLang's servers end when they are given a handle of another machine."""
    config.platform = PlatformName.cuda
    config.rollout = RolloutConfig(endpoints=["http://node-1:30000"], num_samples_per_prompt=1)
    config.weight_sync = WeightSyncConfig(path=WeightSyncPath.tensor)
    group, sync = check_config(config)
    assert "http://node-1:30000 cannot open them: not on this machine" in sync
    assert check_config(config, sends_weights=False) == [group]


@pytest.mark.parametrize(
    ("num_gpus", "fields", "needed"),
    [
        (8, {"fleet": FleetConfig(num_servers=2)}, None),
        (7, {"fleet": FleetConfig(num_servers=2)}, 8),
        (4, {"colocated": True, "fleet": FleetConfig(num_servers=2)}, None),
        (3, {"colocated": True, "fleet": FleetConfig(num_servers=2)}, 4),
        (6, {"fleet": FleetConfig(num_servers=2, first_gpu=2)}, None),
        (5, {"fleet": FleetConfig(num_servers=2, first_gpu=2)}, 6),
    ],
)
def test_gpus_for_trainer_and_servers(
    config: Config, num_gpus: int, fields: dict[str, Any], needed: int | None
) -> None:
    """4 ranks, and 2 servers of 2 GPUs each."""
    config.parallel = ParallelConfig(data_parallel_size=4)
    sglang = SGLangServerConfig(tensor_parallel_size=2)
    config.rollout = RolloutConfig(sglang=sglang, **fields)
    problems = _check_gpus(config, num_gpus)
    assert (problems == []) == (needed is None)
    assert all(f"they need {needed}, this machine has {num_gpus}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("replay", "changes", "expected"),
    [
        (RoutingReplay.rollout, {}, []),
        (RoutingReplay.recomputed, {}, ["needs algorithm.anchor=recomputed"]),
        (RoutingReplay.recomputed, {"algorithm": AlgorithmConfig(anchor=Anchor.recomputed)}, []),
        (
            RoutingReplay.recomputed,
            {"train": TrainConfig(mode=Mode.sft), "algorithm": AlgorithmConfig(anchor=Anchor.recomputed)},
            ["train.mode=sft has no pass whose routes could be replayed"],
        ),
    ],
)
def test_routes_that_cannot_be_replayed(
    config: Config, replay: RoutingReplay, changes: dict[str, Any], expected: list[str]
) -> None:
    Path(config.data.train_path).write_text('{"prompt": "1+1=", "answer": "2", "response": "2"}\n')
    config.policy = replace(config.policy, routing_replay=replay)
    for name, section in changes.items():
        setattr(config, name, section)
    problems = check_config(config)
    assert len(problems) == len(expected), problems
    for problem, text in zip(problems, expected, strict=True):
        assert problem.startswith(f"policy.routing_replay={replay}")
        assert text in problem


def test_a_dense_model_has_no_routes(config: Config, hf_model: Callable[[str], Path]) -> None:
    config.policy = PolicyConfig(model_path=str(hf_model("dense")), routing_replay=RoutingReplay.recomputed)
    config.algorithm = AlgorithmConfig(anchor=Anchor.recomputed)
    (problem,) = check_config(config)
    assert "has no experts" in problem


def test_dropping_what_uncentred_advantages_would_learn_from(config: Config) -> None:
    config.algorithm = AlgorithmConfig(
        advantage=Advantage.uncentred, dynamic_sampling=DynamicSamplingConfig(enabled=True)
    )
    (warning,) = warn_config(config)
    assert "groups of equal rewards are dropped" in warning


def test_a_model_without_a_tokenizer(config: Config, tmp_path: Path, hf_model: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(hf_model("moe"), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    config.policy = PolicyConfig(model_path=str(folder))
    (problem,) = check_config(config)
    assert "no tokenizer" in problem
    assert str(folder) in problem
