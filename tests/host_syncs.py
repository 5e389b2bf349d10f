"""Where the host would wait for a GPU, counted on a CPU.

On a GPU an operator is queued and the host goes on, unless it needs a value to do so: a number for an `if`,
the size of what `nonzero` returns, the bytes of a copy from or to pageable memory. Each such wait lets the
queue run empty. torch names them itself on a GPU (`torch.cuda.set_sync_debug_mode`); here the operators that
wait there are known by name.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.histc,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
_WAITING_WITH_MASKS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""A mask among the indices is made positions by `nonzero`."""
_COPYING = {"tolist", "cpu", "numpy", "tensor", "as_tensor"}
"""Functions that copy between host and device, which is no operator where both are the same memory."""
_STANDS_IN = ("platform/te_cpu/", "platform/cpu.py")
"""What these compute, a GPU's kernels or torch.cuda do."""


class HostSyncs:
    """Where the host waited: "megatron_drpo/policy/forward.py:of", and how often."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def of(self, package: str) -> dict[str, int]:
        """The places in one package."""
        return {place: count for place, count in sorted(self.counts.items()) if place.startswith(package)}

    def note(self) -> None:
        frames = [(PurePath(frame.filename).as_posix(), frame.name) for frame in traceback.extract_stack()]
        if any(part in path for path, _ in frames for part in _STANDS_IN):
            return
        for path, name in reversed(frames):
            for package in ("megatron_drpo/", "megatron/core/"):
                if package in path:
                    self.counts[f"{package}{path.rpartition(package)[2]}:{name}"] += 1
                    return


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        has_mask = packet in _WAITING_WITH_MASKS and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        is_unsized = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in _WAITING or has_mask or is_unsized:
            self._syncs.note()
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _COPYING:
            self._syncs.note()
        return func(*args, **(kwargs or {}))


@contextmanager
def count_host_syncs() -> Iterator[HostSyncs]:
    """Counts what happens inside, backward passes included."""
    syncs = HostSyncs()
    with _Operators(syncs), _Methods(syncs):
        yield syncs
