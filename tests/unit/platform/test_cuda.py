"""What the CUDA platform finds installed; nothing here needs a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from megatron_drpo.config.schema import Layers
from megatron_drpo.errors import PlatformError
from megatron_drpo.platform import cuda, versions
from megatron_drpo.platform.cuda import CudaPlatform, has_apex


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


def pretend_transformer_engine(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    packages = {"transformer-engine": version, "megatron-core": "0.16.1", "torch": torch.__version__}
    for module in (cuda, versions):
        monkeypatch.setattr(module, "installed_version", packages.get)


def test_the_other_project_named_apex_is_not_taken_for_nvidias(packages: Path) -> None:
    assert not has_apex()
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("")
    assert not has_apex()
    (packages / "apex" / "optimizers").mkdir()
    (packages / "apex" / "optimizers" / "__init__.py").write_text("")
    assert has_apex()


@pytest.mark.parametrize(
    ("installed", "version", "chosen", "layers", "optimizer", "accumulation"),
    [
        (
            set(),
            None,
            Layers.local,
            "megatron-core local, torch SDPA attention",
            "torch AdamW, distributed",
            "torch",
        ),
        (
            {"apex", "apex.optimizers", "fused_weight_gradient_mlp_cuda"},
            None,
            Layers.local,
            "megatron-core local, torch SDPA attention",
            "NVIDIA apex, distributed",
            "fused",
        ),
        (
            {"transformer_engine"},
            "2.11.0",
            Layers.transformer_engine,
            "Transformer Engine 2.11.0",
            "Transformer Engine, distributed",
            "fused",
        ),
        (
            {"transformer_engine"},
            "2.11.0",
            Layers.local,
            "megatron-core local, torch SDPA attention",
            "Transformer Engine, distributed",
            "torch",
        ),
    ],
)
def test_the_banner_says_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
    installed: set[str],
    version: str | None,
    chosen: Layers,
    layers: str,
    optimizer: str,
    accumulation: str,
) -> None:
    pretend_installed(monkeypatch, installed)
    pretend_transformer_engine(monkeypatch, version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert CudaPlatform().describe(chosen) == [
        ("device", "H200 x 8, NCCL"),
        ("layers", layers),
        ("optimizer", optimizer),
        ("gradient accumulation", accumulation),
    ]


def test_missing_layers_are_an_error_that_says_how_to_go_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once Megatron's own layers were taken in silence, with experts one by one."""
    pretend_transformer_engine(monkeypatch, None)
    CudaPlatform().require_layers(Layers.local)
    with pytest.raises(PlatformError, match=r"transformer-engine is not installed.*policy.layers=local"):
        CudaPlatform().require_layers(Layers.transformer_engine)


@pytest.mark.parametrize("version", ["2.8.0", "2.13.0", "1.13"])
def test_a_version_outside_megatrons_own_bounds_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    pretend_transformer_engine(monkeypatch, version)
    requirements = ["torch", 'transformer-engine[pytorch]<2.12.0,>=2.9.0a0; extra == "dev"']
    monkeypatch.setattr(versions, "requires", {"megatron-core": requirements}.get)
    with pytest.raises(
        PlatformError, match=rf"transformer-engine {version} is installed, outside the range <2"
    ):
        CudaPlatform().require_layers(Layers.transformer_engine)


def test_one_that_was_built_for_another_torch_is_told(
    monkeypatch: pytest.MonkeyPatch, packages: Path
) -> None:
    """It can be found, and its import fails. (The real one: NameError or an undefined symbol.)"""
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformer_engine":
            monkeypatch.delitem(sys.modules, name)
    (packages / "transformer_engine").mkdir()
    (packages / "transformer_engine" / "__init__.py").write_text("")
    (packages / "transformer_engine" / "pytorch.py").write_text("raise NameError('_C is not defined')")
    pretend_transformer_engine(monkeypatch, "2.11.0")
    with pytest.raises(PlatformError, match=r"cannot be imported with torch .*NameError: _C is not .*=local"):
        CudaPlatform().require_layers(Layers.transformer_engine)


@pytest.mark.parametrize(
    ("requirements", "bounds"),
    [
        (['transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'], "<2.12.0,>=2.9.0a0"),
        (['transformer-engine[pytorch]; extra == "te"'], ">=2.9"),
        (["torch", "transformers"], ">=2.9"),
        (None, ">=2.9"),
    ],
)
def test_bounds_are_megatrons_own(
    monkeypatch: pytest.MonkeyPatch, requirements: list[str] | None, bounds: str
) -> None:
    monkeypatch.setattr(versions, "requires", {"megatron-core": requirements}.get)
    assert versions.transformer_engine_bounds() == bounds


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert CudaPlatform().prepare(3) == torch.device("cuda", 3)
    assert chosen == [3]
