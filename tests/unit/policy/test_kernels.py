"""Which row kernels a run gets, and what it is told where there are none."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_drpo.config import LogprobBackend
from megatron_drpo.errors import PlatformError
from megatron_drpo.policy.kernels import build_row_kernels, triton_rows
from megatron_drpo.policy.kernels.torch_rows import TorchRows
from megatron_drpo.policy.kernels.triton_rows import TritonRows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        (LogprobBackend.auto, CPU, TorchRows),
        (LogprobBackend.auto, CUDA, TritonRows),
        (LogprobBackend.torch, CPU, TorchRows),
        (LogprobBackend.torch, CUDA, TorchRows),
        (LogprobBackend.triton, CUDA, TritonRows),
    ],
)
def test_choice(backend: LogprobBackend, device: torch.device, expected: type) -> None:
    assert type(build_row_kernels(backend, device)) is expected


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "INTERPRETED", True)
    assert isinstance(build_row_kernels(LogprobBackend.triton, CPU), TritonRows)
    monkeypatch.setattr(triton_rows, "INTERPRETED", False)
    with pytest.raises(PlatformError, match="logprob_backend=auto, or, to debug, set TRITON_INTERPRET=1"):
        build_row_kernels(LogprobBackend.triton, CPU)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, triton_rows.__name__)
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton: ModuleNotFoundError
    assert isinstance(build_row_kernels(LogprobBackend.auto, CUDA), TorchRows)
    with pytest.raises(PlatformError, match=r"import of triton halted.*install triton"):
        build_row_kernels(LogprobBackend.triton, CUDA)
