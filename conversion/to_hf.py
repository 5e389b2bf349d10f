"""torch_dist checkpoint -> HF folder, piece by piece. Optimizer state is left out, padding trimmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.hf_source import cast_rows
from conversion.hf_target import HfTarget
from conversion.manifest import MANIFEST_FILE, Manifest, find_manifest, hash_rows
from conversion.plan import UNIT_BYTES, Piece, Unit, check_coverage, cut, group_into_units, hf_runs
from conversion.torch_dist_reader import TorchDistReader
from conversion.workspace import Workspace
from megatron_drpo.errors import CheckpointError, ConversionError
from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.fp8 import (
    BLOCK,
    HF_SCALE_SUFFIX,
    is_quantized,
    quantization_config,
    quantize_blockwise,
)
from megatron_drpo.weights.hf_folder import (
    MAX_SHARD_BYTES,
    copy_config_files,
    read_hf_config,
    update_config,
    write_index,
)
from megatron_drpo.weights.mapping import TensorMap
from megatron_drpo.weights.torch_dist import HF_FOLDER
from megatron_drpo.weights.torch_dist_keys import Place, Places, check_places, find_layout, is_training_state


@dataclass(frozen=True, slots=True, kw_only=True)
class ToHfOptions:
    """What shapes the output."""

    dtype: torch.dtype | None = None
    """None: every tensor keeps its own."""
    fp8_blockwise: bool = False
    """Quantise what an FP8 checkpoint quantises; the rest is as `dtype` says."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    unit_bytes: int = UNIT_BYTES
    """That a worker does in one go."""


class ToHf:
    """The whole conversion; made once, then used by every worker."""

    def __init__(self, source: Path, config_folder: Path | None, options: ToHfOptions) -> None:
        """
        Args:
            source: whatever `find_checkpoint` takes.
            config_folder: HF folder with config.json and tokenizer (weights are not needed); None: the one
                that the checkpoint was converted from, if it was.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged, or does not fit the config.
            ModelError: the config is not supported.
            ConversionError: there is no config.
        """
        self.reader = TorchDistReader(source)
        self._manifest = find_manifest(self.reader.path)
        self.options = options
        self.config_folder = config_folder or self.reader.path / HF_FOLDER
        if not (self.config_folder / "config.json").is_file():
            raise ConversionError(
                f"{self.config_folder}: no config.json there: give the Hugging Face folder of the model, its "
                "config and tokenizer, with --hf"
            )
        config = read_hf_config(self.config_folder)
        family = get_family(config)
        self.arch = family.architecture(config)
        self.mapping = family.mapping(self.arch)
        self.places = Places(self.mapping, find_layout(self.reader.tensors))
        shapes = {key: tensor.shape for key, tensor in self.reader.tensors.items()}
        check_places(self.places, shapes, f"{self.reader.path} (with {self.config_folder / 'config.json'})")
        self._check_manifest()
        self.skipped = [key for key in shapes if is_training_state(key)]
        """Keys that are no weights."""
        self.target = HfTarget(dict(self._target_tensors()), options.max_shard_bytes)
        self.units = group_into_units(self._pieces(), options.unit_bytes)
        check_coverage(self.units, self.mapping, lambda tensor_map: tensor_map.shape[0])

    @property
    def sources(self) -> list[Path]:
        return [self.reader.path, self.config_folder]

    @property
    def output_bytes(self) -> int:
        return self.target.total_bytes

    def summary(self) -> list[tuple[str, str]]:
        """Lines of the printed plan."""
        files = sorted(set(self.target.weight_map.values()))
        lines = [
            ("weights", f"{self.output_bytes / 1e9:.2f} GB in {len(files)} files"),
            ("layout", str(self.places.layout)),
            ("dtype", self._describe_options()["dtype"]),
            ("config", str(self.config_folder)),
        ]
        if self.skipped:
            num_bytes = sum(
                torch.Size(self.reader.tensors[key].shape).numel() * self.reader.tensors[key].dtype.itemsize
                for key in self.skipped
            )
            lines.append(
                ("left out", f"{len(self.skipped)} tensors of optimizer state, {num_bytes / 1e9:.2f} GB")
            )
        return lines

    def description(self) -> dict[str, Any]:
        """What makes two conversions the same: the input's files and the options."""
        files = {file.name: file.stat() for file in sorted(self.reader.path.iterdir()) if file.is_file()}
        config = (self.config_folder / "config.json").read_text("utf-8")
        return {
            "to": "hf",
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
            "config": config,
            "options": self._describe_options(),
            "max_shard_bytes": self.options.max_shard_bytes,
            "unit_bytes": self.options.unit_bytes,
        }

    def prepare(self, content: Path) -> None:
        """The weights files, in full size."""
        self.target.create(content)

    def work(self, unit: Unit, content: Path, count: Callable[[int], None]) -> dict[str, Any]:
        """Write one unit; returns its record for the journal."""
        hashes: list[tuple[str, int, int, str]] = []
        for piece in unit.pieces:
            for name, row, values in self.read_rows(piece):
                problem = None if self._manifest is None else self._manifest.problem(name, row, values)
                if problem is not None:
                    raise CheckpointError(f"{self.reader.path}: damaged: {problem}")
                for stored_name, stored_row, stored in self._stored(name, row, values):
                    self.target.write_rows(content, stored_name, stored_row, stored)
                    hashes.append((stored_name, stored_row, len(stored), hash_rows(stored)))
            count(piece.num_bytes)
        self.target.flush()
        return {"num_bytes": unit.num_bytes, "hashes": hashes}

    def finish(self, workspace: Workspace) -> None:
        """All that is not weights, once every unit is done."""
        folder = workspace.content
        copy_config_files(self.config_folder, folder)
        dtypes = [self._dtype(tensor_map) for tensor_map in self.mapping for _ in tensor_map.hf]
        update_config(
            folder,
            max(set(dtypes), key=dtypes.count),
            quantization_config(self.mapping.hf_shapes) if self.options.fp8_blockwise else None,
        )
        write_index(folder, self.target.weight_map, self.target.total_bytes)
        manifest = Manifest(
            source=self.reader.path.name,
            options=self._describe_options(),
            dtypes={name: str(dtype).removeprefix("torch.") for name, (_, dtype) in self._target_tensors()},
        )
        weights = set(self.target.weight_map.values())
        others = [file for file in folder.iterdir() if file.name not in {*weights, MANIFEST_FILE}]
        manifest.add_files(folder, sorted(others))
        for unit in self.units:
            for entry in workspace.done[unit.index]["hashes"]:
                manifest.add(*entry)
        manifest.write(folder)

    def _describe_options(self) -> dict[str, Any]:
        dtype = self.options.dtype
        name = "as stored" if dtype is None else str(dtype).removeprefix("torch.")
        return {"dtype": name + (", fp8 blockwise" if self.options.fp8_blockwise else "")}

    def _check_manifest(self) -> None:
        if self._manifest is not None:
            tensors = {
                name: (shape, self._stored_dtype(tensor_map))
                for tensor_map in self.mapping
                for name, shape in tensor_map.hf
            }
            self._manifest.check_tensors(self.reader.path, tensors)

    def _stored_dtype(self, tensor_map: TensorMap) -> torch.dtype:
        return self.reader.tensors[self.places[tensor_map.name].key].dtype

    def _dtype(self, tensor_map: TensorMap) -> torch.dtype:
        return self.options.dtype or self._stored_dtype(tensor_map)

    def _quantized(self) -> set[str]:
        if not self.options.fp8_blockwise:
            return set()
        return {name for name, shape in self.mapping.hf_shapes.items() if is_quantized(name, shape)}

    def _target_tensors(self) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        quantized = self._quantized()
        for tensor_map in self.mapping:
            for name, shape in tensor_map.hf:
                if name in quantized:
                    yield name, (shape, torch.float8_e4m3fn)
                    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
                    yield name + HF_SCALE_SUFFIX, (blocks, torch.float32)
                else:
                    yield name, (shape, self._dtype(tensor_map))

    def _pieces(self) -> Iterator[Piece]:
        quantized = self._quantized()
        for tensor_map in self.mapping:
            is_fp8 = any(tensor.name in quantized for tensor in tensor_map.hf)
            yield from cut(
                tensor_map,
                tensor_map.shape[0],
                1 if is_fp8 else self._dtype(tensor_map).itemsize,
                may_cut=self._cuts(tensor_map),
                hf_multiple=BLOCK if is_fp8 else 1,
            )

    def _cuts(self, tensor_map: TensorMap) -> Callable[[int], bool]:
        """Cutting a stored chunk would mean to read it twice."""
        place = self.places[tensor_map.name]
        row_axis = len(place.leading_shape)
        inside: list[tuple[int, int]] = []
        for chunk in self.reader.chunks_in(place.key, *_rectangle(place, 0, tensor_map.shape)):
            start = chunk.offset[row_axis]
            inside.append((start, start + chunk.shape[row_axis]))
        return lambda row: not any(start < row < stop for start, stop in inside)

    def read_matrix(self, tensor_map: TensorMap) -> torch.Tensor:
        """A whole Megatron matrix, without padding."""
        return self._read(tensor_map, 0, tensor_map.shape[0])

    def _read(self, tensor_map: TensorMap, start: int, stop: int) -> torch.Tensor:
        place = self.places[tensor_map.name]
        shape = (stop - start, *tensor_map.shape[1:])
        return self.reader.read(place.key, *_rectangle(place, start, shape)).view(shape)

    def read_rows(self, piece: Piece) -> Iterator[tuple[str, int, torch.Tensor]]:
        """HF tensor, first row and values."""
        tensor_map = self.mapping[piece.name]
        matrix = self._read(tensor_map, piece.start, piece.stop)
        if tensor_map.num_groups > 1:
            parts = [(name, 0, values) for name, values in tensor_map.to_hf(matrix).items()]
        else:
            (run,) = hf_runs(tensor_map, piece)
            parts = [(run.name, run.row, matrix)]
        yield from parts

    def _stored(self, name: str, row: int, values: torch.Tensor) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What is written for these rows: cast, or FP8 values and their scales."""
        if self.options.fp8_blockwise and is_quantized(name, self.mapping.hf_shapes[name]):
            try:
                quantized, scales = quantize_blockwise(values)
            except ValueError as error:
                raise ConversionError(f"tensor {name!r} cannot be quantised: {error}") from error
            yield name, row, quantized
            yield name + HF_SCALE_SUFFIX, row // BLOCK, scales
            return
        dtype = self.options.dtype or values.dtype
        yield name, row, cast_rows(values, dtype, f"{self.reader.path}: tensor {name!r}")


def _rectangle(place: Place, row: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape, within the stored tensor, of rows of a matrix."""
    offset = (*place.leading_offset, row, *(0 for _ in shape[1:]))
    return offset, (*(1 for _ in place.leading_shape), *shape)
