"""Every rule of the configuration: its message names the key, the value and the rule."""

from __future__ import annotations

import dataclasses
import difflib
import subprocess
import sys
import types
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.config import Anchor, Config, DataConfig, PolicyConfig, TokenCorrection
from megatron_drpo.errors import ConfigError, DrpoError

GOLDEN = Path(__file__).parents[1] / "golden" / "config_keys.txt"


def minimal() -> Config:
    """The smallest configuration without a problem."""
    return Config(data=DataConfig(train_path="train.jsonl"), policy=PolicyConfig(model_path="model"))


def problems_with(**changes: Any) -> list[str]:
    """The problems after setting dotted keys (`a__b=1` sets a.b)."""
    config = minimal()
    for key, value in changes.items():
        *sections, name = key.split("__")
        node: Any = config
        for section in sections:
            node = getattr(node, section)
        assert hasattr(node, name), key
        setattr(node, name, value)
    return list(config.problems())


def test_minimal_configuration_has_no_problem() -> None:
    assert problems_with() == []


def test_what_has_no_default_is_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        Config()
    assert caught.value.problems == (
        "data.train_path is missing: give a JSONL file of prompts",
        "policy.model_path is missing: give an HF model folder",
    )
    assert isinstance(caught.value, DrpoError)
    assert isinstance(caught.value, ValueError)


AT_LEAST_1 = [
    "rollout.sglang.tensor_parallel_size",
    "rollout.sglang.context_length",
    "rollout.sglang.max_total_tokens",
    "rollout.fleet.num_servers",
    "rollout.fleet.max_failures",
    "weight_sync.bucket_bytes",
    "weight_sync.servers_per_group",
    "train.num_steps",
    "train.num_updates_per_step",
    "data.max_prompt_tokens",
    "rollout.num_prompts_per_step",
    "rollout.num_samples_per_prompt",
    "rollout.max_response_tokens",
    "rollout.max_concurrent_requests",
    "rollout.embedded.num_slots",
    "rollout.embedded.num_threads",
    "reward.num_workers",
    "algorithm.loss.num_topk",
    "algorithm.dynamic_sampling.max_rounds",
    "algorithm.horizon_tokens",
    "policy.max_tokens_per_micro_batch",
    "policy.logprob_buffer_bytes",
    "parallel.tensor_parallel_size",
    "parallel.context_parallel_size",
    "parallel.pipeline_parallel_size",
    "parallel.virtual_pipeline_parallel_size",
    "parallel.expert_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.data_parallel_size",
    "checkpoint.keep_last",
    "eval.num_samples_per_prompt",
]
AT_LEAST_0 = [
    "rollout.max_staleness",
    "rollout.oversampling",
    "rollout.fleet.restart_backoff_s",
    "rollout.fleet.first_gpu",
    "weight_sync.verify_every",
    "rollout.num_retries",
    "algorithm.correction.token_low",
    "algorithm.kl.coef",
    "algorithm.entropy_coef",
    "optimizer.min_lr",
    "optimizer.num_warmup_updates",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "checkpoint.save_every_steps",
    "eval.every_steps",
    "eval.temperature",
    "metrics.num_rollouts_dumped",
    "deadlines.start_s",
    "deadlines.rollout_s",
    "deadlines.update_s",
    "deadlines.weight_sync_s",
    "deadlines.checkpoint_s",
    "deadlines.evaluation_s",
]
POSITIVE = [
    "rollout.fleet.health_interval_s",
    "rollout.fleet.health_timeout_s",
    "rollout.fleet.failure_memory_s",
    "weight_sync.timeout_s",
    "rollout.temperature",
    "rollout.request_timeout_s",
    "rollout.startup_timeout_s",
    "rollout.no_server_timeout_s",
    "reward.timeout_s",
    "algorithm.loss.delta",
    "algorithm.loss.epsilon",
    "algorithm.loss.mask_high",
    "algorithm.loss.mask_low",
    "algorithm.loss.ratio_cap",
    "algorithm.loss.clip_high",
    "algorithm.correction.token_high",
    "algorithm.correction.sequence_low",
    "algorithm.correction.sequence_high",
    "algorithm.correction.opsm_delta",
    "parallel.timeout_s",
    "optimizer.lr",
    "optimizer.eps",
]
INTERVALS = (
    ("rollout.top_p", 0.0, "must be in (0, 1]"),
    ("rollout.top_p", 1.5, "must be in (0, 1]"),
    ("eval.top_p", 0.0, "must be in (0, 1]"),
    ("metrics.prometheus_port", 0, "must be in 1..65535"),
    ("metrics.prometheus_port", 65536, "must be in 1..65535"),
    ("algorithm.loss.clip_low", 0.0, "must be in (0, 1]"),
    ("algorithm.loss.clip_low", 1.01, "must be in (0, 1]"),
    ("optimizer.beta1", 1.0, "must be in [0, 1)"),
    ("optimizer.beta2", -0.1, "must be in [0, 1)"),
)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        *((key, 0, "must be at least 1") for key in AT_LEAST_1),
        *((key, -1, "must be at least 0") for key in AT_LEAST_0),
        *((key, 0.0, "must be greater than 0") for key in POSITIVE),
        *INTERVALS,
        ("rollout.top_k", 0, "must be -1 (off) or at least 1"),
        ("algorithm.loss.dual_clip", 1.0, "must be greater than 1"),
    ],
)
def test_value_out_of_range(key: str, value: float, rule: str) -> None:
    assert f"{key}={value}: {rule}" in problems_with(**{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 1) for key in AT_LEAST_1),
        *((key, 0) for key in AT_LEAST_0 if key != "optimizer.min_lr"),
        *((key, 1e-6) for key in POSITIVE if key != "algorithm.correction.token_high"),
        ("metrics.prometheus_port", 1),
        ("metrics.prometheus_port", 65535),
        ("rollout.top_p", 1.0),
        ("rollout.top_k", -1),
        ("rollout.top_k", 1),
        ("optimizer.beta1", 0.0),
        ("algorithm.loss.clip_low", 1.0),
        ("algorithm.loss.dual_clip", None),
        ("algorithm.loss.mask_low", None),
        ("algorithm.loss.ratio_cap", None),
        ("algorithm.correction.token_high", 0.5),
        ("algorithm.correction.sequence_low", None),
        ("algorithm.correction.sequence_high", None),
        ("algorithm.correction.opsm_delta", None),
        ("algorithm.horizon_tokens", None),
    ],
)
def test_value_at_the_edge_of_its_range(key: str, value: float | None) -> None:
    assert problems_with(**{key.replace(".", "__"): value}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"rollout__endpoints": ["http://127.0.0.1:30000"], "rollout__fleet_file": "runs/fleet.json"},
            "rollout.endpoints and rollout.fleet_file exclude each other: give one of them",
        ),
        (
            {"rollout__deterministic": True, "rollout__max_staleness": 1},
            "rollout.max_staleness=1: rollout.deterministic=True needs 0, for what is sampled would depend "
            "on time",
        ),
        (
            {"rollout__endpoints": ["localhost:30000"]},
            "rollout.endpoints: 'localhost:30000' must start with http:// or https://",
        ),
        (
            {"reward__overlong": "soft_penalty"},
            "reward.overlong_buffer_tokens=0: reward.overlong=soft_penalty needs at least 1",
        ),
        (
            {"parallel__sequence_parallel": True},
            "parallel.sequence_parallel=True needs parallel.tensor_parallel_size > 1",
        ),
        (
            {"parallel__virtual_pipeline_parallel_size": 2},
            "parallel.virtual_pipeline_parallel_size=2 needs parallel.pipeline_parallel_size > 1",
        ),
        (
            {"parallel__expert_parallel_size": 4, "parallel__data_parallel_size": 2},
            "parallel.expert_parallel_size * expert_tensor_parallel_size = 4 must divide "
            "tensor_parallel_size * context_parallel_size * data_parallel_size = 2",
        ),
        (
            {"algorithm__correction__token": "tis"},
            "algorithm.correction.token=tis needs algorithm.anchor=recomputed: with anchor=rollout the ratio "
            "of the loss contains the correction already",
        ),
        (
            {"algorithm__correction__token_low": 3.0},
            "algorithm.correction.token_low=3.0: must not exceed token_high=2.0",
        ),
        (
            {"algorithm__correction__sequence_low": 1.1, "algorithm__correction__sequence_high": 0.9},
            "algorithm.correction.sequence_low=1.1: must not exceed sequence_high=0.9",
        ),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr=1.0: must not exceed optimizer.lr=1e-06"),
        ({"eval__every_steps": 5}, "eval.every_steps=5 needs data.eval_path"),
        (
            {"parallel__data_parallel_size": 3, "train__num_updates_per_step": 2},
            "rollout.num_prompts_per_step=64 must be a multiple of "
            "parallel.data_parallel_size * train.num_updates_per_step = 6",
        ),
    ],
)
def test_rule_between_keys(changes: dict[str, Any], problem: str) -> None:
    for key, value in changes.items():
        default = value_of(minimal(), key)
        changes[key] = type(default)(value) if isinstance(default, StrEnum) else value
    assert problems_with(**changes) == [problem]


@pytest.mark.parametrize(
    ("token", "anchor"),
    [
        ("tis", "recomputed"),
        ("mis", "recomputed"),
        ("icepop", "recomputed"),
        ("mis", "rollout"),
        ("icepop", "rollout"),
    ],
)
def test_corrections_that_an_anchor_allows(token: str, anchor: str) -> None:
    changes = {"algorithm__correction__token": TokenCorrection(token), "algorithm__anchor": Anchor(anchor)}
    assert problems_with(**changes) == []


def value_of(config: Config, key: str) -> Any:
    node: Any = config
    for name in key.split("__"):
        node = getattr(node, name)
    return node


def test_every_range_is_tested_above() -> None:
    """A number without a rule in this file is free on purpose."""
    numbers = {key for key, kind in config_fields(Config) if {int, float} & set(kinds(kind))}
    tested = {*AT_LEAST_1, *AT_LEAST_0, *POSITIVE, *(key for key, _, _ in INTERVALS)}
    tested |= {"rollout.top_k", "algorithm.loss.dual_clip", "reward.overlong_buffer_tokens"}
    assert numbers - tested == {"seed"}


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_with(train__num_steps=0, rollout__top_p=2.0, optimizer__lr=-1.0, data__train_path="")
    assert [problem.split(":")[0].split(" ")[0] for problem in problems] == [
        "train.num_steps=0",
        "data.train_path",
        "rollout.top_p=2.0",
        "optimizer.lr=-1.0",
        "optimizer.min_lr=0.0",
    ]


def test_world_size_counts_ranks() -> None:
    config = minimal()
    config.parallel.tensor_parallel_size = 2
    config.parallel.context_parallel_size = 5
    config.parallel.pipeline_parallel_size = 3
    config.parallel.data_parallel_size = 4
    config.parallel.expert_parallel_size = 8
    assert config.parallel.world_size == 120


def test_enum_names_are_their_values() -> None:
    """omegaconf 2.3 matches members by name; people write values."""
    enums = {
        kind for _, declared in config_fields(Config) for kind in kinds(declared) if issubclass(kind, StrEnum)
    }
    assert len(enums) > 5
    for enum in enums:
        assert [member.name for member in enum] == [member.value for member in enum]


def config_fields(schema: type, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, declared type) of every leaf, in declared order."""
    hints = typing.get_type_hints(schema)
    leaves: list[tuple[str, Any]] = []
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[f.name]):
            leaves += config_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            leaves.append((f"{prefix}{f.name}", hints[f.name]))
    return leaves


def kinds(declared: Any) -> list[type]:
    """The plain classes of a declared type: int of `int | None`."""
    members = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    return [member for member in members if isinstance(member, type)]


def default_of(key: str) -> str:
    schema: Any = Config
    *sections, name = key.split(".")
    for section in sections:
        schema = typing.get_type_hints(schema)[section]
    (f,) = (f for f in dataclasses.fields(schema) if f.name == name)
    if f.default_factory is not dataclasses.MISSING:
        return repr(f.default_factory())
    return f.default.value if isinstance(f.default, StrEnum) else repr(f.default)


def test_keys_and_defaults_are_those_on_record() -> None:
    """A knob that comes, goes or changes its default shows up in review as a changed line."""
    current = [f"{key} = {default_of(key)}" for key, _ in config_fields(Config)]
    recorded = GOLDEN.read_text().splitlines()
    if current != recorded:
        changes = difflib.unified_diff(recorded, current, "on record", "now", lineterm="", n=0)
        pytest.fail("\n".join([*changes, f"If that is meant, change {GOLDEN}"]), pytrace=False)


def test_configuration_is_checked_without_heavy_imports() -> None:
    heavy = {"torch", "megatron", "transformers", "numpy"}
    code = f"import sys, megatron_drpo.config_io; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
