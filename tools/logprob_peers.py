"""What `bench_logprobs.py` compares: our logprob op and other libraries' ways to the same gradients.

Each computes sum(-log p(label)) of all tokens and its gradients: `hidden_TH.grad`, summed over the
tensor-parallel ranks, and the weight's, added to `weight.main_grad` in fp32 as Megatron's DDP wants it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.policy.kernels.torch_rows import TorchRows
from megatron_drpo.policy.logprobs import (
    ChunkLossResult,
    LogprobOutput,
    LogprobRows,
    LogprobSettings,
    one_pass_loss,
    vocab_parallel_logprobs,
)


@dataclass(frozen=True)
class Problem:
    """Sizes, and this rank's tensors."""

    hidden_TH: Tensor
    """A leaf with a gradient."""
    weight_VH: Any
    """This rank's shard, a parameter with an fp32 `main_grad`."""
    labels_T: Tensor
    vocab_size: int
    buffer_bytes: int
    group: dist.ProcessGroup

    @property
    def tensor_size(self) -> int:
        return dist.get_world_size(self.group)


Run = Callable[[Problem], Tensor | None]
"""Forward and backward; the logprobs [T], or None where the library keeps them to itself."""


@dataclass(frozen=True)
class Implementation:
    """One row of the table."""

    name: str
    package: str
    """The distribution whose version is shown."""
    module: str
    """What must be importable."""
    run: Run
    cuda_only: bool = False
    one_rank_only: bool = False

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "-"

    def why_not(self, device: torch.device, tensor_size: int) -> str | None:
        """Why it cannot run here; None if it can."""
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return "not installed"
        if self.cuda_only and device.type != "cuda":
            return "needs CUDA"
        if self.one_rank_only and tensor_size > 1:
            return "no tensor parallelism"
        return None


# ------------------------------------------------------------------------------------------------ ours


def _build_kernels(device: torch.device) -> Any:
    if device.type == "cuda" and importlib.util.find_spec("megatron_drpo.policy.kernels.triton_rows"):
        module = importlib.import_module("megatron_drpo.policy.kernels.triton_rows")
        return module.TritonRows()
    return TorchRows()


def _ours(problem: Problem) -> tuple[Tensor, LogprobRows, LogprobSettings]:
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    hidden_TH = copy_to_tensor_model_parallel_region(problem.hidden_TH)
    rows_N = torch.arange(len(problem.labels_T), device=problem.labels_T.device)
    rows = LogprobRows(rows_N=rows_N, labels_N=problem.labels_T, temperature=1.0)
    settings = LogprobSettings(
        vocab_size=problem.vocab_size,
        group=problem.group,
        buffer_bytes=problem.buffer_bytes,
        kernels=_build_kernels(hidden_TH.device),
    )
    return hidden_TH, rows, settings


def run_one_pass(problem: Problem) -> Tensor:
    hidden_TH, rows, settings = _ours(problem)

    def loss_of(_: slice, output: LogprobOutput) -> ChunkLossResult:
        return ChunkLossResult(-output.logprobs_N.sum(), -torch.ones_like(output.logprobs_N))

    loss, output = one_pass_loss(hidden_TH, problem.weight_VH, rows, settings, loss_of)
    loss.backward()
    return output.logprobs_N


def run_recompute(problem: Problem) -> Tensor:
    hidden_TH, rows, settings = _ours(problem)
    output = vocab_parallel_logprobs(hidden_TH, problem.weight_VH, rows, settings)
    (-output.logprobs_N.sum()).backward()
    return output.logprobs_N.detach()


# ------------------------------------------------------------------- logits first, then cross entropy


def _can_fuse_wgrad() -> bool:
    """Whether apex's GEMM that accumulates into main_grad is there."""
    return (
        torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )


def _megatron_logits(problem: Problem) -> Tensor:
    """[T, 1, V / tp] by the LM head that Megatron-Core's models have."""
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    return linear_with_grad_accumulation_and_async_allreduce(
        input=problem.hidden_TH[:, None],
        weight=problem.weight_VH,
        bias=None,
        gradient_accumulation_fusion=_can_fuse_wgrad(),
        allreduce_dgrad=problem.tensor_size > 1,
        sequence_parallel=False,
        tp_group=problem.group,
    )


def _add_to_main_grad(problem: Problem) -> None:
    """What DDP's hook does after the backward pass."""
    weight = problem.weight_VH
    if weight.grad is not None and not getattr(weight, "grad_added_to_main_grad", False):
        weight.main_grad.add_(weight.grad)
    weight.grad = None


def _run_cross_entropy(problem: Problem, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    losses_T1 = cross_entropy(_megatron_logits(problem), problem.labels_T[:, None])
    losses_T1.sum().backward()
    _add_to_main_grad(problem)
    return -losses_T1.detach()[:, 0]


def run_megatron_native(problem: Problem) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return _run_cross_entropy(problem, vocab_parallel_cross_entropy)


def run_megatron_fused(problem: Problem) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return _run_cross_entropy(
        problem, lambda logits, labels: fused_vocab_parallel_cross_entropy(logits, labels, problem.group)
    )


def run_transformer_engine(problem: Problem) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import (  # pyrefly: ignore[missing-import]  # optional
        parallel_cross_entropy,
    )

    return _run_cross_entropy(
        problem,
        # Its labels are [batch, sequence] for logits [sequence, batch, V]: with a batch of one, both views.
        lambda logits, labels: parallel_cross_entropy(
            logits.transpose(0, 1).contiguous(), labels.t(), 0.0, False, problem.group
        ).t(),
    )


# ----------------------------------------------------------------------------- fused with the LM head


def run_verl(problem: Problem) -> Tensor:
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
    from verl.utils.kernel.linear_cross_entropy import (  # pyrefly: ignore[missing-import]  # optional
        linear_cross_entropy,
    )

    hidden_TH = copy_to_tensor_model_parallel_region(problem.hidden_TH)
    group = problem.group if problem.tensor_size > 1 else None
    logprobs_T, _ = linear_cross_entropy(hidden_TH, problem.weight_VH, problem.labels_T, 1.0, "none", group)
    (-logprobs_T.sum()).backward()
    _add_to_main_grad(problem)
    return logprobs_T.detach()


def run_liger(problem: Problem) -> None:
    from liger_kernel.transformers.functional import (  # pyrefly: ignore[missing-import]  # optional
        liger_fused_linear_cross_entropy,
    )

    loss = liger_fused_linear_cross_entropy(
        problem.hidden_TH, problem.weight_VH, problem.labels_T, reduction="sum"
    )
    loss.backward()
    _add_to_main_grad(problem)


def run_quack(problem: Problem) -> None:
    from quack.linear_cross_entropy import (  # pyrefly: ignore[missing-import]  # optional
        chunked_linear_cross_entropy,
    )

    loss = chunked_linear_cross_entropy(
        problem.hidden_TH, problem.weight_VH, problem.labels_T, reduction="sum"
    )
    loss.backward()
    _add_to_main_grad(problem)


BASELINE = "LM head + megatron-core fused"
NATIVE = "LM head + megatron-core native"
ONE_PASS = "megatron-drpo one_pass"
RECOMPUTE = "megatron-drpo recompute"

_OURS, _CORE = ("megatron-drpo", "megatron_drpo"), ("megatron-core", "megatron.core")
IMPLEMENTATIONS = [
    Implementation(BASELINE, *_CORE, run_megatron_fused),
    Implementation(NATIVE, *_CORE, run_megatron_native),
    Implementation(ONE_PASS, *_OURS, run_one_pass),
    Implementation(RECOMPUTE, *_OURS, run_recompute),
    Implementation(
        "LM head + transformer-engine",
        "transformer-engine",
        "transformer_engine.pytorch",
        run_transformer_engine,
        cuda_only=True,
    ),
    Implementation("verl fused", "verl", "verl.utils.kernel", run_verl, cuda_only=True),
    Implementation(
        "liger-kernel", "liger-kernel", "liger_kernel", run_liger, cuda_only=True, one_rank_only=True
    ),
    Implementation("quack-kernels", "quack-kernels", "quack", run_quack, cuda_only=True, one_rank_only=True),
]
