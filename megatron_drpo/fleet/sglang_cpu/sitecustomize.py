"""What SGLang 0.5.23 needs where only its CUDA builds would bring it; on PYTHONPATH of CPU servers alone.

Python runs a module of this name before everything else, in the server and in every process it starts. Each
fix waits for the import of the module it belongs to.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_KEPT: list[Any] = []
"""Operator libraries, which vanish with their Python object."""


def _declare_torchvision_operators() -> None:
    """PyPI's torchvision has its operators in a library that needs CUDA; importing it takes their schemas."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def _register_no_host_memory(module: ModuleType) -> None:
    """The buffer of routed experts is registered with CUDA, of which there is none."""
    module._cuda_host_register = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def _sleep_while_paused(module: ModuleType) -> None:
    """With --sleep-on-idle too, a paused scheduler spins: the cores that a weight update needs are taken."""
    scheduler = module.Scheduler
    record = scheduler._record_scheduler_state_for_paused_engine

    def record_and_sleep(self: Any) -> None:
        record(self)
        self.maybe_sleep_on_idle()

    scheduler._record_scheduler_state_for_paused_engine = record_and_sleep


_BEFORE: dict[str, Callable[[], None]] = {"torchvision": _declare_torchvision_operators}
_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "sglang.srt.mem_cache.pool_host.common": _register_no_host_memory,
    "sglang.srt.managers.scheduler": _sleep_while_paused,
}


class _Fixer(importlib.abc.MetaPathFinder):
    """Runs each fix once, before or after the import of its module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        before, after = _BEFORE.pop(fullname, None), _AFTER.pop(fullname, None)
        if before is not None:
            before()
        if after is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_fix(module: ModuleType) -> None:
            execute(module)
            after(module)

        spec.loader.exec_module = execute_and_fix  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Fixer())
