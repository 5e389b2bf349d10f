"""What an allocator would show on a GPU, on any device: bytes of live tensors, and their peak."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """`with MemoryMeter() as meter: work(); meter.peak_bytes`.

    Counts the storages that operators of this thread make while the meter is on, from the operator to
    their release. What existed before is not counted, nor what an operator uses and frees inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: dict[int, StorageWeakRef] = {}

    def live_bytes(self) -> int:
        """Right now."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, new=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._note(leaf, new=True)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result

    def _note(self, leaf: Any, *, new: bool) -> None:
        """A storage first seen as an argument existed before; first seen as a result, it was made here."""
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        reference = StorageWeakRef(storage)
        known = self._known.get(reference.cdata)
        if known is not None and not known.expired():
            return
        self._known[reference.cdata] = reference
        if new:
            self._live[reference.cdata] = (reference, storage.nbytes())
