"""Before the project's own of this name, on PYTHONPATH of SGLang servers that are to know `nccl_like`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parents[3]


def _load(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _register(weight_updater: ModuleType) -> None:
    _load("nccl_like", "tests/nccl_like.py").register()


_load("sglang_cpu", "megatron_drpo/fleet/sglang_cpu/sitecustomize.py")._AFTER[
    "sglang.srt.model_executor.model_runner_components.weight_updater"
] = _register
