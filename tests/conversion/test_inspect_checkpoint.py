"""What is shown of checkpoints."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion import inspect_checkpoint
from conversion.common_state import read_common_state
from conversion.torch_dist_reader import TorchDistReader


def inspect(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert inspect_checkpoint.main([str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_converted_checkpoint(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contents = inspect(checkpoint("moe_mixed"), capsys, "--keys", "layers.0.mlp.router")
    (router,) = contents["tensors"]
    assert router == {
        "key": "decoder.layers.0.mlp.router.weight",
        "shape": [8, 64],
        "dtype": "float32",
        "num_chunks": 1,
        "num_bytes": 2048,
    }
    assert contents["facts"]["keys"] == "per-layer"
    assert contents["state"]["iteration"] == 0
    assert contents["facts"]["model"].startswith(
        "qwen3_moe: 4 layers, hidden size 64, vocabulary 101, 8 experts in 3"
    )


def test_a_hugging_face_folder(hf_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    contents = inspect(hf_model("llama_tied"), capsys)
    num_elements = sum(torch.Size(row["shape"]).numel() for row in contents["tensors"])
    assert contents["format"] == "Hugging Face"
    assert contents["facts"]["weights"] == f"{num_elements:,} in {len(contents['tensors'])} tensors"


def test_for_people(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(checkpoint("moe")), "--keys", "router"]) == 0
    output = capsys.readouterr().out
    assert "stacked" in output
    assert "4 x 8 x 64  float32" in output
    assert "1 of 12 tensors" in output


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(tmp_path / "nothing")]) == 1
    assert "no such folder; give a torch_dist checkpoint" in capsys.readouterr().err


def save_with_megatron(target: Path) -> None:
    """As this version of megatron-core saves: common.pt, or an object among the tensors."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_drpo.config.schema import ParallelConfig, PlatformName
    from megatron_drpo.platform.base import build_platform
    from megatron_drpo.policy.parallel import initialise_parallel

    initialise_parallel(ParallelConfig(), "gloo", build_platform(PlatformName.cpu).prepare(0))
    state = {
        "args": argparse.Namespace(num_layers=4, bf16=True),
        "iteration": 7,
        "x": ShardedTensor.from_rank_offsets("decoder.final_layernorm.weight", torch.arange(5.0)),
    }
    dist_checkpointing.save(state, str(target))


@pytest.mark.distributed
def test_common_state_of_megatrons_own_saver(
    run_distributed: Callable[..., list[Any]], tmp_path: Path
) -> None:
    run_distributed(save_with_megatron, 1, tmp_path)
    reader = TorchDistReader(tmp_path)
    state = read_common_state(reader)
    assert state["iteration"] == 7
    assert (state["args.num_layers"], state["args.bf16"]) == (4, True)
    assert torch.equal(reader.read("decoder.final_layernorm.weight", (0,), (5,)), torch.arange(5.0))


def test_common_state_that_would_run_code(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "opened"), "w")

    shutil.copytree(checkpoint("dense"), tmp_path / "copy")
    (tmp_path / "copy" / "release" / "integrity.json").unlink()
    torch.save({"args": Attack()}, tmp_path / "copy" / "release" / "common.pt")
    state = read_common_state(TorchDistReader(tmp_path / "copy"))
    assert list(state) == ["common state"]
    assert state["common state"].startswith("not readable: ")
    assert not (tmp_path / "opened").exists()
