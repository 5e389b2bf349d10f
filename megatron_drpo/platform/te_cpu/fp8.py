"""Transformer Engine's FP8 state: always off here, since the stand-in computes in high precision only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu.recipe import Recipe

_ALIGNMENT = 16
"""Rows that an FP8 product wants: 8 in the forward pass, 16 where tokens are contracted."""


class FP8GlobalStateManager:
    """The state that Megatron asks for."""

    recipe: ClassVar[Recipe | None] = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.recipe

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        return False

    @classmethod
    def reset(cls) -> None:
        return None

    @classmethod
    def set_skip_fp8_weight_update_tensor(cls, skip: bool) -> None:
        return None


@contextmanager
def fp8_autocast(enabled: bool = True, **_: object) -> Iterator[None]:
    """Everything inside stays in high precision; FP8 is refused."""
    if enabled:
        _refuse("FP8 products")
    yield


@contextmanager
def fp8_model_init(enabled: bool = True, **_: object) -> Iterator[None]:
    """Parameters made inside stay in high precision; FP8 parameters are refused."""
    if enabled:
        _refuse("FP8 parameters")
    yield


class QuantizedTensor(Tensor):
    """The class that Megatron tests parameters for; nothing here is one."""


class Float8Tensor(QuantizedTensor):
    """See QuantizedTensor."""


def replace_raw_data(*_: object) -> NoReturn:
    """Only for FP8 parameters."""
    _refuse("FP8 parameters")


def cast_master_weights_to_fp8(*_: object, **__: object) -> NoReturn:
    """Only for FP8 parameters."""
    _refuse("FP8 parameters")


class Fp8Padding(torch.nn.Module):
    """Rows of zeros behind each expert's tokens, up to the alignment of FP8 products."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size or _ALIGNMENT

    def forward(self, rows_RH: Tensor, splits: list[int]) -> tuple[Tensor, list[int]]:
        padded = [_pad(rows_XH, self.align_size) for rows_XH in rows_RH.split(splits)]
        return torch.cat(padded), [len(rows_XH) for rows_XH in padded]


class Fp8Unpadding(torch.nn.Module):
    """Takes away what Fp8Padding has added; `splits` are those from before it."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size or _ALIGNMENT

    def forward(self, rows_RH: Tensor, splits: list[int]) -> Tensor:
        padded = [split + -split % self.align_size for split in splits]
        return torch.cat(
            [rows_XH[:split] for rows_XH, split in zip(rows_RH.split(padded), splits, strict=True)]
        )


def _pad(rows_XH: Tensor, multiple: int) -> Tensor:
    return F.pad(rows_XH, (0, 0, 0, -len(rows_XH) % multiple))


def _refuse(what: str) -> NoReturn:
    raise PlatformError(
        f"{what} on a CPU: the stand-in for Transformer Engine computes in high precision only; take fp8 out "
        f"of policy.megatron_overrides, or run on a GPU with Transformer Engine"
    )
