"""Two NCCLs that cannot be in one communicator are refused, with what to install."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    SGLangServerConfig,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.weight_sync import nccl, nccl_version
from megatron_drpo.weight_sync.client import ServerInfo, WeightClient
from megatron_drpo.weight_sync.nccl import Nccl, check_nccl, explain, find_other, find_unlike
from megatron_drpo.weight_sync.path import Server


def interpreter(folder: Path, answer: str) -> str:
    """One that prints `answer`, whatever it is to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    path.chmod(0o755)
    return str(path)


def problems(
    monkeypatch: pytest.MonkeyPatch,
    python: str,
    own: Nccl | None,
    *,
    platform: PlatformName = PlatformName.cuda,
    path: WeightSyncPath = WeightSyncPath.distributed,
) -> list[str]:
    monkeypatch.setattr(nccl, "find_own", lambda: own)
    rollout = RolloutConfig(engine=RolloutEngineName.sglang, sglang=SGLangServerConfig(python=python))
    config = Config(
        data=DataConfig(train_path="none"),
        policy=PolicyConfig(model_path="none"),
        platform=platform,
        rollout=rollout,
        weight_sync=WeightSyncConfig(path=path),
    )
    return check_nccl(config)


@pytest.mark.parametrize(
    ("own", "other", "advice"),
    [
        (
            Nccl(22105, "12.4"),
            {"nccl": 23003, "cuda": "13.0"},
            "the servers have NCCL 2.30.3, the trainer has 2.21.5, and NCCL refuses ranks of different "
            "versions: pip install nvidia-nccl-cu12==2.30.3 in the trainer's environment",
        ),
        (
            Nccl(23003, "12.9"),
            {"nccl": 22705, "cuda": "13.0"},
            "pip install nvidia-nccl-cu13==2.30.3 in the servers' environment",
        ),
    ],
)
def test_check_says_which_package_to_pin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: Nccl, other: dict[str, object], advice: str
) -> None:
    python = interpreter(tmp_path, json.dumps(other))
    [problem] = problems(monkeypatch, python, own)
    assert problem.startswith(f"weight_sync.path=distributed with rollout.sglang.python={python}: ")
    assert advice in problem
    assert problems(monkeypatch, python, own, path=WeightSyncPath.disk) == []
    assert problems(monkeypatch, python, own, platform=PlatformName.cpu) == []
    assert problems(monkeypatch, str(tmp_path / "absent"), own) == [], "check has another line for that"


def test_equal_versions_are_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = interpreter(tmp_path, '{"nccl": 22705, "cuda": "13.0"}')
    assert problems(monkeypatch, python, Nccl(22705, "12.8")) == []
    [problem] = problems(monkeypatch, python, None)
    assert "the trainer's torch" in problem
    assert "has no NCCL" in problem


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ('{"nccl": null, "cuda": null}', "its torch has no NCCL"),
        ("", "it could not be asked for its version of NCCL: no output"),
        ("[]", "it could not be asked"),
    ],
)
def test_an_environment_that_cannot_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, told: str
) -> None:
    [problem] = problems(monkeypatch, interpreter(tmp_path, answer), Nccl(22705, "12.8"))
    assert told in problem


def test_an_interpreter_without_torch(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "import torch"\n')
    python.chmod(0o755)
    assert "No module named 'torch'" in str(find_other(str(python)))


def test_a_refusal_of_nccl_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_version, "cuda_version", lambda: "12.4")
    text = "Last error:\nMismatched NCCL version detected : rank 1 version {} rank 0 version {}"
    older = explain(dist.DistBackendError(text.format(23003, 22105)))
    assert older.startswith(text.format(23003, 22105))
    assert "pip install nvidia-nccl-cu12==2.30.3 in the trainer's environment" in older
    newer = explain(dist.DistBackendError(text.format(22105, 23003)))
    told = "pip install nvidia-nccl-cu12==2.30.3 (cu13 if its torch is built for CUDA 13) in the servers'"
    assert told in newer
    assert explain(RuntimeError("another one")) == "another one"


def server(**arguments: object) -> Server:
    info = ServerInfo("python", "0.5.23", 1, "cuda", "bfloat16", arguments)
    return Server(WeightClient("http://host:1", timeout_s=1.0), info)


def test_servers_whose_arguments_set_other_variables() -> None:
    plain, symmetric = server(enable_symm_mem=False), server(enable_symm_mem=True)
    assert find_unlike([plain], {}) == {}
    assert find_unlike([plain], {"NCCL_CUMEM_ENABLE": "1"}) == {}, "it may have it from its own environment"
    assert find_unlike([symmetric], {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1"}) == {}
    reason = find_unlike([symmetric], {"NCCL_CUMEM_ENABLE": "1"})["http://host:1"]
    assert "--enable-symm-mem, which sets NCCL_NVLS_ENABLE=1: start the trainer's ranks" in reason
