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
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_drpo.errors import WeightSyncError

_ALIGNMENT = 16
"""Bytes; a multiple of every dtype's size."""

NamedTensors = list[tuple[str, torch.Tensor]]


def encode_bucket(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Serialise CPU tensors of any dtypes; the result is ASCII (base64).

    All tensors are laid end to end in one storage, which is pickled once: a storage per tensor costs ten
    times as much for the many small matrices of a mixture of experts.
    """
    starts: list[int] = []
    size = 0
    for _, tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    data = torch.zeros(size, dtype=torch.uint8)
    for (_, tensor), start in zip(tensors, starts, strict=True):
        data[start : start + tensor.nbytes] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    storage = data._typed_storage()
    placed = [
        (name, _Placed(storage, tensor.dtype, start // tensor.itemsize, tuple(tensor.shape)))
        for (name, tensor), start in zip(tensors, starts, strict=True)
    ]
    buffer = io.BytesIO()
    with _torchs_own_loader():
        _TensorPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(placed)
    return base64.b64encode(buffer.getbuffer())


def encode_cuda_handles(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Serialise CUDA tensors as handles of their memory; the result is ASCII (base64) and small.

    The receiver, another process on this machine, maps the memory instead of copying it, so the tensors must
    stay as they are until it has answered. One result for one receiver: torch counts them. As SGLang's
    MultiprocessingSerializer does
    (https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/utils/patch_torch.py), the GPU is
    named by its UUID, because the two processes may number their GPUs differently.
    """
    buffer = io.BytesIO()
    _HandlePickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(list(tensors))
    return base64.b64encode(buffer.getbuffer())


class _HandlePickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:  # NotImplemented: pickle as usual
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(obj)
        return rebuild, with_device_uuid(arguments)


_DEVICE_ARGUMENT = 6
"""Of torch.multiprocessing.reductions.rebuild_cuda_tensor."""


def with_device_uuid(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of rebuild_cuda_tensor with the device's UUID in the place of its number."""
    before, device, after = (
        arguments[:_DEVICE_ARGUMENT],
        arguments[_DEVICE_ARGUMENT],
        arguments[_DEVICE_ARGUMENT + 1 :],
    )
    return (*before, str(torch.cuda.get_device_properties(device).uuid), *after)


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


_MALFORMED = (
    *(EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(RuntimeError, AssertionError, ArithmeticError, MemoryError, NameError, struct.error),
)
"""What unpickling and torch.load raise on damaged input, UnpicklingError aside."""


def _is_named_tensor(item: object) -> bool:
    return (
        isinstance(item, (tuple, list))
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], torch.Tensor)
    )


class _Placed:
    """A contiguous tensor inside a shared storage; unpickled as a tensor."""

    def __init__(
        self, storage: torch.TypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...]
    ) -> None:
        """
        Args:
            offset: of the first element, in elements.
        """
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape

    @property
    def stride(self) -> tuple[int, ...]:
        return torch.empty(self.shape, device="meta").stride()


_NO_HOOKS: OrderedDict[str, object] = OrderedDict()


class _TensorPickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:  # NotImplemented: pickle as usual
        if not isinstance(obj, _Placed):
            return NotImplemented
        rebuild: Callable[..., torch.Tensor] = torch._utils._rebuild_tensor_v3
        return rebuild, (obj.storage, obj.offset, obj.shape, obj.stride, False, _NO_HOOKS, obj.dtype)


def _load_storage(data: bytes) -> torch.TypedStorage | torch.UntypedStorage:
    """torch.storage._load_from_bytes, but unable to run code."""
    storage = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):
        raise pickle.UnpicklingError(f"expected a tensor's storage, found {type(storage).__name__}")
    return storage


def _load_from_bytes(b: bytes) -> torch.TypedStorage | torch.UntypedStorage:
    """Pickled by the name of torch's function."""
    return _load_storage(b)


_load_from_bytes.__module__ = "torch.storage"


@contextmanager
def _torchs_own_loader() -> Iterator[None]:
    """A storage is pickled as a call of whatever torch.storage._load_from_bytes is at that moment.

    megatron-core 0.19 puts a function of its own there, which servers neither have nor allow.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.2/megatron/core/__init__.py
    """
    found = torch.storage._load_from_bytes
    torch.storage._load_from_bytes = _load_from_bytes
    try:
        yield
    finally:
        torch.storage._load_from_bytes = found


_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.uint8, torch.int8, torch.int32, torch.int64),
)
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): torch._utils._rebuild_tensor_v3,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ALLOWED_GLOBALS.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in a tensor payload")
        return allowed
