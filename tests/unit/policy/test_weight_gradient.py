"""Gradients of the LM head's weight through Megatron's own DDP, against float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
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
from megatron_drpo.policy.parallel import ParallelState
from tools.memory_meter import MemoryMeter

VOCAB_SIZE, NUM_PADDED, HIDDEN_SIZE, NUM_TOKENS = 50, 64, 16, 37
MODES = ["recompute", "one_pass"]


class _Model(torch.nn.Module):
    """Embedding, tanh, LM head: any of them missing, tied or frozen."""

    def __init__(self, embedding: Tensor, head: Tensor | None) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(embedding.clone())
        self.own_head = None if head is None else torch.nn.Parameter(head.clone())

    @property
    def head(self) -> Any:
        return self.embedding if self.own_head is None else self.own_head

    def loss(self, batch: _Batch, mode: str) -> Tensor:
        hidden = self.embedding[batch.token_ids_T].tanh()
        return _loss(hidden, self.head, batch, mode)


@dataclass(frozen=True)
class _Batch:
    token_ids_T: Tensor
    rows: LogprobRows


def _batches(count: int) -> list[_Batch]:
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> Tensor:
        return torch.randint(0, VOCAB_SIZE, (size,), generator=generator)

    return [
        _Batch(ids(NUM_TOKENS), LogprobRows(rows_N=torch.arange(0, 37, 2), labels_N=ids(19), temperature=0.8))
        for _ in range(count)
    ]


def _weights(count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_PADDED, HIDDEN_SIZE, generator=generator).to(dtype) for _ in range(count)]


def _sum(_: slice, output: LogprobOutput) -> ChunkLossResult:
    return ChunkLossResult(output.logprobs_N.sum(), torch.ones_like(output.logprobs_N))


def _loss(hidden_TH: Tensor, weight_VH: Tensor, batch: _Batch, mode: str) -> Tensor:
    """The sum of the logprobs of a batch, in three chunks."""
    settings = LogprobSettings(
        vocab_size=VOCAB_SIZE, group=None, buffer_bytes=8 * 4 * NUM_PADDED, kernels=TorchRows()
    )
    if mode == "one_pass":
        return one_pass_loss(hidden_TH, weight_VH, batch.rows, settings, _sum)[0]
    return vocab_parallel_logprobs(hidden_TH, weight_VH, batch.rows, settings).logprobs_N.sum()


def _reference_loss(hidden_TH: Tensor, weight_VH: Tensor, batch: _Batch) -> Tensor:
    logits = hidden_TH[batch.rows.rows_N] @ weight_VH[:VOCAB_SIZE].t() / 0.8
    return torch.log_softmax(logits, -1).gather(1, batch.rows.labels_N[:, None]).sum()


def _reference(embedding: Tensor, head: Tensor | None, batches: list[_Batch]) -> list[Tensor]:
    """float64 gradients of the embedding and of the head, if it is one of its own."""
    leaves = [x.double().requires_grad_() for x in (embedding, head) if x is not None]
    total = sum(_reference_loss(leaves[0][b.token_ids_T].tanh(), leaves[-1], b) for b in batches)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves))


def _wrap(model: torch.nn.Module, *, overlap: bool = False) -> Any:
    """Megatron's DDP as the policy uses it; `overlap` reduces gradients from within the hooks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN_SIZE, num_attention_heads=1)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    return DistributedDataParallel(config, ddp_config, model)


def _train(ddp: Any, batches: list[_Batch], mode: str) -> None:
    """Two steps of micro-batches, as Megatron's schedules drive DDP: the first step also counts, for
    `overlap_grad_reduce`, which gradients to expect."""
    for _ in range(2):
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            for batch in batches[:-1]:
                ddp.module.loss(batch, mode).backward()
        ddp.module.loss(batches[-1], mode).backward()
        ddp.finish_grad_sync()


def _assert_main_grad(parameter: Any, expected: Tensor, dtype: torch.dtype) -> None:
    difference = parameter.main_grad.double() - expected
    assert float(difference.norm() / expected.norm()) < (1e-5 if dtype is torch.float32 else 1e-2)
    assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_main_grad_is_the_gradient(
    one_rank: ParallelState, mode: str, tied: bool, overlap: bool, dtype: torch.dtype
) -> None:
    """An own head, and an embedding tied to it on one stage, over three micro-batches and two steps."""
    embedding, head = _weights(2, dtype)
    model = _Model(embedding, None if tied else head).to(one_rank.device)
    if tied:
        vars(model.embedding)["zero_out_wgrad"] = True  # language_module.py does this
    batches = _batches(3)
    _train(_wrap(model, overlap=overlap), batches, mode)
    expected = _reference(embedding, None if tied else head, batches)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        _assert_main_grad(parameter, gradient, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_tied_across_pipeline_stages(one_rank: ParallelState, mode: str) -> None:
    """The last stage has a copy of the embedding as its head and gets the hidden states from elsewhere:
    its main_grad is the head's part, and Megatron adds up the stages' (finalize_model_grads)."""
    (embedding,) = _weights(1, torch.float32)
    (batch,) = _batches(1)

    class LastStage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(embedding.clone())
            vars(self.weight)["shared_embedding"] = True

        def loss(self, batch: _Batch, mode: str) -> Tensor:
            self.received = embedding[batch.token_ids_T].tanh().requires_grad_()
            return _loss(self.received, self.weight, batch, mode)

    stage = LastStage()
    _train(_wrap(stage), [batch], mode)
    leaf = embedding.double().requires_grad_()
    first_stage = leaf[batch.token_ids_T].tanh()
    received_grad = stage.received.grad
    assert received_grad is not None
    (embedding_part,) = torch.autograd.grad(first_stage, leaf, received_grad.double())
    (whole,) = _reference(embedding, None, [batch])
    _assert_main_grad(stage.weight, whole - embedding_part, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weight_and_frozen_hidden(one_rank: ParallelState, mode: str) -> None:
    embedding, head = _weights(2, torch.float32)
    (batch,) = _batches(1)
    gradients = _reference(embedding, head, [batch])

    model = _Model(embedding, head)
    model.head.requires_grad_(False)
    _train(_wrap(model), [batch], mode)
    _assert_main_grad(model.embedding, gradients[0], torch.float32)
    assert model.head.grad is None
    assert not hasattr(model.head, "main_grad")

    model = _Model(embedding, head)
    model.embedding.requires_grad_(False)
    _train(_wrap(model), [batch], mode)
    _assert_main_grad(model.head, gradients[1], torch.float32)
    assert model.embedding.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_two_uses_in_one_backward_add_up(one_rank: ParallelState, mode: str) -> None:
    embedding, head = _weights(2, torch.float32)
    batches = _batches(2)
    model = _Model(embedding, head)
    ddp = _wrap(model)
    ddp.zero_grad_buffer()
    (model.loss(batches[0], mode) + model.loss(batches[1], mode)).backward()
    for parameter, gradient in zip(model.parameters(), _reference(embedding, head, batches), strict=True):
        _assert_main_grad(parameter, gradient, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_without_ddp_main_grad_has_it_and_grad_stays_none(mode: str) -> None:
    """A second backward pass adds; without main_grad, and with one in bf16, grad has it as usual."""
    embedding, head = _weights(2, torch.bfloat16)
    batches = _batches(2)
    expected = _reference(embedding, head, batches)[1]
    for main_grad in (torch.zeros(NUM_PADDED, HIDDEN_SIZE), torch.zeros_like(head), None):
        model = _Model(embedding, head)
        if main_grad is not None:
            model.head.main_grad = main_grad
        for batch in batches:
            model.loss(batch, mode).backward()
        direct = main_grad is not None and main_grad.dtype is torch.float32
        result = main_grad if direct else model.head.grad
        assert (model.head.grad is None) == direct
        assert result is not None
        assert float((result.double() - expected).norm() / expected.norm()) < 1e-2
        assert (result[VOCAB_SIZE:] == 0).all()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_ddp_costs_no_tensor_of_the_weights_size(one_rank: ParallelState, mode: str, overlap: bool) -> None:
    """The weight is 2 MB, a chunk of logits 128 kB; a dummy gradient would be 2 MB."""

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4096, 128))

        def loss(self) -> Tensor:
            hidden = torch.ones(16, 128, requires_grad=True)
            rows = LogprobRows(rows_N=torch.arange(16), labels_N=torch.arange(16), temperature=1.0)
            settings = LogprobSettings(
                vocab_size=4096, group=None, buffer_bytes=8 * 4 * 4096, kernels=TorchRows()
            )
            if mode == "one_pass":
                return one_pass_loss(hidden, self.weight, rows, settings, _sum)[0]
            return vocab_parallel_logprobs(hidden, self.weight, rows, settings).logprobs_N.sum()

    head = Head()
    ddp = _wrap(head, overlap=overlap)
    ddp.zero_grad_buffer()
    with MemoryMeter() as meter:
        head.loss().backward()
    assert meter.peak_bytes < 1_000_000
    assert vars(head.weight)["main_grad"].abs().sum() > 0
