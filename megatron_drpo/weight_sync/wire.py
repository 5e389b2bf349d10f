"""How a bucket travels to a server in a request: base64 of a pickle of a flat tensor and of what lies in it.

This is what SGLang's /update_weights_from_tensor takes with load_format=flattened_bucket
(https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/weight_sync/tensor_bucket.py). On a GPU
the flat tensor is a handle of its memory: one per bucket, while a handle per tensor would hang thousands of
deleters on one storage. A pickle can run code when it is loaded, so reading goes through an unpickler that
knows tensors and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.multiprocessing import reductions

from megatron_drpo.errors import WeightSyncError
from megatron_drpo.weight_sync.bucket import Bucket

NamedTensors = list[tuple[str, torch.Tensor]]

FLATTENED = "flattened_bucket"
"""The load_format of these payloads."""
_SGLANG_MODULE = "sglang.srt.weight_sync.tensor_bucket"
_SGLANG_CLASS = "FlattenedTensorMetadata"


def encode_bucket(bucket: Bucket) -> bytes:
    """Serialise a bucket on the CPU; the result is ASCII (base64)."""
    # A clone: a storage is pickled as a whole, and the bucket may be a part of a larger buffer.
    data = bucket.data.detach().clone()
    stored = io.BytesIO()
    torch.save(data._typed_storage(), stored, _use_new_zipfile_serialization=False)
    storage = _Call("torch.storage", "_load_from_bytes", (stored.getvalue(),))
    arguments = (storage, 0, tuple(data.shape), data.stride(), False, OrderedDict(), data.dtype)
    return _encode(_Call("torch._utils", "_rebuild_tensor_v3", arguments), bucket)


def encode_cuda_handle(bucket: Bucket) -> bytes:
    """Serialise a bucket on a GPU as a handle of its memory; the result is ASCII (base64) and small.

    The receiver, another process on this machine, maps the memory instead of copying it, so the bucket must
    stay as it is until it has answered. One result for one receiver: torch counts them. As SGLang's
    MultiprocessingSerializer does
    (https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/utils/patch_torch.py), the GPU is
    named by its UUID, because the two processes may number their GPUs differently.
    """
    _, arguments = reductions.reduce_tensor(bucket.data)
    flat = _Call("torch.multiprocessing.reductions", "rebuild_cuda_tensor", with_device_uuid(arguments))
    return _encode(flat, bucket)


def _encode(flat: _Call, bucket: Bucket) -> bytes:
    metadata = []
    start = 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        size = shape.numel() * dtype.itemsize
        fields = (name, tuple(shape), dtype, start, start + size, size)
        metadata.append(_Call(_SGLANG_MODULE, _SGLANG_CLASS, fields))
        start += size
    buffer = io.BytesIO()
    _CallPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(
        {"flattened_tensor": flat, "metadata": metadata}
    )
    return base64.b64encode(buffer.getbuffer())


@dataclass(frozen=True, slots=True)
class _Call:
    """What the reader calls in this place, by name: the class is SGLang's, which this environment does not
    have, and megatron-core 0.19 puts a function of its own into torch.storage, which servers do not have
    (https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.2/megatron/core/__init__.py)."""

    module: str
    name: str
    arguments: tuple[Any, ...]


class _CallPickler(pickle._Pickler):
    """The one in Python: the one in C looks up every name that it writes."""

    write: Callable[[bytes], object]
    save: Callable[[object], None]
    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def save_call(self, call: _Call) -> None:
        self.write(pickle.GLOBAL + f"{call.module}\n{call.name}\n".encode())
        self.save(call.arguments)
        self.write(pickle.REDUCE)

    dispatch[_Call] = save_call


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


# ------------------------------------------------------------------------------------------ reading


def decode_bucket(payload: str) -> NamedTensors:
    """The tensors of one payload with load_format=flattened_bucket, as views of one storage.

    Raises:
        WeightSyncError: not base64, not a pickle of such a bucket, or a pickle that would run other code.
    """
    value = _load(payload)
    if not isinstance(value, dict) or value.keys() != {"flattened_tensor", "metadata"}:
        raise WeightSyncError("the tensor payload is not a flattened bucket")
    flat, metadata = value["flattened_tensor"], value["metadata"]
    is_flat = isinstance(flat, torch.Tensor) and flat.dtype is torch.uint8 and flat.dim() == 1
    if not is_flat or not isinstance(metadata, list):
        raise WeightSyncError("the tensor payload is not a flattened bucket")
    return [_view(flat, entry) for entry in metadata]


def decode_named_tensors(payload: str) -> NamedTensors:
    """The tensors of one payload without a load_format: a pickle of `[(name, tensor), ...]`.

    Raises:
        WeightSyncError: not base64, not a pickle of named tensors, or a pickle that would run other code.
    """
    value = _load(payload)
    if not isinstance(value, list) or not all(_is_named_tensor(item) for item in value):
        raise WeightSyncError("the tensor payload is not a list of (name, tensor) pairs")
    return value


def _load(payload: str) -> object:
    try:
        return _TensorUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    except (binascii.Error, pickle.UnpicklingError, *_MALFORMED) as error:
        raise WeightSyncError(f"the tensor payload cannot be read: {error}") from error


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


@dataclass(frozen=True, slots=True)
class _Metadata:
    """SGLang's FlattenedTensorMetadata: a tensor and its bytes in the flat one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def _view(flat: torch.Tensor, entry: object) -> tuple[str, torch.Tensor]:
    if not isinstance(entry, _Metadata) or not isinstance(entry.name, str):
        raise WeightSyncError("the tensor payload is not a flattened bucket")
    start, end = entry.start_idx, entry.end_idx
    try:
        if not 0 <= start <= end <= flat.numel():
            raise ValueError(f"bytes {start} to {end} of {flat.numel()}")
        return entry.name, flat[start:end].view(entry.dtype).view(entry.shape)
    except _MALFORMED as error:
        raise WeightSyncError(f"the tensor payload: {entry.name!r} does not fit: {error}") from error


def _load_storage(data: bytes) -> torch.TypedStorage | torch.UntypedStorage:
    """torch.storage._load_from_bytes, but unable to run code."""
    storage = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):
        raise pickle.UnpicklingError(f"expected a tensor's storage, found {type(storage).__name__}")
    return storage


_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.uint8, torch.int8, torch.int32, torch.int64),
)
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): torch._utils._rebuild_tensor_v3,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _load_storage,
    (_SGLANG_MODULE, _SGLANG_CLASS): _Metadata,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ALLOWED_GLOBALS.get((module_name, global_name))
        if allowed is None:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in a tensor payload")
        return allowed
