"""From files and arguments to a checked `Config`, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_drpo.config.io import OTHER_NAMES, declared_types, load_config, read_config, to_yaml
from megatron_drpo.config.schema import Advantage, Config
from megatron_drpo.errors import ConfigError

NEEDED = ["data.train_path=train.jsonl", "policy.model_path=model"]


def problems_of(*arguments: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config([*NEEDED, *arguments])
    return caught.value.problems


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"config={path}"


def test_arguments_are_typed_by_the_schema() -> None:
    config = load_config(
        [
            *NEEDED,
            "optimizer.lr=1e-4",
            "rollout.deterministic=true",
            "algorithm.advantage=leave_one_out",
            "rollout.stop_token_ids=[5,6]",
            "data.eval_path=null",
            "policy.megatron_overrides.moe_router_topk=2",
            "policy.megatron_overrides.qk_layernorm=true",
            "run_dir=runs/a=b",
        ]
    )
    assert isinstance(config, Config)
    assert config.optimizer.lr == 1e-4
    assert config.rollout.deterministic is True
    assert config.algorithm.advantage is Advantage.leave_one_out
    assert config.rollout.stop_token_ids == [5, 6]
    assert config.data.eval_path is None
    assert config.policy.megatron_overrides == {"moe_router_topk": 2, "qk_layernorm": True}
    assert config.run_dir == "runs/a=b"


def test_layers_defaults_base_file_arguments(tmp_path: Path) -> None:
    """Each layer overrides the one before, key by key; a `base:` is relative to the file that names it."""
    write(
        tmp_path / "common" / "base.yaml",
        "data: {train_path: base.jsonl}\npolicy: {model_path: base}\nseed: 1\ntrain: {num_steps: 1}\n",
    )
    write(tmp_path / "common" / "middle.yaml", "base: base.yaml\nseed: 2\nreward:\n  name: exact_match\n")
    top = write(
        tmp_path / "run.yaml", "base: common/middle.yaml\nseed: 3\ntrain:\n  num_updates_per_step: 4\n"
    )
    config = load_config([top, "seed=4"])
    assert config.data.train_path == "base.jsonl"
    assert config.reward.name == "exact_match"
    assert (config.train.num_steps, config.train.num_updates_per_step) == (1, 4)
    assert config.seed == 4
    assert load_config([top]).seed == 3


def test_lists_replace_and_dicts_merge(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "rollout: {stop_token_ids: [1, 2]}\npolicy: {megatron_overrides: {a: 1}}\n")
    top = write(
        tmp_path / "run.yaml",
        "base: base.yaml\nrollout: {stop_token_ids: [3]}\npolicy: {megatron_overrides: {b: 2}}\n",
    )
    config = load_config([top, *NEEDED, "policy.megatron_overrides.c=3"])
    assert config.rollout.stop_token_ids == [3]
    assert config.policy.megatron_overrides == {"a": 1, "b": 2, "c": 3}


def test_interpolation_is_resolved(tmp_path: Path) -> None:
    top = write(
        tmp_path / "run.yaml",
        "run_dir: /runs/x\ndata: {train_path: '${run_dir}/train.jsonl'}\nseed: ${train.num_steps}\n",
    )
    config = load_config([top, "policy.model_path=model", "train.num_steps=9"])
    assert config.data.train_path == "/runs/x/train.jsonl"
    assert config.seed == 9


def test_resolved_yaml_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        [
            *NEEDED,
            "rollout.engine=sglang",
            "rollout.endpoints=[http://127.0.0.1:30000]",
            "algorithm.loss.dual_clip=3.0",
            "policy.megatron_overrides.moe_aux_loss_coeff=0.001",
            "optimizer.lr=3.0517578125e-05",
            "run_dir='runs/ü: x'",
        ]
    )
    saved = write(tmp_path / "config.yaml", to_yaml(config))
    assert load_config([saved]) == config
    assert to_yaml(load_config([saved])) == to_yaml(config)


ARGUMENTS_THAT_CANNOT_BE = [
    (
        "xyz=1",
        "xyz: unknown key (in command line)",
    ),
    (
        "rollout.temprature=1",
        "rollout.temprature: unknown key; did you mean rollout.temperature? (in command line)",
    ),
    (
        "algorithm.loss.detla=1",
        "algorithm.loss.detla: unknown key; did you mean algorithm.loss.delta? (in command line)",
    ),
    ("sede=1", "sede: unknown key; did you mean seed? (in command line)"),
    (
        "seed.x=1",
        "seed={'x': 1}: expected a whole number (in command line)",
    ),
    (
        "rollout=fast",
        "rollout='fast': rollout is a section; set its keys, for example rollout.engine=... "
        "(in command line)",
    ),
    (
        "rollout.endpoints=http://127.0.0.1:30000",
        "rollout.endpoints='http://127.0.0.1:30000': expected a list, in brackets: [...] (in command line)",
    ),
    (
        "train.num_steps=ten",
        "train.num_steps='ten': expected a whole number (in command line)",
    ),
    (
        "rollout.deterministic=maybe",
        "rollout.deterministic='maybe': expected true or false (in command line)",
    ),
    (
        "optimizer.clip_grad=none",
        "optimizer.clip_grad='none': expected a number or null (in command line)",
    ),
    (
        "policy.megatron_overrides=5",
        "policy.megatron_overrides=5: expected a mapping, in braces: {name: value} (in command line)",
    ),
    (
        "run_dir=[a]",
        "run_dir=['a']: expected text (in command line)",
    ),
    (
        "run_dir=null",
        "run_dir=None: expected text (in command line)",
    ),
    (
        "rollout.stop_token_ids=[1.5]",
        "rollout.stop_token_ids=[1.5]: expected a list of whole numbers, in brackets: [...] "
        "(in command line)",
    ),
    (
        "rollout.oversampling=1" + "0" * 400,
        "rollout.oversampling=1" + "0" * 199 + "... (401 characters): expected a number (in command line)",
    ),
    (
        "reward.overlong=drop",
        "reward.overlong='drop': expected one of keep, mask, soft_penalty (in command line)",
    ),
]


@pytest.mark.parametrize(("argument", "problem"), ARGUMENTS_THAT_CANNOT_BE)
def test_argument_that_cannot_be(argument: str, problem: str) -> None:
    assert problems_of(argument) == (problem,)


def test_all_problems_of_all_layers_come_together(tmp_path: Path) -> None:
    """Unknown keys and wrong types name their source; broken rules follow."""
    base = tmp_path / "base.yaml"
    write(base, "optimiser: {lr: 1}\n")
    top = write(tmp_path / "run.yaml", "base: base.yaml\ntrain: {num_steps: many}\n")
    problems = problems_of(top, "rollout.top_p=7", "sede=1")
    assert [problem.split(" ")[0] for problem in problems] == [
        "optimiser:",
        "train.num_steps='many':",
        "sede:",
        "rollout.top_p=7.0:",
    ]
    assert problems[0].endswith(f"did you mean optimizer? (in {base})")
    assert problems[1].endswith(f"(in {tmp_path / 'run.yaml'})")
    assert problems[2].endswith("did you mean seed? (in command line)")


@pytest.mark.parametrize("argument", ["--seed=1", "seed", "-x", "--help"])
def test_argument_of_another_form(argument: str) -> None:
    assert problems_of(argument) == (
        f"argument {argument!r}: expected key.sub=value, for example train.num_steps=10",
    )


def test_what_is_referred_to_must_be_of_the_same_kind() -> None:
    """OmegaConf converts plain values that ${...} refers to, and takes anything for lists and mappings."""
    problems = problems_of(
        "run_dir=runs/a",
        "nope=1",
        "rollout.sglang.arguments=${run_dir}",
        "data.tools=${data.chat_template_kwargs}",
        "policy.megatron_overrides=${rollout.stop_token_ids}",
    )
    assert problems == (
        "nope: unknown key (in command line)",
        "data.tools={}: expected a list, in brackets: [...]",
        "rollout.sglang.arguments='runs/a': expected a list, in brackets: [...]",
        "policy.megatron_overrides=[]: expected a mapping, in braces: {name: value}",
    )


def test_argument_that_is_no_yaml() -> None:
    (problem,) = problems_of("rollout.stop_token_ids=[1, 2")
    assert problem.startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1,\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "not valid YAML"),
        ("\tseed: 1\n", "not valid YAML"),
        ("- seed\n", "expected a mapping of keys, found list"),
        ("seed\n", "seed=None: expected a whole number (in "),
        ("rollout:\n", "rollout=None: rollout is a section; set its keys, for example rollout.engine=..."),
        ("base: run.yaml\n", "its `base:` leads back to itself"),
        ("base: gone.yaml\n", "gone.yaml: no such file"),
        ("base: .\n", "cannot be read: Is a directory"),
        ("base: [a]\n", ": base=['a']: expected the path of a YAML file"),
        ("base: 0x" + "f" * 5000, ": base=(a number of over 4300 digits): expected the path of a YAML file"),
        ('base: "a\\0b"', "cannot be read: embedded null byte"),
        ("5\n", "not valid YAML"),
        ("seed: " + "1" * 5000, "not valid YAML"),
        ("[" * 300, "not valid YAML"),
        ("seed: &a [*a]\n", "not valid YAML"),
        ("seed: \x00\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("1: 2\n", "1: unknown key"),
        ("sampling: {temperature: 1}\n", "sampling: unknown key; did you mean rollout? (in "),
    ],
)
def test_file_that_cannot_be(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems_of(write(tmp_path / "run.yaml", text))
    assert problem in found
    assert str(tmp_path) in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "seed: 0x" + "f" * 5000,
            "seed=(a number of over 4300 digits): must be at least 0 and at most 4294967295",
        ),
        ("seed: ${seed}\n", "seed: Recursive interpolation detected"),
        ('run_dir: "\\ud83d"\n', "run_dir='\\ud83d': must be text that can be written as UTF-8"),
    ],
)
def test_value_that_cannot_be(tmp_path: Path, text: str, problem: str) -> None:
    assert problems_of(write(tmp_path / "run.yaml", text)) == (problem,)


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path / "run.yaml", ""), *NEEDED]) == load_config(NEEDED)


def test_missing_file() -> None:
    assert problems_of("config=gone.yaml") == ("config=gone.yaml: no such file",)
    assert problems_of("config=") == ("config=None: expected the path of a YAML file",)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems_of(f"config={tmp_path}") == (f"config={tmp_path}: cannot be read: Is a directory",)
    (problem,) = problems_of(f"config={'x' * 300}.yaml")
    assert problem.endswith("... (305 characters): cannot be read: File name too long")
    path = tmp_path / "latin.yaml"
    path.write_bytes("run_dir: läufe\n".encode("latin-1"))
    assert problems_of(f"config={path}") == (
        f"config={path}: not UTF-8 text: invalid continuation byte at byte 10",
    )
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_config([f"config={path}", *NEEDED]).seed == 3, "a byte order mark is none of the text"


def test_home_folders_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "base.yaml", "seed: 1\n")
    write(
        tmp_path / "run.yaml", "base: ~/base.yaml\nrun_dir: ~/run\ndata: {train_path: '${run_dir}/a.jsonl'}\n"
    )
    config = load_config(["config=~/run.yaml", "policy.model_path=~/model", "checkpoint.load_path=~/old"])
    assert config.seed == 1
    assert config.run_dir == f"{tmp_path}/run"
    assert config.data.train_path == f"{tmp_path}/run/a.jsonl"
    assert config.policy.model_path == f"{tmp_path}/model"
    assert config.checkpoint.load_path == f"{tmp_path}/old"
    assert load_config([write(tmp_path / "resolved.yaml", to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("learning-rate", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("optimizer.max_grad_norm", "optimizer.clip_grad"),
        ("parallel.tp", "parallel.tensor_parallel_size"),
        ("train.batch_size", "rollout.num_prompts_per_step"),
        ("rollout.max_new_tokens", "rollout.max_response_tokens"),
        ("rollout.train_path", "data.train_path"),
        ("num_steps", "train.num_steps"),
        ("rollout.engine_args", "rollout.engine"),
    ],
)
def test_key_that_is_meant(key: str, meant: str) -> None:
    assert problems_of(f"{key}=1") == (f"{key}: unknown key; did you mean {meant}? (in command line)",)


def test_other_names_lead_to_keys_and_are_none() -> None:
    keys = declared_types()
    assert {name for name in OTHER_NAMES.values() if name not in keys} == set()
    assert OTHER_NAMES.keys() & {key.rpartition(".")[2] for key in keys} == set()


def test_problems_leave_the_values_that_could_be_read() -> None:
    config, problems = read_config(["algorithm.loss.delta=2", "sede=1", "train.num_steps=0", *NEEDED])
    assert config.algorithm.loss.delta == 2.0
    assert [problem.split(":")[0] for problem in problems] == ["sede", "train.num_steps=0"]


def test_unknown_interpolation_is_an_error(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path / "run.yaml", "run_dir: ${nowhere}/x\n"))
    assert "run_dir" in problem
    assert "nowhere" in problem
