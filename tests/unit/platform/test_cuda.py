"""What the CUDA platform finds installed; nothing here needs a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from megatron_drpo.platform import cuda
from megatron_drpo.platform.cuda import CudaPlatform, has_apex, has_fused_gradient_accumulation


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on sys.path; modules imported from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that its removal is undone
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def pretend_installed(monkeypatch: pytest.MonkeyPatch, modules: set[str]) -> None:
    monkeypatch.setattr(cuda, "find_spec", {name: ModuleSpec(name, None) for name in modules}.get)


def test_the_other_project_named_apex_is_not_taken_for_nvidias(packages: Path) -> None:
    assert not has_apex()
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("")
    assert not has_apex()
    (packages / "apex" / "optimizers").mkdir()
    (packages / "apex" / "optimizers" / "__init__.py").write_text("")
    assert has_apex()


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (set(), False),
        ({"apex", "apex.optimizers"}, False),
        ({"fused_weight_gradient_mlp_cuda"}, True),
        ({"transformer_engine"}, True),
    ],
)
def test_fused_gradient_accumulation(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], expected: bool
) -> None:
    pretend_installed(monkeypatch, installed)
    assert has_fused_gradient_accumulation() is expected


@pytest.mark.parametrize(
    ("installed", "te_version", "layers", "optimizer", "accumulation"),
    [
        (set(), None, "megatron-core local, torch SDPA attention", "torch AdamW, distributed", "torch"),
        (
            {"apex", "apex.optimizers", "fused_weight_gradient_mlp_cuda"},
            None,
            "megatron-core local, torch SDPA attention",
            "NVIDIA apex, distributed",
            "fused",
        ),
        (
            {"transformer_engine"},
            "2.3.0",
            "Transformer Engine 2.3.0",
            "Transformer Engine, distributed",
            "fused",
        ),
    ],
)
def test_the_banner_says_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
    installed: set[str],
    te_version: str | None,
    layers: str,
    optimizer: str,
    accumulation: str,
) -> None:
    pretend_installed(monkeypatch, installed)
    monkeypatch.setattr(cuda, "installed_version", {"transformer-engine": te_version}.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert CudaPlatform().describe() == [
        ("device", "H200 x 8, NCCL"),
        ("layers", layers),
        ("optimizer", optimizer),
        ("gradient accumulation", accumulation),
    ]


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert CudaPlatform().prepare(3) == torch.device("cuda", 3)
    assert chosen == [3]
