"""Padding, and what there is not."""

from __future__ import annotations

import pytest
import torch

from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu.fp8 import Fp8Padding, Fp8Unpadding, fp8_autocast, fp8_model_init


def test_padding_of_experts_rows() -> None:
    x, splits = torch.randn(9, 4), [3, 0, 6]
    padded, sizes = Fp8Padding(3, align_size=4)(x, splits)
    assert sizes == [4, 0, 8]
    assert padded.shape == (12, 4)
    assert torch.equal(padded[3], torch.zeros(4))
    assert torch.equal(Fp8Unpadding(3, align_size=4)(padded, splits), x)


def test_fp8_is_refused() -> None:
    for context in (fp8_autocast, fp8_model_init):
        with context(enabled=False):
            pass
        with pytest.raises(PlatformError, match="high precision only"), context(enabled=True):
            pass
