"""Transformer Engine's FP8 recipes as objects: Megatron names them when it is imported.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/common/recipe/__init__.py
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Format(enum.Enum):
    """Of the forward and of the backward products' operands."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


class Recipe:
    """What all recipes derive from."""


@dataclass
class DelayedScaling(Recipe):
    """Scales from the largest values of earlier steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: tuple[bool, bool, bool] = (False, False, False)
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its own largest value."""

    fp8_format: Format = Format.HYBRID


@dataclass
class Float8BlockScaling(Recipe):
    """One scale per 1 x 128 values of activations and gradients and per 128 x 128 of weights."""

    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    """One power of two per 32 values."""

    fp8_format: Format = Format.E4M3
