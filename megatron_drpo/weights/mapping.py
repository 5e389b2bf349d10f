"""The one parameter mapping: which rows of which HF tensors make up each Megatron matrix.

Keyed on Megatron's global sharded keys, so that it holds for every parallel layout, for CPU and GPU layer
specs, and for checkpoints without a model. Both directions come from the same description. The mapping
only moves rows; columns are the same on both sides, so any rectangle of a matrix can be mapped alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_drpo.errors import ModelError

LAYER_PREFIX = "decoder.layers."


class MegatronName(NamedTuple):
    """One matrix (or vector) of a Megatron model.

    The key is the one of a homogeneous model, whose layers are stacked in one global tensor:
    `decoder.layers.mlp.experts.experts.linear_fc1.weight`, never `decoder.layers.3.mlp...`.
    """

    key: str
    layer: int | None = None
    expert: int | None = None

    @classmethod
    def from_sharded(cls, key: str, leading_offsets: tuple[int, ...]) -> MegatronName:
        """The name of a shard of a `sharded_state_dict` or checkpoint.

        Args:
            key: the global key; with mixed dense and MoE layers Megatron writes the layer into it.
            leading_offsets: offsets in the dimensions that stand before the matrix: layer, expert.
        """
        offsets = list(leading_offsets)
        layer = None
        if key.startswith(LAYER_PREFIX):
            head, _, tail = key.removeprefix(LAYER_PREFIX).partition(".")
            if head.isdigit():
                layer, key = int(head), LAYER_PREFIX + tail
            else:
                layer = offsets.pop(0)
        return cls(key, layer, *offsets)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.key!r}{layer}{expert}"


class HfTensor(NamedTuple):
    """A tensor of an HF folder: name and shape."""

    name: str
    shape: tuple[int, ...]


class Block(NamedTuple):
    """`num_rows` consecutive rows: from `row` in the Megatron matrix, from `hf_row` in the HF tensor."""

    hf_name: str
    hf_row: int
    row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One Megatron matrix and the HF tensors it consists of.

    Each HF tensor's rows are cut into `num_groups` equal pieces. Megatron's rows are group after group, and
    in each group the pieces of `hf` in order. A plain copy has one tensor and one group.
    """

    name: MegatronName
    hf: tuple[HfTensor, ...]
    num_groups: int = 1
    padded: bool = False
    """Megatron may append rows (of zeros) so that tensor parallelism divides the vocabulary."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the Megatron matrix, without padding."""
        return (sum(tensor.shape[0] for tensor in self.hf), *self.hf[0].shape[1:])

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ModelError unless a Megatron matrix of this shape, padding included, can be mapped."""
        expected = self.shape
        fits = shape[0] >= expected[0] if self.padded else shape[0] == expected[0]
        if not fits or shape[1:] != expected[1:]:
            rows = "at least " if self.padded else ""
            raise ModelError(
                f"Megatron parameter {self.name}: expected shape {rows}{list(expected)} from config.json, "
                f"found {list(shape)}"
            )

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """What rows [start, stop) of the Megatron matrix consist of; padding rows are left out."""
        row = 0
        for group in range(self.num_groups):
            for tensor in self.hf:
                num_rows = tensor.shape[0] // self.num_groups
                first, last = max(row, start), min(row + num_rows, stop)
                if first < last:
                    yield Block(tensor.name, group * num_rows + first - row, first, last - first)
                row += num_rows

    def to_megatron(self, read: Callable[[str], torch.Tensor], num_rows: int | None = None) -> torch.Tensor:
        """The whole Megatron matrix.

        Args:
            read: returns an HF tensor by name.
            num_rows: rows wanted, padding included; default: no padding.
        """
        hf = {tensor.name: read(tensor.name) for tensor in self.hf}
        for tensor in self.hf:
            check_hf_shape(tensor, tuple(hf[tensor.name].shape))
        num_rows = self.shape[0] if num_rows is None else num_rows
        self.check_shape((num_rows, *self.shape[1:]))
        matrix = hf[self.hf[0].name].new_zeros(num_rows, *self.shape[1:])
        for block in self.blocks(0, num_rows):
            source = hf[block.hf_name][block.hf_row : block.hf_row + block.num_rows]
            matrix[block.row : block.row + block.num_rows] = source
        return matrix

    def to_hf(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The HF tensors of a whole Megatron matrix, padding trimmed."""
        self.check_shape(tuple(matrix.shape))
        hf = {tensor.name: matrix.new_empty(tensor.shape) for tensor in self.hf}
        for block in self.blocks(0, matrix.shape[0]):
            target = hf[block.hf_name][block.hf_row : block.hf_row + block.num_rows]
            target.copy_(matrix[block.row : block.row + block.num_rows])
        return hf


def direct(name: MegatronName, hf: str, shape: tuple[int, ...], *, padded: bool = False) -> TensorMap:
    """The same tensor on both sides."""
    return TensorMap(name, (HfTensor(hf, shape),), padded=padded)


def gate_up(name: MegatronName, gate: str, up: str, shape: tuple[int, int]) -> TensorMap:
    """SwiGLU's first matrix: gate [F, H] above up [F, H]; `shape` is [F, H]."""
    return TensorMap(name, (HfTensor(gate, shape), HfTensor(up, shape)))


def qkv(name: MegatronName, q: HfTensor, k: HfTensor, v: HfTensor, num_query_groups: int) -> TensorMap:
    """Attention input projections: per query group its query heads, its key head, its value head."""
    return TensorMap(name, (q, k, v), num_groups=num_query_groups)


class ParameterMapping:
    """All tensor maps of one model, in the model's order."""

    def __init__(self, maps: Iterable[TensorMap], ignored_hf: tuple[str, ...] = ()) -> None:
        """
        Args:
            maps: every Megatron matrix once.
            ignored_hf: endings of HF names that a folder may have without their being used.
        """
        self._maps = {tensor_map.name: tensor_map for tensor_map in maps}
        self._ignored_hf = ignored_hf
        self.hf_shapes: dict[str, tuple[int, ...]] = {
            tensor.name: tensor.shape for tensor_map in self._maps.values() for tensor in tensor_map.hf
        }
        """Every HF tensor of the model, in export order."""

    def __iter__(self) -> Iterator[TensorMap]:
        return iter(self._maps.values())

    def __getitem__(self, name: MegatronName) -> TensorMap:
        if name not in self._maps:
            raise ModelError(
                f"Megatron parameter {name} has no Hugging Face counterpart in this model family"
            )
        return self._maps[name]

    def check_hf(self, shapes: dict[str, tuple[int, ...]], where: str) -> None:
        """Raise ModelError unless exactly the tensors of this model are there, in the right shapes.

        Args:
            shapes: HF name -> shape found.
            where: folder, for the message.
        """
        problems = [f"tensor {name!r} is missing" for name in self.hf_shapes if name not in shapes]
        problems += [
            f"unexpected tensor {name!r}"
            for name in shapes
            if name not in self.hf_shapes and not name.endswith(self._ignored_hf)
        ]
        problems += [
            f"tensor {name!r}: expected shape {list(expected)} from config.json, found {list(shapes[name])}"
            for name, expected in self.hf_shapes.items()
            if name in shapes and shapes[name] != expected
        ]
        if problems:
            shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise ModelError(f"{where}: weights and config.json disagree: " + "; ".join(shown))


def check_hf_shape(expected: HfTensor, found: tuple[int, ...]) -> None:
    """Raise ModelError naming the tensor when its shape is not the expected one."""
    if found != expected.shape:
        raise ModelError(
            f"HF tensor {expected.name!r}: expected shape {list(expected.shape)}, found {list(found)}"
        )
