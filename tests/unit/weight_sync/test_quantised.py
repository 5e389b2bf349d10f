"""Servers with quantised weights are told from others, before a run and when they are met."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    SGLangServerConfig,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.embedded_server.server import EmbeddedServer
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weight_sync.quantised import check_quantisation
from megatron_drpo.weights.fp8 import BLOCK

Tensors = dict[str, torch.Tensor]
StandIn = Any
"""conftest.py's."""


@pytest.fixture
def pusher(model_path: Path, tmp_path: Path) -> Iterator[WeightPusher]:
    config = WeightSyncConfig(path=WeightSyncPath.tensor, timeout_s=5.0)
    pusher = WeightPusher(config, model_path=model_path, run_dir=tmp_path)
    yield pusher
    pusher.close()


def make_folder(path: Path, **values: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **values}))
    return path


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"quantization": "fp8"}, "quantization is 'fp8': a server with quantised weights, which would take"),
        ({"quantization": "w8a8_int8"}, "start it without --quantization"),
        ({"torchao_config": "int8wo"}, "start it without --torchao-config"),
        ({"quantization": None, "torchao_config": "", "kv_cache_dtype": "fp8_e4m3"}, None),
        ({"quantization": "unquant", "model_path": "nowhere"}, None),
    ],
)
def test_a_server_that_says_so_gets_no_weights(
    pusher: WeightPusher,
    make_stand_in: Callable[[], StandIn],
    new: Tensors,
    told: dict[str, Any],
    words: str | None,
) -> None:
    """It is told from the others, which are updated; its checksum would agree with theirs."""
    quantised, other = make_stand_in(), make_stand_in()
    quantised.info |= told
    report = pusher.push(new.items(), 1, [quantised.endpoint, other.endpoint])
    if words is None:
        assert report.failed == {}
        return
    assert report.updated == [other.endpoint]
    assert report.failed[quantised.endpoint].startswith(f"{quantised.endpoint}/server_info: ")
    assert words in report.failed[quantised.endpoint]
    assert quantised.asked == ["/server_info"]


def test_a_server_of_a_quantised_folder_gets_no_weights(
    pusher: WeightPusher, make_stand_in: Callable[[], StandIn], new: Tensors, tmp_path: Path
) -> None:
    """SGLang has no argument for it then."""
    server = make_stand_in()
    folder = make_folder(tmp_path / "fp8", quantization_config={"quant_method": "fp8"})
    server.info |= {"quantization": None, "model_path": str(folder)}
    report = pusher.push(new.items(), 1, [server.endpoint])
    expected = (
        f"{server.endpoint}: serves {folder}/config.json has quantization_config (fp8): its weights are"
    )
    assert report.failed[server.endpoint].startswith(expected)
    assert "conversion.megatron_to_hf" in report.failed[server.endpoint]


def test_an_embedded_server_with_fp8_weights(
    pusher: WeightPusher,
    model_path: Path,
    new: Tensors,
    serve_in_thread: Callable[..., AbstractContextManager[str]],
) -> None:
    """It is refused; what it would make of an update has the scales of the weights before."""
    server = EmbeddedServer(
        model_path=model_path, dtype=torch.float32, num_slots=2, deterministic=False, quantization="fp8"
    )
    with serve_in_thread(server.serve, server.stop) as endpoint:
        assert httpx.get(f"{endpoint}/server_info", trust_env=False).json()["quantization"] == "fp8"
        report = pusher.push(new.items(), 1, [endpoint])
    assert "quantization is 'fp8'" in report.failed[endpoint]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quantization", "fp8"], ["--quantization fp8 asks for a server with quantised weights"]),
        (
            ["--quantization=fp8", "--torchao-config", "int8wo"],
            ["--quantization fp8", "--torchao-config int8wo"],
        ),
        (["--quantization", "fp8", "--quantization", "unquant"], []),
        (["--kv-cache-dtype", "fp8_e4m3", "--mem-fraction-static", "0.8"], []),
        (["--model-path", "FP8"], ["FP8/config.json has quantization_config"]),
    ],
)
def test_arguments_of_servers_that_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "FP8", quantization_config={"bits": 8})
    config = Config(
        data=DataConfig(train_path="train.jsonl"),
        policy=PolicyConfig(model_path=str(make_folder(tmp_path / "m"))),
    )
    config.rollout = RolloutConfig(
        engine=RolloutEngineName.sglang, sglang=SGLangServerConfig(arguments=arguments)
    )
    problems = check_quantisation(config)
    assert len(problems) == len(expected), problems
    assert all(text in problem for problem, text in zip(problems, expected, strict=True))
    config.rollout.endpoints = ["http://there"]
    assert check_quantisation(config) == [], "others start those"


@pytest.mark.parametrize("kind", ["quantization_config", "compression_config", "modelopt"])
def test_a_quantised_folder_of_the_policy(tmp_path: Path, kind: str) -> None:
    """Whoever starts the servers, they serve it."""
    folder = make_folder(
        tmp_path / "model", **({} if kind == "modelopt" else {kind: {"quant_method": "fp8"}})
    )
    if kind == "modelopt":
        (folder / "hf_quant_config.json").write_text("{}")
    config = Config(data=DataConfig(train_path="train.jsonl"), policy=PolicyConfig(model_path=str(folder)))
    (problem,) = check_quantisation(config)
    assert problem.startswith(f"policy.model_path: {folder}/")
    assert "give a folder with bf16 weights" in problem
    config.policy.model_path = str(tmp_path / "nowhere")
    assert check_quantisation(config) == []


def test_old_scales_make_other_weights_of_new_ones(model_path: Path, new: Tensors) -> None:
    """By hand: a bf16 value in e4m3, times the scale of the block before."""
    server = EmbeddedServer(
        model_path=model_path, dtype=torch.float32, num_slots=2, deterministic=False, quantization="fp8"
    )
    store = server.generator._store
    name = "model.layers.0.self_attn.q_proj.weight"
    old = load_file(model_path / "model.safetensors")[name]
    scale = old[:BLOCK, :BLOCK].abs().max() / 448
    torch.testing.assert_close(store._served[name], old, atol=old.abs().max().item() / 16, rtol=0)
    store.begin()
    store.stage(new.items(), "1")
    store.commit()
    expected = new[name][:BLOCK, :BLOCK].to(torch.float8_e4m3fn).to(torch.float32) * scale
    torch.testing.assert_close(store._served[name][:BLOCK, :BLOCK], expected)
    assert not torch.allclose(store._served[name], new[name], atol=0.01)
