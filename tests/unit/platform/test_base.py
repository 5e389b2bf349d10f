"""The choice of a platform."""

from __future__ import annotations

import pytest
import torch

from megatron_drpo.config.schema import PlatformName
from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.base import build_platform


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected", "backend"),
    [
        (PlatformName.auto, False, PlatformName.cpu, "gloo"),
        (PlatformName.auto, True, PlatformName.cuda, "nccl"),
        (PlatformName.cpu, False, PlatformName.cpu, "gloo"),
        (PlatformName.cpu, True, PlatformName.cpu, "gloo"),
        (PlatformName.cuda, True, PlatformName.cuda, "nccl"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, asked: PlatformName, has_gpu: bool, expected: PlatformName, backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    platform = build_platform(asked)
    assert (platform.name, platform.backend) == (expected, backend)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlatformError, match=r"^platform=cuda, but torch sees no GPU"):
        build_platform(PlatformName.cuda)
