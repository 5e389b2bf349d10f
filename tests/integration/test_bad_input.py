"""Bad input: one clear error that names what is wrong, in time, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_drpo import cli, train
from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import Config
from megatron_drpo.embedded_server.server import EmbeddedServer
from megatron_drpo.errors import DrpoError, RewardError, RolloutError
from megatron_drpo.launch import supervisor
from megatron_drpo.launch.resolve import resolve_config
from megatron_drpo.policy.parallel import ParallelState

RunArguments = Callable[..., list[str]]

# ------------------------------------------------------------- known to be wrong before anything starts


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """`refuse(arguments)`: the error of a `train` command that must not start or write anything."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(supervisor, "build_fleet", started)
    monkeypatch.setattr(supervisor, "elastic_launch", started)

    def run(arguments: list[str]) -> str:
        begin = time.monotonic()
        assert cli.main(["train", *arguments]) == 1
        assert time.monotonic() - begin < 10
        assert not (tmp_path / "run").exists()
        output = capsys.readouterr()
        assert output.out == ""
        assert "Traceback" not in output.err
        return output.err

    return run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.num_step=3"], "ConfigError: train.num_step: unknown key; did you mean train.num_steps?"),
        (["train.num_steps=many"], "train.num_steps='many'"),
        (["train.num_steps=0"], "ConfigError: train.num_steps=0: must be at least 1"),
        (["algorithm.loss.name=drop"], "algorithm.loss.name=drop: unknown loss; known are drpo"),
        (["policy.megatron_overrides={moe_topk: 1}"], "policy.megatron_overrides.moe_topk: not a field"),
        (["checkpoint.load_path=nowhere"], "checkpoint.load_path=nowhere: no such folder"),
        (["policy.model_path=nowhere"], "policy.model_path: nowhere"),
        (["data.train_path=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.eval_path=gone.jsonl", "eval.every_steps=1"], "gone.jsonl"),
        (
            ["reward.name=no_such_module:score"],
            "module no_such_module cannot be imported",
        ),
        (["reward.name=json:no_such_function"], "module json has no function no_such_function"),
        (
            ["reward.name=nonsense"],
            "reward.name=nonsense: expected math_verify",
        ),
        (
            ["parallel.data_parallel_size=2", "parallel.expert_parallel_size=2", "policy.model_path=nowhere"],
            "nowhere",
        ),
        (
            ["parallel.pipeline_parallel_size=3"],
            "virtual_pipeline_parallel_size = 3 must divide the model's num_hidden_layers, 4",
        ),
        (
            ["parallel.tensor_parallel_size=3", "parallel.sequence_parallel=true"],
            "parallel.tensor_parallel_size=3 must divide the model's num_attention_heads, 4",
        ),
        (
            [
                "parallel.data_parallel_size=3",
                "parallel.expert_parallel_size=3",
                "rollout.num_prompts_per_step=3",
            ],
            "parallel.expert_parallel_size=3 must divide the model's num_experts, 8",
        ),
    ],
)
def test_configuration(
    refuse: Callable[[list[str]], str], run_arguments: RunArguments, overrides: list[str], expected: str
) -> None:
    assert expected in refuse(run_arguments(*overrides))


def test_several_problems_are_told_at_once(
    refuse: Callable[[list[str]], str], run_arguments: RunArguments
) -> None:
    in_config = refuse(run_arguments("train.num_steps=0", "rollout.top_p=2", "polici.dtype=fp32"))
    assert in_config.startswith("ConfigError: 3 problems in the configuration:\n")
    for name in ("train.num_steps=0", "rollout.top_p=2", "polici: unknown key; did you mean policy?"):
        assert name in in_config
    in_files = refuse(
        run_arguments("data.train_path=nowhere.jsonl", "parallel.tensor_parallel_size=3", "reward.name=x")
    )
    for name in ("nowhere.jsonl", "parallel.tensor_parallel_size=3", "reward.name=x"):
        assert name in in_files


# --------------------------------------------------------------------------------------- model folders


@pytest.fixture
def copy_model(model_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path, tmp_path / "model"))


def _drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4096)


def _list_a_missing_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_drop_weights, ["safetensors"]),
        (_truncate_weights, ["model.safetensors", "truncated"]),
        (_list_a_missing_shard, ["model-00002-of-00002.safetensors"]),
        (_break_config, ["config.json"]),
        (_change_config(model_type="gemma"), ["gemma", "qwen3_moe"]),
        (_change_config(num_hidden_layers=6), ["model.layers.4"]),
        (_change_config(hidden_size=128), ["128"]),
        (_change_config(rope_scaling={"type": "yarn"}), ["rope_scaling"]),
    ],
)
def test_model_folders(
    refuse: Callable[[list[str]], str],
    run_arguments: RunArguments,
    copy_model: Path,
    damage: Callable[[Path], None],
    expected: list[str],
) -> None:
    damage(copy_model)
    error = refuse(run_arguments(f"policy.model_path={copy_model}"))
    assert "policy.model_path: " in error
    for text in (str(copy_model), *expected):
        assert text in error


# ---------------------------------------------------------------------------------------- prompt lines


def test_broken_prompt_lines(
    refuse: Callable[[list[str]], str],
    run_arguments: RunArguments,
    tmp_path: Path,
    prompts_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named by file and line number from 1; skipped when that is wanted."""
    path = tmp_path / "broken.jsonl"
    good = prompts_path.read_text().splitlines()[:8]
    path.write_text("\n".join([*good[:2], "{not json", '{"prompt": "1+1="}', *good[2:]]) + "\n")
    error = refuse(run_arguments(f"data.train_path={path}"))
    for text in (f"{path}", "line 3", "line 4", "answer"):
        assert text in error
    assert cli.main(["check", *run_arguments(f"data.train_path={path}", "data.on_bad_line=skip")]) == 0
    assert "on_bad_line: skip" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(200)
def test_a_run_leaves_broken_lines_out_and_says_so(
    train: Callable[[list[str]], None],
    run_arguments: RunArguments,
    tmp_path: Path,
    prompts_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Noticed by the parser, the tokenizer's rules, and math-verify."""
    path = tmp_path / "broken.jsonl"
    bad = [
        r'{"prompt": "1+\ud83d=", "answer": "2"}',
        '{"prompt": "1+1=", "answer": 1e400}',
        r'{"prompt": "1+1=", "answer": "2 \\frac{"}',
        '{"prompt": "1+1=", "answer": "2", "tools": [{"type": "function"}]}',
    ]
    path.write_text("\n".join([*prompts_path.read_text().splitlines()[:8], *bad]) + "\n")
    train(
        run_arguments(
            f"data.train_path={path}",
            "data.on_bad_line=skip",
            "reward.name=math_verify",
            "train.num_steps=1",
        )
    )
    said = " ".join(capfd.readouterr().out.split())
    assert "4 broken lines are skipped, the first is line 9: expected `prompt` to be text" in said


def test_a_file_without_any_good_line(
    refuse: Callable[[list[str]], str], run_arguments: RunArguments, tmp_path: Path
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("nothing\n")
    assert str(path) in refuse(run_arguments(f"data.train_path={path}", "data.on_bad_line=skip"))


# -------------------------------------------------------------------------------- known on a rank only


@pytest.fixture
def rank_config(
    run_arguments: RunArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: ParallelState
) -> Callable[..., Config]:
    """`rank_config("key=value", ...)` of a run whose only rank is this process."""
    monkeypatch.chdir(tmp_path)

    def config(*overrides: str) -> Config:
        loaded = load_config(run_arguments(*overrides))
        resolve_config(loaded)
        return loaded

    return config


@pytest.fixture(scope="module")
def endpoint(serve_in_thread: Callable[..., AbstractContextManager[str]], model_path: Path) -> Iterator[str]:
    """An embedded server."""
    server = EmbeddedServer(model_path=model_path, dtype=torch.float32, num_slots=8, deterministic=False)
    with serve_in_thread(server.serve, server.stop) as url:
        yield url


@pytest.fixture(scope="module")
def broken_endpoint(serve_app: Callable[[Any], str]) -> str:
    """A server that is healthy and takes weights... but answers everything else with 500."""

    async def health(_: Request) -> Response:
        return PlainTextResponse("")

    async def fail(_: Request) -> Response:
        return JSONResponse({"error": {"message": "the device fell over"}}, status_code=500)

    return serve_app(
        Starlette(routes=[Route("/health", health), Route("/{path:path}", fail, methods=["GET", "POST"])])
    )


def fails(config: Config, error: type[DrpoError], *expected: str, within_s: float) -> None:
    begin = time.monotonic()
    resource_tracker.ensure_running()  # the standard library's; it stays for the life of this process
    children = set(psutil.Process().children(recursive=True))
    with pytest.raises(error) as caught:
        train.run(config)
    assert time.monotonic() - begin < within_s
    for text in expected:
        assert text in str(caught.value)
    left = set(psutil.Process().children(recursive=True)) - children
    _, alive = psutil.wait_procs(left, timeout=3)
    assert not alive, alive
    assert not (Path(config.run_dir) / "hf").exists()


REWARDS = """
import time

def raises(rollout):
    raise KeyError("no such unit")

def hangs(rollout):
    time.sleep(60)

def returns_text(rollout):
    return "good"
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("raises", "KeyError: 'no such unit'"),
        ("hangs", "no result within reward.timeout_s=0.3"),
        ("returns_text", "it returned 'good', expected a finite number"),
    ],
)
def test_rewards(
    rank_config: Callable[..., Config], endpoint: str, tmp_path: Path, function: str, expected: str
) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    name = f"my_rewards:{function}"
    config = rank_config(f"reward.name={name}", "reward.timeout_s=0.3", f"rollout.endpoints=[{endpoint}]")
    fails(config, RewardError, f"reward {name}: prompt ", ", sample ", expected, within_s=20)


@pytest.mark.timeout(60)
def test_an_absent_server(rank_config: Callable[..., Config]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        absent = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = rank_config(f"rollout.endpoints=[{absent}]", "rollout.startup_timeout_s=1")
    fails(config, RolloutError, absent, "did not answer within 1 s", within_s=15)


@pytest.mark.timeout(60)
def test_a_server_that_answers_500(rank_config: Callable[..., Config], broken_endpoint: str) -> None:
    config = rank_config(f"rollout.endpoints=[{broken_endpoint}]", "rollout.num_retries=1")
    fails(config, RolloutError, broken_endpoint, "500", "the device fell over", within_s=15)


def test_a_wrong_number_of_ranks(
    run_arguments: RunArguments,
    one_rank: ParallelState,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A rank says it and leaves at once, for the others may wait for it in a collective."""

    class Exit(Exception):
        pass

    def leave(status: int) -> None:
        raise Exit(status)

    monkeypatch.setattr(os, "_exit", leave)
    arguments = run_arguments("parallel.data_parallel_size=2", "rollout.endpoints=[http://127.0.0.1:1]")
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(Exit, match="1"):
        train.main()
    assert "ConfigError (rank 0): 1 rank(s) were started, but" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_rank_starts_no_server(
    run_arguments: RunArguments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Exit(Exception):
        pass

    def leave(status: int) -> None:
        raise Exit(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["train", *run_arguments()])
    with pytest.raises(Exit, match="1"):
        train.main()
    assert "there is no rollout.fleet_file: a rank starts no server" in capsys.readouterr().err
