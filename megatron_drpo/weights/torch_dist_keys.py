"""Where a Megatron matrix lies in a checkpoint: stacked keys, or one key per layer.

A homogeneous model's layers share a key and a tensor [L, ...]: `decoder.layers.mlp.linear_fc2.weight`. With
`moe_layer_freq` given as a list, or `non_homogeneous_layers`, every layer has a key of its own:
`decoder.layers.3.mlp.linear_fc2.weight`. Experts are stacked in both. Either way Megatron's own loader wants
exactly the key and shape that its model asks for (megatron/core/transformer/transformer_block.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.mapping import LAYER_PREFIX, MegatronName, ParameterMapping, TensorMap

_LAYER_KEY = re.compile(re.escape(LAYER_PREFIX) + r"\d+\.")
_TRAINING_STATE = re.compile(
    r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler"
)
_NUM_SHOWN = 10


class KeyLayout(StrEnum):
    """How layers appear in the keys."""

    stacked = "stacked"
    per_layer = "per-layer"


class Place(NamedTuple):
    """One matrix within the checkpoint's tensor `key`, whose shape is `leading_shape` + the matrix's."""

    key: str
    leading_shape: tuple[int, ...]
    """Layers and experts."""
    leading_offset: tuple[int, ...]


class Places:
    """The places of a model's matrices under one layout of keys."""

    def __init__(self, mapping: ParameterMapping, layout: KeyLayout) -> None:
        self.layout = layout
        self._mapping = mapping
        self._num_layers = 1 + max((m.name.layer for m in mapping if m.name.layer is not None), default=-1)
        self._num_experts = 1 + max((m.name.expert for m in mapping if m.name.expert is not None), default=-1)

    def __getitem__(self, name: MegatronName) -> Place:
        """Of a matrix or vector, or of anything else that Megatron shards by layer and expert."""
        key, shape, offset = name.key, (), ()
        if name.layer is not None and self.layout is KeyLayout.per_layer:
            key = f"{LAYER_PREFIX}{name.layer}.{key.removeprefix(LAYER_PREFIX)}"
        elif name.layer is not None:
            shape, offset = (self._num_layers,), (name.layer,)
        if name.expert is not None:
            shape, offset = (*shape, self._num_experts), (*offset, name.expert)
        return Place(key, shape, offset)

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """How a checkpoint's tensors differ from the model's, as sentences.

        Args:
            shapes: of all tensors of the checkpoint, by key. Optimizer state is left out of account.
        """
        expected: dict[str, tuple[tuple[int, ...], TensorMap]] = {}
        for tensor_map in self._mapping:
            place = self[tensor_map.name]
            expected[place.key] = place.leading_shape, tensor_map
        missing = [f"tensor {key!r} is missing" for key in expected if key not in shapes]
        differing = [
            f"tensor {key!r}: expected shape {[*leading, *tensor_map.shape]}, found {list(shapes[key])}"
            for key, (leading, tensor_map) in expected.items()
            if key in shapes and not _fits(shapes[key], leading, tensor_map)
        ]
        unexpected = [
            f"unexpected tensor {key!r}"
            for key in shapes
            if key not in expected and not is_training_state(key)
        ]
        return differing + missing + unexpected


def check_places(places: Places, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError, naming tensors and shapes, unless these are a model's.

    Args:
        where: the checkpoint, for the message.
    """
    problems = places.problems(shapes)
    if problems:
        shown = problems[:_NUM_SHOWN]
        if len(problems) > _NUM_SHOWN:
            shown.append(f"and {len(problems) - _NUM_SHOWN} more")
        raise CheckpointError(f"{where} is not a checkpoint of this model: " + "; ".join(shown))


def find_layout(keys: Iterable[str]) -> KeyLayout:
    """Of a checkpoint with these keys."""
    return KeyLayout.per_layer if any(map(_LAYER_KEY.match, keys)) else KeyLayout.stacked


def is_training_state(key: str) -> bool:
    """Whether a key of a checkpoint is the optimizer's, the scheduler's or the like, and not a weight's."""
    return _TRAINING_STATE.match(key) is not None


def _fits(found: tuple[int, ...], leading: tuple[int, ...], tensor_map: TensorMap) -> bool:
    expected = (*leading, *tensor_map.shape)
    if tensor_map.padded and len(found) == len(expected):  # a vocabulary: rows first, never stacked
        return found[0] >= expected[0] and found[1:] == expected[1:]
    return found == expected
