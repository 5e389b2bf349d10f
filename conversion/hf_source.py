"""Rows of an HF folder's tensors, read with plain reads into one buffer that is used again.

Not through memory maps: their pages count as resident memory of the process.
"""

from __future__ import annotations

import os

import torch

from conversion.manifest import find_manifest
from megatron_drpo.errors import ModelError
from megatron_drpo.fp8 import HF_SCALE_SUFFIX, check_quantization_config, dequantize_blockwise
from megatron_drpo.hf_io import HfFolder
from megatron_drpo.models.mapping import ParameterMapping

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class HfSource:
    """The weights of a folder, FP8 ones dequantised."""

    def __init__(self, folder: HfFolder, mapping: ParameterMapping, dtype: torch.dtype | None) -> None:
        """
        Args:
            folder: the weights.
            mapping: of the folder's family and architecture.
            dtype: everything is cast to it; None: each tensor keeps its own, FP8 becomes bfloat16.

        Raises:
            ModelError: names every tensor that is missing, unexpected, misshapen or of a wrong dtype.
        """
        if folder.config.has("quantization_config"):
            check_quantization_config(folder.config.value("quantization_config"), folder.config.source)
        self.folder = folder
        self._dtype = dtype
        self._manifest = find_manifest(folder.path)
        self._buffer = bytearray()
        self._descriptors: dict[str, int] = {}
        scales = {name for name in folder if name.endswith(HF_SCALE_SUFFIX)}
        mapping.check_hf(
            {name: folder.shape(name) for name in folder if name not in scales}, str(folder.path)
        )
        self.ignored = [name for name in folder if name not in mapping.hf_shapes and name not in scales]
        """Tensors that the family says are not needed: derived from the config, or a tied copy."""
        _check_scales(folder, scales)
        _check_dtypes(folder, list(mapping.hf_shapes))
        if self._manifest is not None:
            stored = {name: (folder.shape(name), folder.dtype(name)) for name in folder}
            self._manifest.check_tensors(folder.path, stored)

    def dtype(self, name: str) -> torch.dtype:
        """What `read_rows` returns."""
        stored = self.folder.dtype(name)
        if self._dtype is not None:
            return self._dtype
        return torch.bfloat16 if stored is torch.float8_e4m3fn else stored

    def source_bytes(self, name: str) -> int:
        """In the folder, without an FP8 tensor's scales."""
        info = self.folder.info(name)
        return torch.Size(info.shape).numel() * info.dtype.itemsize

    def read_rows(self, name: str, row: int, num_rows: int) -> torch.Tensor:
        """Rows [row, row + num_rows) of a tensor.

        Without a cast the values lie in a buffer that the next call overwrites.

        Raises:
            ModelError: the file ends early, cannot be read, or does not hold what these tools wrote there.
        """
        info = self.folder.info(name)
        row_bytes = torch.Size(info.shape[1:]).numel() * info.dtype.itemsize
        raw = self._pread(info.shard, info.offset + row * row_bytes, num_rows * row_bytes)
        # A tensor of its own on this memory: torch.save writes the whole storage of a view.
        values = torch.frombuffer(raw, dtype=info.dtype).view(num_rows, *info.shape[1:])
        self._check_hash(name, row, values)
        if info.dtype is torch.float8_e4m3fn:
            scale = self.folder.get(name + HF_SCALE_SUFFIX)
            self._check_hash(name + HF_SCALE_SUFFIX, 0, scale)
            try:
                return dequantize_blockwise(values, scale, self.dtype(name), first_row=row)
            except ModelError as error:
                raise ModelError(f"{self.folder.path / info.shard}: tensor {name!r}: {error}") from error
        return values.to(self.dtype(name))

    def _check_hash(self, name: str, row: int, values: torch.Tensor) -> None:
        problem = None if self._manifest is None else self._manifest.problem(name, row, values)
        if problem is not None:
            raise ModelError(f"{self.folder.path / self.folder.info(name).shard}: damaged: {problem}")

    def _pread(self, shard: str, offset: int, num_bytes: int) -> memoryview:
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        view = memoryview(self._buffer)[:num_bytes]
        path = self.folder.path / shard
        try:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(path, os.O_RDONLY)
            done = 0
            while done < num_bytes:  # one call reads at most 2 GiB
                count = os.preadv(self._descriptors[shard], [view[done:]], offset + done)
                if count == 0:
                    raise ModelError(
                        f"{path}: ends {num_bytes - done} bytes early: it changed while being read"
                    )
                done += count
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
        return view


def _check_scales(folder: HfFolder, scales: set[str]) -> None:
    """Exactly the FP8 tensors have a scale."""
    wanted = {name + HF_SCALE_SUFFIX for name in folder if folder.dtype(name) is torch.float8_e4m3fn}
    problems = [f"tensor {name!r} is missing" for name in sorted(wanted - scales)]
    problems += [f"tensor {name!r} has no FP8 weight" for name in sorted(scales - wanted)]
    if problems:
        raise ModelError(f"{folder.path}: " + "; ".join(problems[:20]))


def _check_dtypes(folder: HfFolder, names: list[str]) -> None:
    """One dtype, beside fp32 (routers and norms are often kept in it) and FP8 with scales."""
    dtypes = {name: folder.dtype(name) for name in names}
    main = [dtype for dtype in dtypes.values() if dtype in _FLOATS and dtype is not torch.float32]
    allowed = {torch.float32, torch.float8_e4m3fn, max(set(main), key=main.count, default=torch.float32)}
    wrong = [f"{name!r} is {dtype}" for name, dtype in dtypes.items() if dtype not in allowed]
    if wrong:
        raise ModelError(
            f"{folder.path}: {len(wrong)} tensors have an unexpected dtype: " + ", ".join(wrong[:5])
        )
