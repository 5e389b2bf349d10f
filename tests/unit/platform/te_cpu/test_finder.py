"""Who finds the stand-in, and when."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_drpo.platform.te_cpu import finder
from megatron_drpo.platform.te_cpu.finder import StandInFinder, is_in_use, offer
from megatron_drpo.platform.te_cpu.interface import DEFAULT_VERSION, INTERFACE, NAME, VERSION_VARIABLE


def run_python(code: str, path: Path | None = None, version: str = DEFAULT_VERSION) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, VERSION_VARIABLE: version}
    if path is not None:
        environment["PYTHONPATH"] = f"{path}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_megatron_takes_it_for_transformer_engine() -> None:
    import megatron.core.extensions.transformer_engine as extension
    from megatron.core.utils import get_te_version

    assert is_in_use()
    assert extension.HAVE_TE
    assert str(get_te_version()) == DEFAULT_VERSION


@pytest.mark.parametrize("module", INTERFACE)
def test_every_name_of_the_table_is_there(module: str) -> None:
    loaded = importlib.import_module(f"{NAME}.{module}" if module else NAME)
    assert {name for name in INTERFACE[module] if not hasattr(loaded, name)} == set()


def test_a_name_outside_the_table_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"transformer_engine\.jax"):
        importlib.import_module("transformer_engine.jax")


def test_an_installed_transformer_engine_is_preferred(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text("__version__ = 'the real one'")
    code = "import megatron_drpo, transformer_engine as te; print(te.__version__)"
    assert run_python(code, tmp_path) == "the real one"
    assert run_python(code) == DEFAULT_VERSION


def test_there_is_none_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StandInFinder().find_spec(NAME, None) is not None
    monkeypatch.setattr(finder, "_has_gpu", lambda: True)
    assert StandInFinder().find_spec(NAME, None) is None


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, megatron_drpo; print({'torch', 'megatron', 'transformer_engine'} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_it_is_offered_once() -> None:
    offer()
    assert sum(isinstance(finder, StandInFinder) for finder in sys.meta_path) == 1


def test_megatron_imported_before_does_not_have_it() -> None:
    code = (
        "import megatron.core, megatron_drpo; from megatron_drpo.platform.te_cpu.finder import is_in_use; "
        "print(is_in_use())"
    )
    assert run_python(code) == "False"


@pytest.mark.parametrize(("version", "marks"), [("2.12.0", "True"), ("2.13.0", "False"), ("2.14", "False")])
def test_the_version_it_behaves_as(version: str, marks: str) -> None:
    code = (
        "import megatron_drpo, transformer_engine as te; "
        "from transformer_engine.pytorch import GroupedLinear; "
        "layer = GroupedLinear(2, 4, 4, bias=False); "
        "print(te.__version__, hasattr(layer.weight1, 'tensor_model_parallel'))"
    )
    assert run_python(code, version=version) == f"{version} {marks}"
