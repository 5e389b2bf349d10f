"""The logprob op against float64 log_softmax, on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_drpo.errors import DataError
from megatron_drpo.policy.logprobs import LogprobOutput, vocab_parallel_logprobs

TEMPERATURE = 0.7


class _Case(NamedTuple):
    hidden_TH: Tensor
    weight_VH: Tensor
    """The whole padded matrix; rows beyond vocab_size are huge, so that a leak shows."""
    labels_T: Tensor
    vocab_size: int
    grad_logprobs_T: Tensor
    grad_entropy_T: Tensor
    mask_T: Tensor | None = None


class _Result(NamedTuple):
    logprobs_T: Tensor
    entropy_T: Tensor
    grad_hidden_TH: Tensor
    grad_weight_VH: Tensor


def _case(
    vocab_size: int,
    num_rows: int,
    *,
    num_tokens: int = 37,
    dtype: torch.dtype = torch.float64,
    masked: bool = False,
) -> _Case:
    generator = torch.Generator().manual_seed(vocab_size + num_rows)
    weight = torch.randn(num_rows, 16, generator=generator, dtype=torch.float64)
    weight[vocab_size:] *= 100
    return _Case(
        hidden_TH=torch.randn(num_tokens, 16, generator=generator, dtype=torch.float64).to(dtype),
        weight_VH=weight.to(dtype),
        labels_T=torch.randint(0, vocab_size, (num_tokens,), generator=generator),
        vocab_size=vocab_size,
        grad_logprobs_T=torch.randn(num_tokens, generator=generator),
        grad_entropy_T=torch.randn(num_tokens, generator=generator),
        mask_T=torch.rand(num_tokens, generator=generator) < 0.4 if masked else None,
    )


def _reference(case: _Case) -> _Result:
    """Plain float64 log_softmax over the true vocabulary; masked tokens give 0."""
    hidden = case.hidden_TH.double().requires_grad_()
    weight = case.weight_VH.double().requires_grad_()
    log_probs = torch.log_softmax(hidden @ weight[: case.vocab_size].t() / TEMPERATURE, dim=-1)
    logprobs = log_probs.gather(1, case.labels_T[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    if case.mask_T is not None:
        logprobs, entropy = logprobs * case.mask_T, entropy * case.mask_T
    total = (case.grad_logprobs_T * logprobs + case.grad_entropy_T * entropy).sum()
    return _Result(logprobs.detach(), entropy.detach(), *torch.autograd.grad(total, [hidden, weight]))


def _compute(case: _Case, chunk_tokens: int, group: dist.ProcessGroup | None = None) -> _Result:
    """The op on this rank's shard; grad_hidden_TH is this rank's part."""
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    hidden = case.hidden_TH.clone().requires_grad_()
    weight = case.weight_VH.chunk(world_size)[rank].clone().requires_grad_()
    output = vocab_parallel_logprobs(
        hidden,
        weight,
        case.labels_T,
        vocab_size=case.vocab_size,
        temperature=TEMPERATURE,
        group=group,
        chunk_tokens=chunk_tokens,
        mask_T=case.mask_T,
    )
    total = (case.grad_logprobs_T * output.logprobs_T + case.grad_entropy_T * output.entropy_T).sum()
    grads = torch.autograd.grad(total, [hidden, weight])
    return _Result(output.logprobs_T.detach(), output.entropy_T.detach(), *grads)


def _assert_close(actual: _Result, expected: _Result, tolerance: float) -> None:
    """Values to `tolerance` in absolute terms, gradients in relative norm."""
    for value, wanted in zip(actual[:2], expected[:2], strict=True):
        assert float((value.double() - wanted).abs().max()) <= tolerance
    for gradient, wanted in zip(actual[2:], expected[2:], strict=True):
        assert float((gradient.double() - wanted).norm() / wanted.norm()) <= tolerance


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(17, 17), (17, 32), (1000, 1024), (1408, 1408)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_rank_equals_log_softmax(vocab_size: int, num_rows: int, masked: bool) -> None:
    case = _case(vocab_size, num_rows, masked=masked)
    _assert_close(_compute(case, chunk_tokens=8), _reference(case), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 4e-3)],
)
def test_error_is_small_and_flat_in_the_number_of_chunks(
    dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float
) -> None:
    """bf16: values are as exact as fp32's given the inputs; gradients are rounded once, when returned."""
    case = _case(1000, 1024, num_tokens=128, dtype=dtype)
    expected = _reference(case)
    errors: list[float] = []
    for chunk_tokens in (128, 16, 1):
        actual = _compute(case, chunk_tokens)
        assert actual.logprobs_T.dtype is torch.float32
        assert actual.grad_weight_VH.dtype is dtype
        assert float((actual.logprobs_T.double() - expected.logprobs_T).abs().max()) <= value_tolerance
        assert float((actual.entropy_T.double() - expected.entropy_T).abs().max()) <= value_tolerance
        difference = actual.grad_weight_VH.double() - expected.grad_weight_VH
        errors.append(float(difference.norm() / expected.grad_weight_VH.norm()))
    assert max(errors) <= gradient_tolerance
    assert max(errors) <= 1.5 * min(errors)


def test_large_logits_neither_overflow_nor_lose_digits() -> None:
    case = _case(100, 128, dtype=torch.float32)
    for offset in (1e4, -1e4):  # moves all logits of a token by about +-1e4
        shifted = case._replace(
            hidden_TH=torch.cat([case.hidden_TH, torch.full((37, 1), offset * TEMPERATURE)], dim=1),
            weight_VH=torch.cat([case.weight_VH, torch.ones(128, 1)], dim=1),
        )
        actual, expected = _compute(shifted, chunk_tokens=64), _reference(shifted)
        assert float((actual.logprobs_T.double() - expected.logprobs_T).abs().max()) < 5e-3
        assert float((actual.entropy_T.double() - expected.entropy_T).abs().max()) < 5e-3


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest floating-point tensor made by any operator."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.numel = max(self.numel, leaf.numel())
        return result


def test_logits_never_exist_whole() -> None:
    """512 x 4096 logits would be 2,097,152 elements; the largest tensor is a chunk's or the weight's."""
    case = _case(4096, 4096, num_tokens=512, dtype=torch.float32)
    with _LargestTensor() as largest:
        _compute(case, chunk_tokens=16)
    assert largest.numel == max(16 * 4096, 4096 * 16)


def test_tied_weights_add_both_gradients() -> None:
    """The embedding's and the output layer's use of one matrix."""
    case = _case(50, 64)
    ids = case.labels_T.roll(1)

    def gradient(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weight = case.weight_VH.clone().requires_grad_()
        (result,) = torch.autograd.grad(logprobs(weight[ids].tanh(), weight).sum(), weight)
        return result

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        return _call(case, hidden, weight).logprobs_T

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.log_softmax(hidden @ weight[:50].t(), -1).gather(1, case.labels_T[:, None])

    torch.testing.assert_close(gradient(op), gradient(reference), rtol=1e-12, atol=1e-12)


def _call(case: _Case, hidden: Tensor, weight: Tensor, *, mask: Tensor | None = None) -> LogprobOutput:
    return vocab_parallel_logprobs(
        hidden,
        weight,
        case.labels_T,
        vocab_size=case.vocab_size,
        temperature=1.0,
        group=None,
        chunk_tokens=8,
        mask_T=mask,
    )


def test_a_frozen_side_gets_no_gradient_and_each_output_may_be_used_alone() -> None:
    case = _case(50, 64)
    both = _case(50, 64)._replace(grad_entropy_T=torch.zeros(37))
    hidden = case.hidden_TH.clone().requires_grad_()
    output = _call(case, hidden, case.weight_VH)
    (grad_logprobs,) = torch.autograd.grad(output.logprobs_T.sum(), hidden, retain_graph=True)
    (grad_entropy,) = torch.autograd.grad(output.entropy_T.sum(), hidden)
    free = case.hidden_TH.clone().requires_grad_()
    log_probs = torch.log_softmax(free @ case.weight_VH[:50].t(), -1)
    own = log_probs.gather(1, case.labels_T[:, None]).sum()
    (expected,) = torch.autograd.grad(own, free, retain_graph=True)
    torch.testing.assert_close(grad_logprobs, expected, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(-(log_probs.exp() * log_probs).sum(), free)
    torch.testing.assert_close(grad_entropy, expected, rtol=1e-12, atol=1e-12)

    weight = both.weight_VH.clone().requires_grad_()
    output = _call(both, both.hidden_TH, weight)
    (grad_weight,) = torch.autograd.grad(output.logprobs_T.sum(), weight)
    assert (grad_weight[50:] == 0).all()
    assert (grad_weight[:50] != 0).any()


def test_labels_outside_the_vocabulary_are_named_unless_masked() -> None:
    case = _case(50, 64)
    case.labels_T[7] = 50
    with pytest.raises(DataError, match=r"labels_T\[7\] = 50 is outside the vocabulary of 50 tokens"):
        _call(case, case.hidden_TH, case.weight_VH)
    mask = torch.ones(37, dtype=torch.bool)
    mask[7] = False
    assert _call(case, case.hidden_TH, case.weight_VH, mask=mask).logprobs_T[7] == 0


def test_a_micro_batch_without_loss_gives_zeros() -> None:
    case = _case(50, 64)._replace(mask_T=torch.zeros(37, dtype=torch.bool))
    for tensor in _compute(case, chunk_tokens=8):
        assert (tensor == 0).all()


COLLECTIVES = (
    "all_gather",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


def _compute_on_rank(cases: list[_Case], chunk_tokens: int) -> tuple[list[_Result], list[list[str]]]:
    """The results of every case and the names of the collectives each called."""
    called: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    results: list[_Result] = []
    calls: list[list[str]] = []
    for case in cases:
        called.clear()
        results.append(_compute(case, chunk_tokens, dist.group.WORLD))
        calls.append(list(called))
    return results, calls


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_two_ranks_equal_log_softmax_with_one_collective(run_distributed: Callable[..., list[Any]]) -> None:
    """Vocabulary shards of any fill: 9 + 8 ids, 16 + 1, 32 (of which 15 padding) + padding only, ..."""
    shapes = [(17, 18), (17, 32), (17, 64), (1000, 1024), (1408, 1408)]
    cases = [_case(*shape, masked=masked) for shape in shapes for masked in (False, True)]
    empty = torch.zeros(37, dtype=torch.bool)
    cases.append(cases[0]._replace(mask_T=empty))
    (first, calls), (second, _) = run_distributed(_compute_on_rank, 2, cases, 8)
    for case, one, two in zip(cases, first, second, strict=True):
        assert torch.equal(one.logprobs_T, two.logprobs_T)
        assert torch.equal(one.entropy_T, two.entropy_T)
        whole = one._replace(
            grad_hidden_TH=one.grad_hidden_TH + two.grad_hidden_TH,
            grad_weight_VH=torch.cat([one.grad_weight_VH, two.grad_weight_VH]),
        )
        if case.mask_T is not empty:
            _assert_close(whole, _reference(case), 1e-12)
        else:
            assert all((tensor == 0).all() for tensor in whole)
    assert calls == [["all_gather"]] * (len(cases) - 1) + [[]]
