"""How Megatron comes to find the stand-in when it imports `transformer_engine`."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from megatron_drpo.platform.te_cpu.interface import NAME, children_of, names_of


class _Loader(importlib.abc.Loader):
    """Fills a module with the names that the table gives for it, and with the modules below it."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        for name, (place, attribute) in (names_of(module.__name__) or {}).items():
            setattr(module, name, getattr(importlib.import_module(place), attribute))
        for child in children_of(module.__name__):
            importlib.import_module(child)


class StandInFinder(importlib.abc.MetaPathFinder):
    """Answers for `transformer_engine` where nothing else does and there is no GPU."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != NAME or names_of(fullname) is None or _has_gpu():
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=True)


def offer() -> None:
    """Put the finder behind all others, so that an installed Transformer Engine is always preferred.

    It costs nothing before `transformer_engine` is imported. Idempotent.
    """
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def is_in_use() -> bool:
    """Megatron has found the stand-in, or finds it when it is imported."""
    try:
        extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    except ImportError:
        return False
    spec = getattr(sys.modules.get(NAME), "__spec__", None)
    return bool(extension.HAVE_TE) and isinstance(getattr(spec, "loader", None), _Loader)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
