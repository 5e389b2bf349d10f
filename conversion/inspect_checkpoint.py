"""Show what a checkpoint holds: keys, shapes, dtypes, layout, sizes. Reads no tensor.

    python -m conversion.inspect_checkpoint checkpoints/qwen3-30b
    python -m conversion.inspect_checkpoint runs/math --keys router
    python -m conversion.inspect_checkpoint models/Qwen3-30B-A3B --json

PATH is a torch_dist checkpoint (or a folder of them), or a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conversion.command import build_parser, describe, run_command
from conversion.common_state import read_common_state
from conversion.torch_dist_reader import TorchDistReader
from megatron_drpo.errors import ModelError
from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.hf_folder import HfConfig, HfFolder, read_hf_config
from megatron_drpo.weights.torch_dist import HF_FOLDER
from megatron_drpo.weights.torch_dist_keys import find_layout, is_training_state


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One tensor."""

    key: str
    shape: list[int]
    dtype: str
    num_chunks: int
    num_bytes: int


@dataclass(kw_only=True)
class Contents:
    """All that is printed."""

    path: str
    format: str
    facts: dict[str, str] = field(default_factory=dict)
    tensors: list[TensorRow] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """What is not sharded: iteration, arguments and the like."""


def inspect_torch_dist(path: Path) -> Contents:
    """Of a torch_dist checkpoint.

    Raises:
        CheckpointError: it is not complete, or damaged.
    """
    reader = TorchDistReader(path)
    contents = Contents(path=str(reader.path), format="torch_dist")
    for key, tensor in reader.tensors.items():
        contents.tensors.append(_row(key, tensor.shape, tensor.dtype, len(tensor.chunks)))
    weights = [row for row in contents.tensors if not is_training_state(row.key)]
    others = [row for row in contents.tensors if is_training_state(row.key)]
    contents.facts["keys"] = str(find_layout(reader.tensors))
    contents.facts |= _facts(weights)
    if others:
        num_bytes = sum(row.num_bytes for row in others)
        contents.facts["training state"] = f"{len(others)} tensors, {num_bytes / 1e9:.2f} GB"
    contents.facts["objects"] = f"{len(reader.objects)}"
    if (reader.path / HF_FOLDER / "config.json").is_file():
        contents.facts["model"] = _describe_model(read_hf_config(reader.path / HF_FOLDER))
    contents.state = read_common_state(reader)
    return contents


def inspect_hf(path: Path) -> Contents:
    """Of a Hugging Face folder.

    Raises:
        ModelError: it is not complete, or damaged.
    """
    folder = HfFolder(path)
    contents = Contents(path=str(path), format="Hugging Face")
    for name in folder:
        contents.tensors.append(_row(name, folder.shape(name), folder.dtype(name), 1))
    contents.facts["files"] = str(len({folder.info(name).shard for name in folder}))
    contents.facts |= _facts(contents.tensors)
    contents.facts["model"] = _describe_model(folder.config)
    return contents


def _row(key: str, shape: tuple[int, ...], dtype: torch.dtype, num_chunks: int) -> TensorRow:
    return TensorRow(
        key=key,
        shape=list(shape),
        dtype=str(dtype).removeprefix("torch."),
        num_chunks=num_chunks,
        num_bytes=torch.Size(shape).numel() * dtype.itemsize,
    )


def _facts(rows: list[TensorRow]) -> dict[str, str]:
    num_elements = sum(torch.Size(row.shape).numel() for row in rows)
    by_dtype: Counter[str] = Counter()
    for row in rows:
        by_dtype[row.dtype] += row.num_bytes
    dtypes = ", ".join(f"{dtype} {size / 1e9:.2f} GB" for dtype, size in by_dtype.most_common())
    return {"weights": f"{num_elements:,} in {len(rows)} tensors", "dtypes": dtypes}


def _describe_model(config: HfConfig) -> str:
    try:
        family = get_family(config)
        return f"{family.model_type}: {describe(family.architecture(config))}"
    except ModelError as error:
        return f"not supported: {error}"


def show(contents: Contents, pattern: str) -> None:
    """Print it; only tensors whose key contains `pattern`."""
    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    for name, value in [("path", contents.path), ("format", contents.format), *contents.facts.items()]:
        grid.add_row(f"[dim]{escape(name)}[/]", escape(value))
    for name, value in contents.state.items():
        grid.add_row(f"[dim]{escape(name)}[/]", escape(str(value)))
    console.print(grid)
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("GB", "shape", "dtype", "chunks"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("tensor", overflow="fold")
    rows = [row for row in contents.tensors if pattern in row.key]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(f"{row.num_bytes / 1e9:.3f}", shape, row.dtype, str(row.num_chunks), row.key)
    console.print(table)
    if len(rows) < len(contents.tensors):
        console.print(f"[dim]{len(rows)} of {len(contents.tensors)} tensors[/]")


def main(argv: Sequence[str] | None = None) -> int:
    """Of the command line; the exit status."""
    parser = build_parser(__doc__)
    parser.add_argument("path", type=Path, help="torch_dist checkpoint, or Hugging Face folder")
    parser.add_argument("--keys", default="", metavar="TEXT", help="show only tensors whose key contains it")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _inspect(arguments), is_resumable=False)


def _inspect(arguments: argparse.Namespace) -> None:
    is_hf = (arguments.path / "config.json").is_file()
    contents = inspect_hf(arguments.path) if is_hf else inspect_torch_dist(arguments.path)
    if arguments.json:
        contents.tensors = [row for row in contents.tensors if arguments.keys in row.key]
        print(json.dumps(asdict(contents), indent=1, default=str))
    else:
        show(contents, arguments.keys)


if __name__ == "__main__":
    sys.exit(main())
