"""HF folder -> torch_dist checkpoint, piece by piece.

TARGET/
    latest_checkpointed_iteration.txt   `release`, for Megatron-LM
    release/
        __0_0.distcp ...                tensors, a file per unit
        .metadata metadata.json common.pt integrity.json
        conversion.json                 hashes of every tensor
        hf/                             config.json and tokenizer, for the way back
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.extra_state import extra_state_keys
from conversion.hf_source import HfSource
from conversion.manifest import Manifest, hash_rows
from conversion.plan import UNIT_BYTES, Piece, Unit, check_coverage, cut, group_into_units, hf_runs
from conversion.torch_dist_reader import Chunk
from conversion.torch_dist_writer import (
    DataFile,
    GlobalTensor,
    data_file_name,
    with_leading_ones,
    write_common_state,
    write_metadata,
)
from conversion.workspace import Workspace
from megatron_drpo.errors import ConversionError, ModelError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.hf_folder import HfFolder, copy_config_files, update_config
from megatron_drpo.weights.integrity import write_integrity
from megatron_drpo.weights.mapping import TensorMap
from megatron_drpo.weights.tied_head import check_tied_head
from megatron_drpo.weights.torch_dist import HF_FOLDER, TRACKER_FILE
from megatron_drpo.weights.torch_dist_keys import KeyLayout, Places

RELEASE = "release"
"""Megatron-LM's name for weights that belong to no iteration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMegatronOptions:
    """What shapes the output."""

    layout: KeyLayout | None = None
    """None: as Megatron itself would have it for this model."""
    dtype: torch.dtype | None = None
    """None: every tensor keeps its own; FP8 becomes bfloat16."""
    vocab_multiple: int = 128
    """The vocabulary is padded with zero rows to a multiple of it."""
    unit_bytes: int = UNIT_BYTES
    """That a worker does in one go: of one data file."""


class ToMegatron:
    """The whole conversion; made once, then used by every worker."""

    def __init__(self, source: Path, options: ToMegatronOptions) -> None:
        """
        Raises:
            ModelError: the folder or its family is not supported, damaged, or does not fit its config.
            ConversionError: the layout cannot hold this model.
        """
        self.folder = HfFolder(source)
        family = get_family(self.folder.config)
        self.arch = family.architecture(self.folder.config)
        self.mapping = family.mapping(self.arch)
        self.source = HfSource(self.folder, self.mapping, options.dtype)
        self.options = options
        layout = options.layout or default_layout(self.arch)
        if layout is KeyLayout.stacked and default_layout(self.arch) is KeyLayout.per_layer:
            raise ConversionError(
                f"{source}: dense and MoE layers are mixed: they cannot be stacked; use --layout per-layer"
            )
        self.places = Places(self.mapping, layout)
        self._dtypes = self._dtype_of_keys()
        self.units = group_into_units(self._pieces(), options.unit_bytes)
        check_coverage(self.units, self.mapping, self.num_rows)

    @property
    def sources(self) -> list[Path]:
        return [self.folder.path]

    @property
    def output_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)

    def num_rows(self, tensor_map: TensorMap) -> int:
        """Of a Megatron matrix, padding included."""
        multiple = self.options.vocab_multiple if tensor_map.padded else 1
        return -(-tensor_map.shape[0] // multiple) * multiple

    def description(self) -> dict[str, Any]:
        """What makes two conversions the same: the input's files and the options."""
        shards = sorted({self.folder.info(name).shard for name in self.folder})
        files = {name: (self.folder.path / name).stat() for name in ("config.json", *shards)}
        return {
            "to": "torch_dist",
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
            "options": self._describe_options(),
            "unit_bytes": self.options.unit_bytes,
        }

    def prepare(self, content: Path) -> None:
        """The folder of the data files; a tied output matrix in the source must be the embedding."""
        check_tied_head(self.folder)
        (content / RELEASE).mkdir(exist_ok=True)

    def work(self, unit: Unit, content: Path, count: Callable[[int], None]) -> dict[str, Any]:
        """Write one unit; returns its record for the journal."""
        hashes: list[tuple[str, int, int, str]] = []
        with DataFile(content / RELEASE / data_file_name(unit.index)) as data:
            for piece in unit.pieces:
                tensor, of_rows = self._read(piece)
                hashes += of_rows
                place = self.places[piece.name]
                data.add(with_leading_ones(tensor, place.leading_shape))
                count(piece.num_bytes)
        return {
            "num_bytes": unit.num_bytes,
            "file_bytes": data.num_bytes,
            "sha256": data.sha256(),
            "places": data.places,
            "hashes": hashes,
        }

    def finish(self, workspace: Workspace) -> None:
        """All that is not tensors, once every unit is done."""
        folder = workspace.content / RELEASE
        (folder / HF_FOLDER).mkdir(exist_ok=True)
        copy_config_files(self.folder.path, folder / HF_FOLDER)
        dtypes = [self.source.dtype(name) for name in self.mapping.hf_shapes]
        update_config(folder / HF_FOLDER, max(set(dtypes), key=dtypes.count))
        manifest = Manifest(
            source=self.folder.path.name,
            options=self._describe_options(),
            dtypes={
                name: str(self.source.dtype(name)).removeprefix("torch.") for name in self.mapping.hf_shapes
            },
        )
        manifest.add_files(folder, sorted((folder / HF_FOLDER).iterdir()))
        for unit in self.units:
            for entry in workspace.done[unit.index]["hashes"]:
                manifest.add(*entry)
        manifest.write(folder)
        # What Megatron-LM looks for, and how the model's keys were made.
        content_metadata = {"non_homogeneous_layers": self.places.layout is KeyLayout.per_layer}
        write_common_state(
            folder, {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content_metadata}
        )
        write_metadata(folder, self._stored_chunks(workspace), extra_state_keys(self.arch, self.places))
        known = {data_file_name(unit.index): workspace.done[unit.index]["sha256"] for unit in self.units}
        write_integrity(folder, known)
        (workspace.content / TRACKER_FILE).write_text(RELEASE, "utf-8")

    def summary(self) -> list[tuple[str, str]]:
        """Lines of the printed plan."""
        lines = [
            ("weights", f"{self.output_bytes / 1e9:.2f} GB in {len(self.units)} files"),
            ("layout", f"{self.places.layout}, {self._describe_options()['dtype']}"),
            ("vocabulary", f"padded to a multiple of {self.options.vocab_multiple}"),
        ]
        if self.source.ignored:
            lines.append(("not needed", ", ".join(self.source.ignored[:4])))
        return lines

    def _describe_options(self) -> dict[str, Any]:
        dtype = self.options.dtype
        return {
            "layout": str(self.places.layout),
            "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."),
            "vocab_multiple": self.options.vocab_multiple,
        }

    def _dtype_of_keys(self) -> dict[str, torch.dtype]:
        """One per Megatron key: a tensor cannot have several."""
        dtypes: dict[str, torch.dtype] = {}
        for tensor_map in self.mapping:
            key = self.places[tensor_map.name].key
            for tensor in tensor_map.hf:
                dtype = self.source.dtype(tensor.name)
                if dtypes.setdefault(key, dtype) != dtype:
                    raise ModelError(
                        f"{self.folder.path}: tensor {tensor.name!r} is {dtype}, others of Megatron's "
                        f"{key!r} are {dtypes[key]}; choose one with --dtype"
                    )
        return dtypes

    def _pieces(self) -> Iterator[Piece]:
        for tensor_map in self.mapping:
            dtype = self._dtypes[self.places[tensor_map.name].key]
            yield from cut(tensor_map, self.num_rows(tensor_map), dtype.itemsize)

    def _read(self, piece: Piece) -> tuple[torch.Tensor, list[tuple[str, int, int, str]]]:
        """The piece, and the hashes of the HF rows it consists of."""
        tensor_map = self.mapping[piece.name]
        hashes: list[tuple[str, int, int, str]] = []

        def read(name: str, row: int, num_rows: int) -> torch.Tensor:
            rows = self.source.read_rows(name, row, num_rows)
            hashes.append((name, row, num_rows, hash_rows(rows)))
            return rows

        runs = hf_runs(tensor_map, piece)
        if tensor_map.num_groups > 1:
            sizes = {run.name: run.num_rows for run in runs}
            # A copy: the source reuses its buffer.
            return tensor_map.to_megatron(lambda name: read(name, 0, sizes[name]).clone()), hashes
        if not runs:
            key = self.places[piece.name].key
            return torch.zeros(
                piece.stop - piece.start, *tensor_map.shape[1:], dtype=self._dtypes[key]
            ), hashes
        (run,) = runs
        return read(*run), hashes

    def _stored_chunks(self, workspace: Workspace) -> Iterator[tuple[GlobalTensor, Chunk]]:
        for unit in self.units:
            places = workspace.done[unit.index]["places"]
            for piece, (position, num_bytes) in zip(unit.pieces, places, strict=True):
                tensor_map = self.mapping[piece.name]
                place = self.places[piece.name]
                columns = tensor_map.shape[1:]
                shape = (*place.leading_shape, self.num_rows(tensor_map), *columns)
                yield (
                    GlobalTensor(place.key, shape, self._dtypes[place.key]),
                    Chunk(
                        place.key,
                        (*place.leading_offset, piece.start, *(0 for _ in columns)),
                        (*(1 for _ in place.leading_shape), piece.stop - piece.start, *columns),
                        data_file_name(unit.index),
                        position,
                        num_bytes,
                    ),
                )


def default_layout(arch: ArchitectureConfig) -> KeyLayout:
    """What Megatron uses for this model by itself: stacked, unless dense and MoE layers are mixed."""
    is_mixed = arch.moe is not None and not all(arch.moe.is_moe_layer)
    return KeyLayout.per_layer if is_mixed else KeyLayout.stacked
