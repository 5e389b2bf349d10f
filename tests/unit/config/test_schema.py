"""Every rule of the configuration: its message names the key, the value and the rule."""

from __future__ import annotations

import dataclasses
import difflib
import math
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.config.limits import Limits, Section
from megatron_drpo.config.schema import Anchor, Config, DataConfig, PolicyConfig, TokenCorrection
from megatron_drpo.errors import ConfigError, DrpoError

GOLDEN = Path(__file__).parents[2] / "golden" / "config_keys.txt"


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


def numbers_of(section: Section, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(key, field, declared type) of everything that holds numbers."""
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if isinstance(value, Section):
            yield from numbers_of(value, f"{prefix}{f.name}.")
        elif {int, float} & {hints[f.name], *typing.get_args(hints[f.name])}:
            yield f"{prefix}{f.name}", f, hints[f.name]


NUMBERS = {key: (f, declared) for key, f, declared in numbers_of(minimal())}
OTHER_RULES = {
    "optimizer.lr": {1e-12},
    "optimizer.min_lr": {1},
    "algorithm.correction.token_low": {1000},
    "algorithm.correction.token_high": {0.001},
    "eval.every_steps": {10**7},
    "train.num_updates_per_step": {10_000},
    **{f"parallel.{name}_parallel_size": {65_536} for name in ("data", "virtual_pipeline", "expert")},
    "parallel.expert_tensor_parallel_size": {65_536},
}
"""Key -> values at an edge of its limits that do not go together with the other keys' defaults."""


def test_every_number_declares_its_limits() -> None:
    assert len(NUMBERS) > 80
    assert [key for key, (f, _) in NUMBERS.items() if Limits not in f.metadata] == []


@pytest.mark.parametrize("key", NUMBERS)
def test_what_no_number_may_be(key: str) -> None:
    f, declared = NUMBERS[key]
    limits = f.metadata[Limits]
    is_list = declared == list[int]
    is_whole = int in {declared, *typing.get_args(declared)}
    absurd = [math.nan, math.inf, -math.inf, 10**22, -(10**22), 10**400, 10**5000, True, "1"]
    beyond = [limits.at_least - 1, limits.at_most + 1]
    for value in [*absurd, *beyond, *([limits.at_least + 0.5] if is_whole else [])]:
        problem, *_ = problems_with(**{key.replace(".", "__"): [value] if is_list else value})
        assert problem.startswith(f"{key}=")
        assert ": must be " in problem
        assert f"at least {limits.at_least} and at most {limits.at_most}" in problem
        assert problem.endswith(", or null") is (type(None) in typing.get_args(declared))


@pytest.mark.parametrize("key", NUMBERS)
def test_limits_themselves_are_allowed(key: str) -> None:
    f, declared = NUMBERS[key]
    limits = f.metadata[Limits]
    for value in {limits.at_least, limits.at_most} - OTHER_RULES.get(key, set()):
        changes = {key.replace(".", "__"): [value] if declared == list[int] else value}
        assert problems_with(**changes) == [], value


@pytest.mark.parametrize(
    ("key", "too_small", "fine", "too_large"),
    [
        ("train.num_steps", 0, [1, 1_000_000], 10**9),
        ("optimizer.lr", 0.0, [1e-9, 1e-6, 0.1], 1e9),
        ("optimizer.clip_grad", 0, [0.01, 1.0, 1e4, None], math.nan),
        ("optimizer.beta2", -0.1, [0.0, 0.95, 0.99999], 1.0),
        ("rollout.temperature", 1e-30, [0.1, 1.0, 2.0], 1e9),
        ("rollout.top_p", 0.0, [0.1, 1.0], 1.5),
        ("rollout.top_k", -1, [1, 200_000, None], 2**31),
        ("rollout.max_response_tokens", 0, [1, 1_000_000], 2**31),
        ("rollout.request_timeout_s", 0.0, [1, 86_400], math.inf),
        ("parallel.timeout_s", 0.0, [1, 86_400], math.inf),
        ("deadlines.rollout_s", 0, [60, 604_800, None], 1e9),
        ("algorithm.loss.delta", 0.0, [1e-4, 0.1, 12.5], math.inf),
        ("algorithm.loss.clip_low", 0.0, [3e-4, 1.0], 1.01),
        ("algorithm.loss.dual_clip", 1.0, [1.5, 10, None], 10**9),
        ("metrics.prometheus_port", 0, [1, 65_535, None], 65_536),
        ("seed", -1, [0, 2**32 - 1], 2**32),
        ("rollout.stop_token_ids", [-1], [[], [0, 151_643]], [10**22]),
    ],
)
def test_limits_are_generous_but_real(key: str, too_small: Any, fine: list[Any], too_large: Any) -> None:
    name = key.replace(".", "__")
    assert all(problems_with(**{name: value}) == [] for value in fine)
    for value in (too_small, too_large):
        assert next(iter(problems_with(**{name: value}))).startswith(f"{key}=")


def test_a_temperature_that_is_almost_greedy_is_neither() -> None:
    assert problems_with(eval__temperature=0) == problems_with(eval__temperature=0.01) == []
    (problem,) = problems_with(eval__temperature=1e-30)
    assert problem == "eval.temperature=1e-30: must be 0 (the most probable token) or at least 0.01"


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


def test_what_the_chat_template_gets() -> None:
    template = {"enable_thinking": False, "documents": ["a"]}
    assert problems_with(data__tools=[{"type": "function"}], data__chat_template_kwargs=template) == []
    assert problems_with(
        data__tools=[{"type": "function"}, "add"],
        data__chat_template_kwargs={"enable_thinking": False, "tokenize": True, "tools": []},
    ) == [
        "data.tools: must be a list of JSON schemas, each a mapping",
        "data.chat_template_kwargs.tokenize: is no variable of a chat template, leave it out",
        "data.chat_template_kwargs.tools: is no variable of a chat template, leave it out",
    ]


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


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_with(train__num_steps=0, rollout__top_p=2.0, optimizer__lr=-1.0, data__train_path="")
    assert [problem.split(":")[0].split(" ")[0] for problem in problems] == [
        "train.num_steps=0",
        "data.train_path",
        "rollout.top_p=2.0",
        "optimizer.lr=-1.0",
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
    code = f"import sys, megatron_drpo.config.io; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
