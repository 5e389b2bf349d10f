"""How a bucket of named tensors travels to a server: base64 of a pickled `[(name, tensor), ...]`.

This is what SGLang's /update_weights_from_tensor takes
(https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/managers/io_struct.py). A pickle can run
code when it is loaded, so reading goes through an unpickler that knows tensors and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_drpo.errors import WeightSyncError

NamedTensors = list[tuple[str, torch.Tensor]]


def encode_bucket(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Serialise CPU tensors; the result is ASCII (base64).

    Tensors of one dtype are laid end to end in one storage, which is pickled once: a pickle per tensor
    costs ten times as much for the many small matrices of a mixture of experts.
    """
    flat: dict[torch.dtype, list[torch.Tensor]] = {}
    for _, tensor in tensors:
        flat.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
    storages = {dtype: torch.cat(parts)._typed_storage() for dtype, parts in flat.items()}
    offsets = dict.fromkeys(storages, 0)
    placed: list[tuple[str, _Placed]] = []
    for name, tensor in tensors:
        shape = tuple(tensor.shape)
        placed.append((name, _Placed(storages[tensor.dtype], offsets[tensor.dtype], shape)))
        offsets[tensor.dtype] += tensor.numel()
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(placed)
    return base64.b64encode(buffer.getbuffer())


def decode_bucket(payload: str) -> NamedTensors:
    """The tensors of one payload.

    Raises:
        WeightSyncError: not base64, not a pickle of named tensors, or a pickle that would run other code.
    """
    try:
        value = _TensorUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    except (binascii.Error, pickle.UnpicklingError, *_MALFORMED) as error:
        raise WeightSyncError(f"the tensor payload cannot be read: {error}") from error
    if not isinstance(value, list) or not all(_is_named_tensor(item) for item in value):
        raise WeightSyncError("the tensor payload is not a list of (name, tensor) pairs")
    return value


_MALFORMED = (EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError)
"""What unpickling raises on damaged input, UnpicklingError aside."""


def _is_named_tensor(item: object) -> bool:
    return (
        isinstance(item, (tuple, list))
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], torch.Tensor)
    )


class _Placed:
    """A contiguous tensor inside a shared storage; unpickled as a tensor."""

    def __init__(self, storage: torch.TypedStorage, offset: int, shape: tuple[int, ...]) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = shape

    @property
    def stride(self) -> tuple[int, ...]:
        return torch.empty(self.shape, device="meta").stride()


class _TensorPickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:  # NotImplemented: pickle as usual
        if not isinstance(obj, _Placed):
            return NotImplemented
        rebuild: Callable[..., torch.Tensor] = torch._utils._rebuild_tensor_v2
        return rebuild, (obj.storage, obj.offset, obj.shape, obj.stride, False, OrderedDict())


def _load_storage(data: bytes) -> torch.TypedStorage | torch.UntypedStorage:
    """torch.storage._load_from_bytes, but unable to run code."""
    storage = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):
        raise pickle.UnpicklingError(f"expected a tensor's storage, found {type(storage).__name__}")
    return storage


_ALLOWED_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): OrderedDict,
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ALLOWED_GLOBALS.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in a tensor payload")
        return allowed
