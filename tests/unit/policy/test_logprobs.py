"""The logprob op, in both modes, against a plain float64 softmax; on one rank, two and four."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.errors import DataError
from megatron_drpo.policy.kernels.torch_rows import TorchRows
from megatron_drpo.policy.logprobs import (
    ChunkLossResult,
    LogprobOutput,
    LogprobRows,
    LogprobSettings,
    one_pass_loss,
    vocab_parallel_logprobs,
)
from tools.memory_meter import MemoryMeter

MODES = ["recompute", "one_pass"]
NUM_TOKENS = 41


@dataclass(frozen=True)
class _Case:
    """The whole problem; weight rows beyond vocab_size are huge, so that a leak shows."""

    hidden_TH: Tensor
    weight_VH: Tensor
    rows: LogprobRows
    vocab_size: int
    grad_logprobs_N: Tensor
    grad_entropy_N: Tensor | None

    def settings(self, rows_per_chunk: int, group: dist.ProcessGroup | None = None) -> LogprobSettings:
        """Memory for that many rows of this rank's logits."""
        local_rows = len(self.weight_VH) // (1 if group is None else dist.get_world_size(group))
        itemsize = 8 if self.hidden_TH.dtype is torch.float64 else 4
        return LogprobSettings(
            vocab_size=self.vocab_size,
            group=group,
            buffer_bytes=rows_per_chunk * local_rows * itemsize,
            kernels=TorchRows(),
        )


class _Result(NamedTuple):
    loss: Tensor
    output: LogprobOutput
    grad_hidden_TH: Tensor
    grad_weight_VH: Tensor


def _case(
    vocab_size: int,
    num_padded: int,
    *,
    num_rows: int = 23,
    hidden_size: int = 16,
    dtype: torch.dtype = torch.float64,
    entropy: bool = True,
) -> _Case:
    """`num_rows` of 41 tokens have a loss, in no order; temperatures differ; 3 further ids per row."""
    generator = torch.Generator().manual_seed(vocab_size + num_padded)
    draw = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(num_padded, hidden_size, **draw) * 4 / hidden_size**0.5
    weight[vocab_size:] *= 100
    rows = LogprobRows(
        rows_N=torch.randperm(NUM_TOKENS, generator=generator)[:num_rows],
        labels_N=torch.randint(0, vocab_size, (num_rows,), generator=generator),
        temperature=0.6 + 0.8 * torch.rand(num_rows, **draw),
        topk_ids_NK=torch.randint(0, vocab_size, (num_rows, 3), generator=generator),
    )
    return _Case(
        hidden_TH=torch.randn(NUM_TOKENS, hidden_size, **draw).to(dtype),
        weight_VH=weight.to(dtype),
        rows=rows,
        vocab_size=vocab_size,
        grad_logprobs_N=torch.randn(num_rows, **draw),
        grad_entropy_N=torch.randn(num_rows, **draw) if entropy else None,
    )


def _loss(case: _Case, part: slice, logprobs_C: Tensor, entropy_C: Tensor) -> Tensor:
    """sum g (logp + logp^2 / 2) + h H: its gradients are g (1 + logp) and h."""
    loss = (case.grad_logprobs_N[part] * (logprobs_C + logprobs_C**2 / 2)).sum()
    return loss if case.grad_entropy_N is None else loss + (case.grad_entropy_N[part] * entropy_C).sum()


def _reference(case: _Case) -> _Result:
    """A plain float64 log_softmax over the true vocabulary."""
    hidden = case.hidden_TH.double().requires_grad_()
    weight = case.weight_VH.double().requires_grad_()
    temperature = torch.as_tensor(case.rows.temperature, dtype=torch.float64).expand(len(case.rows.rows_N))
    logits = hidden[case.rows.rows_N] @ weight[: case.vocab_size].t() / temperature[:, None]
    log_probs = torch.log_softmax(logits, -1)
    logprobs = log_probs.gather(1, case.rows.labels_N[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    topk = None if case.rows.topk_ids_NK is None else log_probs.gather(1, case.rows.topk_ids_NK).detach()
    largest, argmax = log_probs.detach().max(1)
    loss = _loss(case, slice(None), logprobs, entropy)
    output = LogprobOutput(logprobs.detach(), entropy.detach(), largest, argmax, topk)
    return _Result(loss.detach(), output, *torch.autograd.grad(loss, [hidden, weight]))


def _compute(
    case: _Case, mode: str, rows_per_chunk: int = 8, group: dist.ProcessGroup | None = None
) -> _Result:
    """The op on this rank's shard; grad_hidden_TH is this rank's part."""
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    hidden = case.hidden_TH.clone().requires_grad_()
    weight = case.weight_VH.chunk(world_size)[rank].clone().requires_grad_()
    arguments = (hidden, weight, case.rows, case.settings(rows_per_chunk, group))

    def loss_of(part: slice, output: LogprobOutput) -> ChunkLossResult:
        return ChunkLossResult(
            _loss(case, part, output.logprobs_N, output.entropy_N),
            case.grad_logprobs_N[part] * (1 + output.logprobs_N),
            None if case.grad_entropy_N is None else case.grad_entropy_N[part],
        )

    if mode == "one_pass":
        loss, output = one_pass_loss(*arguments, loss_of)
    else:
        output = vocab_parallel_logprobs(*arguments)
        loss = _loss(case, slice(None), output.logprobs_N, output.entropy_N)
    detached = LogprobOutput._make(None if x is None else x.detach() for x in output)
    return _Result(loss.detach(), detached, *torch.autograd.grad(loss, [hidden, weight]))


def _value_error(actual: _Result, expected: _Result) -> float:
    """Largest absolute error of any logprob or entropy; argmax and shapes must be right."""
    assert torch.equal(actual.output.argmax_N, expected.output.argmax_N)
    pairs = zip(actual.output, expected.output, strict=True)
    return max(float((x.double() - y).abs().max()) for x, y in pairs if x is not None and y is not None)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def _assert_close(actual: _Result, expected: _Result, values: float, gradients: float) -> None:
    assert _value_error(actual, expected) <= values
    assert _relative(actual.loss, expected.loss) <= gradients
    assert _relative(actual.grad_hidden_TH, expected.grad_hidden_TH) <= gradients
    assert _relative(actual.grad_weight_VH, expected.grad_weight_VH) <= gradients


# ---------------------------------------------------------------------------------- values, gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize(("vocab_size", "num_padded"), [(17, 17), (17, 32), (1000, 1024), (1408, 1408)])
def test_one_rank_equals_log_softmax(vocab_size: int, num_padded: int, entropy: bool, mode: str) -> None:
    case = _case(vocab_size, num_padded, entropy=entropy)
    expected = _reference(case)
    _assert_close(_compute(case, mode), expected, 1e-12, 1e-12)
    plain = replace(case, rows=replace(case.rows, topk_ids_NK=None, temperature=0.7))
    _assert_close(_compute(plain, mode), _reference(plain), 1e-12, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "gradients"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize(("vocab_size", "num_padded"), [(1000, 1024), (151936, 152064)])
def test_error_is_small_and_flat_in_the_number_of_chunks(
    vocab_size: int, num_padded: int, dtype: torch.dtype, gradients: float, mode: str
) -> None:
    """bf16: values are as exact as fp32's given the inputs; gradients are rounded once, when returned."""
    num_rows = 39 if vocab_size == 1000 else 7
    case = _case(vocab_size, num_padded, num_rows=num_rows, hidden_size=32, dtype=dtype)
    expected = _reference(case)
    errors: list[float] = []
    for rows_per_chunk in (num_rows, 4, 1):
        actual = _compute(case, mode, rows_per_chunk)
        assert actual.output.logprobs_N.dtype is torch.float32
        assert actual.grad_hidden_TH.dtype is actual.grad_weight_VH.dtype is dtype
        _assert_close(actual, expected, 1e-5, gradients)
        errors.append(_relative(actual.grad_weight_VH, expected.grad_weight_VH))
    assert max(errors) <= 1.5 * errors[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_lose_digits(offset: float, mode: str) -> None:
    """All logits of a token move by about +-1e4, where fp32 has steps of 1e-3."""
    case = _case(100, 128, dtype=torch.float32)
    shifted = replace(
        case,
        hidden_TH=torch.cat([case.hidden_TH, torch.full((NUM_TOKENS, 1), offset)], dim=1),
        weight_VH=torch.cat([case.weight_VH, torch.ones(128, 1)], dim=1),
    )
    assert _value_error(_compute(shifted, mode), _reference(shifted)) < 5e-3


@pytest.mark.parametrize("mode", MODES)
def test_results_are_bitwise_reproducible(mode: str) -> None:
    case = _case(1000, 1024, dtype=torch.float32)
    one, two = _compute(case, mode), _compute(case, mode)
    pairs = zip((*one.output, *one[2:]), (*two.output, *two[2:]), strict=True)
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", MODES)
def test_a_broken_row_stays_alone(mode: str, value: float) -> None:
    case = _case(50, 64)
    healthy = _compute(case, mode)
    case.hidden_TH[case.rows.rows_N[5]] = value
    broken = _compute(case, mode)
    others = torch.arange(23) != 5
    assert broken.output.logprobs_N[5].isnan()
    assert torch.equal(broken.output.logprobs_N[others], healthy.output.logprobs_N[others])
    tokens = case.rows.rows_N[others]
    torch.testing.assert_close(broken.grad_hidden_TH[tokens], healthy.grad_hidden_TH[tokens])


@pytest.mark.parametrize("mode", MODES)
def test_without_rows_everything_is_zero(mode: str) -> None:
    result = _compute(_case(50, 64, num_rows=0), mode)
    assert result.loss == 0
    shapes = [None if x is None else tuple(x.shape) for x in result.output]
    assert shapes == [(0,), (0,), (0,), (0,), (0, 3)]
    assert result.grad_hidden_TH.abs().sum() == result.grad_weight_VH.abs().sum() == 0


def test_a_frozen_side_gets_no_gradient_and_each_output_may_be_used_alone() -> None:
    case = _case(50, 64)
    hidden = case.hidden_TH.clone().requires_grad_()
    output = vocab_parallel_logprobs(hidden, case.weight_VH, case.rows, case.settings(8))
    (grad_logprobs,) = torch.autograd.grad(output.logprobs_N.sum(), hidden, retain_graph=True)
    (grad_entropy,) = torch.autograd.grad(output.entropy_N.sum(), hidden)
    assert not output.max_logprobs_N.requires_grad

    free = case.hidden_TH.clone().requires_grad_()
    temperature = torch.as_tensor(case.rows.temperature)
    log_probs = torch.log_softmax(free[case.rows.rows_N] @ case.weight_VH[:50].t() / temperature[:, None], -1)
    own = log_probs.gather(1, case.rows.labels_N[:, None]).sum()
    (expected,) = torch.autograd.grad(own, free, retain_graph=True)
    torch.testing.assert_close(grad_logprobs, expected, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(-(log_probs.exp() * log_probs).sum(), free)
    torch.testing.assert_close(grad_entropy, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------ one-pass contract


def _sum_of_logprobs(_: slice, output: LogprobOutput) -> ChunkLossResult:
    return ChunkLossResult(output.logprobs_N.sum(), torch.ones_like(output.logprobs_N))


def test_one_pass_refuses_a_scaled_loss_and_a_second_backward() -> None:
    case = _case(50, 64)
    for scale in (2.0, 1.0):
        hidden = case.hidden_TH.clone().requires_grad_()
        loss, _ = one_pass_loss(hidden, case.weight_VH, case.rows, case.settings(8), _sum_of_logprobs)
        if scale != 1.0:
            with pytest.raises(RuntimeError, match="must not be scaled"):
                (loss * scale).backward()
            continue
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward pass"):
            loss.backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_one_pass_forms_no_gradient_where_none_is_wanted(frozen: bool) -> None:
    """Neither under no_grad nor for frozen inputs; a main_grad stays untouched."""

    class NoGradients(TorchRows):
        def grad_logits_(self, *_: Any, **__: Any) -> Tensor:
            raise AssertionError("a gradient was formed")

    case = _case(50, 64)
    hidden = case.hidden_TH.clone().requires_grad_(not frozen)
    weight: Any = torch.nn.Parameter(case.weight_VH.clone(), requires_grad=not frozen)
    weight.main_grad = torch.zeros_like(case.weight_VH)
    settings = replace(case.settings(8), kernels=NoGradients())
    with torch.set_grad_enabled(frozen):
        loss, output = one_pass_loss(hidden, weight, case.rows, settings, _sum_of_logprobs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _reference(case).output.logprobs_N.sum())
    assert not output.logprobs_N.requires_grad
    assert (weight.main_grad == 0).all()


# ----------------------------------------------------------------------------------- memory and errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("main_grad", [True, False])
def test_memory_is_the_buffer_and_does_not_grow_with_rows(
    main_grad: bool, mode: str, dtype: torch.dtype
) -> None:
    """Whole logits would be 32 MB; the buffer is 2 MB, the weight 2 MB in fp32. Beside the returned
    gradients there are the buffer, the kernel's two blocks, and casts of the weight for bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 64, generator=generator).to(dtype).requires_grad_()
    weight: Any = torch.nn.Parameter(torch.randn(8192, 64, generator=generator).to(dtype))
    if main_grad:
        weight.main_grad = torch.zeros(8192, 64)
    settings = LogprobSettings(vocab_size=8192, group=None, buffer_bytes=2**21, kernels=TorchRows())
    labels = torch.randint(0, 8192, (1024,), generator=generator)
    rows = LogprobRows(rows_N=torch.arange(1024), labels_N=labels, temperature=1.0)
    with MemoryMeter() as meter:
        if mode == "one_pass":
            loss, _ = one_pass_loss(hidden, weight, rows, settings, _sum_of_logprobs)
        else:
            loss = vocab_parallel_logprobs(hidden, weight, rows, settings).logprobs_N.sum()
        loss.backward()
    returned = 2 * 2**21 if not main_grad else 0  # the fp32 sum, and its copy in bf16
    casts = 2**21 if dtype is torch.bfloat16 else 0
    blocks, small = 2 * 2**20, 1.2e6
    assert 2**21 < meter.peak_bytes < 2**21 + blocks + returned + casts + small


def test_ids_outside_the_vocabulary_are_named() -> None:
    case = _case(50, 64)
    token = int(case.rows.rows_N[7])
    case.rows.labels_N[7] = 50
    with pytest.raises(DataError, match=rf"the label 50 of token {token} .* vocabulary of 50 ids"):
        _compute(case, "recompute")
    case.rows.labels_N[7] = 49
    topk_ids = case.rows.topk_ids_NK
    assert topk_ids is not None
    topk_ids[3, 2] = -1
    token = int(case.rows.rows_N[3])
    with pytest.raises(DataError, match=rf"the top-k id -1 of token {token} "):
        _compute(case, "one_pass")


# --------------------------------------------------------------------------------------- several ranks


def _compute_on_rank(cases: list[_Case], rows_per_chunk: int) -> list[tuple[_Result, list[str]]]:
    """Each case in both modes, and the collectives it called."""
    called: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return call

    names = ["all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single"]
    names += ["barrier", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor"]
    for name in names:
        setattr(dist, name, counting(name))
    results = []
    for case in cases:
        for mode in MODES:
            called.clear()
            results.append((_compute(case, mode, rows_per_chunk, dist.group.WORLD), list(called)))
    return results


@pytest.mark.distributed
@pytest.mark.timeout(90)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_log_softmax_with_the_promised_collectives(
    run_distributed: Callable[..., list[Any]], world_size: int
) -> None:
    """Shards of any fill, of padding only as well; float64, fp32 and bf16; no rows; one chunk and three."""
    shapes = [(17, 20), (17, 32), (17, 64), (1000, 1024), (1408, 1408)]
    cases = [_case(*shape) for shape in shapes]
    cases += [_case(17, 32, num_rows=8), _case(1000, 1024, num_rows=0)]
    cases += [_case(151936, 152064, num_rows=7, dtype=torch.float32)]
    cases += [_case(1000, 1024, dtype=torch.bfloat16)]
    ranks = run_distributed(_compute_on_rank, world_size, cases, 8)
    for index, results in enumerate(zip(*ranks, strict=True)):
        case, mode = cases[index // 2], MODES[index % 2]
        parts = [result for result, _ in results]
        num_rows = len(case.rows.rows_N)
        num_gathers = -(-num_rows // 8) if mode == "one_pass" else min(num_rows, 1)
        assert [called for _, called in results] == [["all_gather"] * num_gathers] * world_size
        for part in parts[1:]:
            for mine, first in zip(part.output, parts[0].output, strict=True):
                assert torch.equal(mine, first)
        whole = parts[0]._replace(
            grad_hidden_TH=torch.stack([part.grad_hidden_TH.double() for part in parts]).sum(0),
            grad_weight_VH=torch.cat([part.grad_weight_VH for part in parts]),
        )
        if num_rows == 0:
            assert whole.grad_hidden_TH.abs().sum() == whole.grad_weight_VH.abs().sum() == 0
            continue
        exact = case.hidden_TH.dtype is torch.float64
        values, gradients = (1e-12, 1e-12) if exact else (1e-5, 1e-5)
        if case.hidden_TH.dtype is torch.bfloat16:
            gradients = 2e-3 * world_size**0.5  # each rank's part of the hidden gradient is rounded
        _assert_close(whole, _reference(case), values, gradients)
