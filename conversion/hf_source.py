"""The weights of an HF folder as a conversion wants them: complete, of known dtypes, FP8 dequantised."""

from __future__ import annotations

import torch

from conversion.hf_rows import HfRows
from conversion.manifest import find_manifest
from megatron_drpo.errors import ModelError
from megatron_drpo.weights.fp8 import BLOCK, HF_SCALE_SUFFIX, check_quantization_config, dequantize_blockwise
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.mapping import ParameterMapping

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class HfSource:
    """A folder that is opened for a conversion."""

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
        manifest = find_manifest(folder.path)
        self._rows = HfRows(folder, manifest)
        self._scales = HfRows(folder, manifest)
        scales = {name for name in folder if name.endswith(HF_SCALE_SUFFIX)}
        mapping.check_hf(
            {name: folder.shape(name) for name in folder if name not in scales}, str(folder.path)
        )
        self.ignored = [name for name in folder if name not in mapping.hf_shapes and name not in scales]
        """Tensors that the family says are not needed: derived from the config, or a tied copy."""
        _check_scales(folder, scales)
        _check_dtypes(folder, list(mapping.hf_shapes))
        if manifest is not None:
            stored = {name: (folder.shape(name), folder.dtype(name)) for name in folder}
            manifest.check_tensors(folder.path, stored)

    def dtype(self, name: str) -> torch.dtype:
        """What `read_rows` returns."""
        stored = self.folder.dtype(name)
        if self._dtype is not None:
            return self._dtype
        return torch.bfloat16 if stored is torch.float8_e4m3fn else stored

    def read_rows(self, name: str, row: int, num_rows: int) -> torch.Tensor:
        """Rows [row, row + num_rows) of a tensor.

        Without a cast the values lie in a buffer that the next call overwrites.

        Raises:
            ModelError: it cannot be read, or is damaged.
        """
        values = self._rows.read(name, row, num_rows)
        if values.dtype is not torch.float8_e4m3fn:
            return cast_rows(values, self.dtype(name), f"{self.folder.path}: tensor {name!r}")
        scale_name = name + HF_SCALE_SUFFIX
        scale = self._scales.read(scale_name, 0, self.folder.shape(scale_name)[0])
        try:
            return dequantize_blockwise(values, scale, self.dtype(name), first_row=row)
        except ModelError as error:
            shard = self.folder.path / self.folder.info(name).shard
            raise ModelError(f"{shard}: tensor {name!r}: {error}") from error


def cast_rows(rows: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """Rows in another dtype.

    Raises:
        ModelError: names `what` if a finite value would become infinite.
    """
    cast = rows.to(dtype)
    is_narrower = torch.finfo(dtype).max < torch.finfo(rows.dtype).max
    if is_narrower and cast.isinf().any() and not torch.equal(cast.isinf(), rows.isinf()):
        raise ModelError(f"{what} has values too large for {dtype}: choose another --dtype")
    return cast


def _check_scales(folder: HfFolder, scales: set[str]) -> None:
    """Exactly the FP8 tensors have scales, one per block."""
    wanted = {name + HF_SCALE_SUFFIX for name in folder if folder.dtype(name) is torch.float8_e4m3fn}
    problems = [f"tensor {name!r} is missing" for name in sorted(wanted - scales)]
    problems += [f"tensor {name!r} has no FP8 weight" for name in sorted(scales - wanted)]
    for name in sorted(wanted & scales):
        expected = tuple(-(-size // BLOCK) for size in folder.shape(name.removesuffix(HF_SCALE_SUFFIX)))
        if folder.shape(name) != expected:
            found = list(folder.shape(name))
            problems.append(f"tensor {name!r}: expected shape {list(expected)}, found {found}")
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
