"""Which row kernels a run gets, what it is told where there are none, and what the compiler makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_drpo.config.schema import LogprobBackend
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


COMPILE = """
import re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_drpo.policy.kernels import triton_rows

HOPPER = GPUTarget("cuda", 90, 32)
GIVEN = {"PICKED_BLOCK": 32, "BLOCK": triton_rows._STATISTICS_BLOCK}
GRAD = {"HAS_GRAD_ENTROPY": True, "IS_NARROWER": True, "BLOCK": triton_rows._GRADIENT_BLOCK}
IDS = {"labels": "*i64", "given_ids": "*i64"}
SIZES = ("row_stride", "grad_row_stride", "num_ids")
INTEGERS = {name: "i32" for name in (*SIZES, "first_id", "num_given")}

def compile(kernel, constants, types):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in SIZES
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": triton_rows._NUM_WARPS})
    with open(sys.argv[1], "wb") as file:
        file.write(compiled.asm["cubin"])
    tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", sys.argv[1]]
    usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    print(*re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    loop = re.search(r"\\$L__BB0_2:(.*?)bra\\s+\\$L__BB0_2;", compiled.asm["ptx"], re.DOTALL).group(1)
    print(*re.findall(r"ld\\.global\\S*|st\\.global\\S*|bar\\.sync", loop))

compile(triton_rows._statistics_kernel, GIVEN, IDS | INTEGERS)
compile(triton_rows._grad_logits_kernel, GRAD, IDS | INTEGERS | {"grad_logits": "*bf16"})
"""
"""For an H100, which needs none: registers and stack of each kernel, and what its loop does to memory."""


def test_compiled_for_hopper(tmp_path: Path) -> None:
    """Registers for three programs per SM (65536 / 3 / 512 threads, in steps of 8), none in memory; 16-byte
    loads and stores; in the gradient, every load comes before the barrier and every store after it."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "cubin")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statistics_usage, statistics_loop, grad_usage, grad_loop = done.stdout.splitlines()
    for usage in (statistics_usage, grad_usage):
        num_registers, num_stack_bytes = map(int, usage.split())
        assert num_registers <= 40
        assert num_stack_bytes == 0
    assert statistics_loop == "ld.global.v4.b32"
    assert grad_loop == "ld.global.v4.b32 ld.global.v4.b32 bar.sync st.global.v4.b32"
