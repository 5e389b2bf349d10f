"""The header of a safetensors file: read and checked, or made before any data is there.

Format (8 bytes of header length, a JSON header, the data): https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_drpo.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
"""Of the data; the header is padded with spaces."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    shard: str
    """File name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Of its first byte in the file."""


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after checking the header and that all bytes are there.

    Raises:
        ModelError: the file is missing, truncated or damaged, or has a dtype that is not known here.
    """
    if not file.is_file():
        raise ModelError(f"{file}: shard is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + header_size > size:
            raise ModelError(
                f"{file}: truncated, or not a safetensors file: {size} bytes do not hold the header"
            )
        content = stream.read(header_size)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        start = 8 + header_size
        expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        dtypes = {entry["dtype"] for entry in header.values()}
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise ModelError(f"{file}: not a safetensors file, or a damaged header: {error!r}") from error
    if size != expected:
        word = "truncated" if size < expected else "damaged"
        raise ModelError(f"{file}: {word}: {size} bytes, the header announces {expected}")
    if unknown := sorted(map(str, dtypes - _DTYPES.keys())):
        raise ModelError(f"{file}: unsupported dtypes {unknown}")
    try:  # checks the rest: offsets without gaps or overlaps, sizes that fit shapes and dtypes
        with safe_open(file, framework="pt", device="cpu"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged header: {error}") from error
    return {
        name: TensorInfo(
            file.name, tuple(entry["shape"]), _DTYPES[entry["dtype"]], start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def build_header(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """What a file with these tensors, in this order, begins with.

    Args:
        tensors: name -> shape and dtype.
        metadata: string pairs; transformers wants `format: pt`.

    Returns:
        The file's first bytes, the file offset of every tensor, and the size of the whole file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        starts[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    prefix = struct.pack("<Q", len(content)) + content
    return prefix, {name: len(prefix) + start for name, start in starts.items()}, len(prefix) + end
