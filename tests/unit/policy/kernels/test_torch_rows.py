"""The torch row kernels against float64 softmax and autograd, on shards in the middle of a vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_drpo.policy.kernels import torch_rows
from megatron_drpo.policy.kernels.base import RowKernels
from megatron_drpo.policy.kernels.torch_rows import TorchRows

FIRST_ID = 100


@pytest.fixture(params=[2**18, 64])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, and blocks of one or two rows."""
    monkeypatch.setitem(torch_rows._BLOCK_ELEMENTS, "cpu", request.param)


def _logits(num_rows: int, num_ids: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(logits, inverse temperatures)."""
    generator = torch.Generator().manual_seed(num_rows * num_ids)
    logits = 4 * torch.randn(num_rows, num_ids, generator=generator, dtype=torch.float64)
    inverse = 0.5 + torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return logits.to(dtype), inverse.to(dtype)


def test_torch_rows_are_row_kernels() -> None:
    assert isinstance(TorchRows(), RowKernels)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_ids", [1, 17, 1408])
def test_statistics(num_ids: int, dtype: torch.dtype, tolerance: float) -> None:
    logits_CV, inverse_C = _logits(7, num_ids, dtype)
    before = logits_CV.clone()
    labels_C = torch.tensor(
        [FIRST_ID, FIRST_ID + num_ids - 1, 0, FIRST_ID - 1, FIRST_ID + num_ids, 3000, 100]
    )
    topk_CK = torch.stack([labels_C.roll(1), labels_C.roll(3)], dim=1)
    result = TorchRows().statistics(logits_CV, labels_C, inverse_C, topk_CK, first_id=FIRST_ID)
    assert torch.equal(logits_CV, before)
    assert result.dtype is dtype

    scaled = logits_CV.double() * inverse_C.double()[:, None]
    log_probs = scaled.log_softmax(1)
    expected = torch.full((7, 7), -math.inf, dtype=torch.float64)
    expected[:, 0] = scaled.logsumexp(1)
    expected[:, 1] = -(log_probs.exp() * log_probs).sum(1)
    expected[:, 3] = scaled.amax(1)
    expected[:, 4] = logits_CV.argmax(1) + FIRST_ID
    for column, ids_C in ((2, labels_C), (5, topk_CK[:, 0]), (6, topk_CK[:, 1])):
        for row, index in enumerate((ids_C - FIRST_ID).tolist()):
            if 0 <= index < num_ids:
                expected[row, column] = scaled[row, index]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_statistics_of_padding_only() -> None:
    empty, inverse_C = _logits(3, 0)
    topk_CK = torch.zeros(3, 2, dtype=torch.int64)
    result = TorchRows().statistics(empty, topk_CK[:, 0], inverse_C, topk_CK, first_id=FIRST_ID)
    inf = math.inf
    assert result.tolist() == [[-inf, 0.0, -inf, -inf, 0.0, -inf, -inf]] * 3


def test_extreme_rows() -> None:
    """Equals give the lowest id; certainty gives exactly 0 entropy; a spread of 1e4 and -inf are harmless;
    NaN and +inf spoil their own row only."""
    logits_CV = torch.tensor(
        [
            [2.0, 5.0, 5.0, 1.0],
            [0.0, 0.0, 0.0, 0.0],
            [-1e4, 1e4, -1e4, 0.0],
            [-math.inf, 0.0, 0.0, -math.inf],
            [1.0, math.nan, 2.0, 3.0],
            [1.0, math.inf, 2.0, 3.0],
            [1.0, 1.0, 1.0, 1.0],
        ]
    )
    ones_C, labels_C = torch.ones(7), torch.full((7,), 1)
    result = TorchRows().statistics(logits_CV, labels_C, ones_C, None, first_id=0)
    assert result[:4, 4].tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(result[:4, 1][1:], torch.tensor([math.log(4), 0.0, math.log(2)]))
    torch.testing.assert_close(result[:4, 0][1:], torch.tensor([math.log(4), 1e4, math.log(2)]))
    assert result[4:6, 0].isnan().all()
    torch.testing.assert_close(result[6, :2], torch.tensor([1 + math.log(4), math.log(4)]))
    grad_CV = TorchRows().grad_logits_(
        logits_CV,
        labels_C,
        ones_C,
        result[:, 0],
        result[:, 1],
        ones_C,
        ones_C,
        first_id=0,
        dtype=torch.float32,
    )
    assert grad_CV[[0, 1, 2, 3, 6]].isfinite().all()
    torch.testing.assert_close(grad_CV[2], torch.zeros(4))
    torch.testing.assert_close(grad_CV[6], torch.tensor([-0.25, 0.75, -0.25, -0.25]))


@pytest.mark.parametrize("num_ids", [3, 128, 129, 300, 512])
def test_the_largest_logit_is_the_first_of_equals_or_of_nans(num_ids: int) -> None:
    """Many ties, and a single largest at each place, against torch's max."""
    generator = torch.Generator().manual_seed(num_ids)
    logits_CV = torch.randint(0, 3, (num_ids + 50, num_ids), generator=generator).float()
    logits_CV[range(num_ids), range(num_ids)] = 9.0
    logits_CV[-20:] = torch.where(logits_CV[-20:] == 1, torch.nan, logits_CV[-20:])
    no_labels_C, ones_C = torch.full((num_ids + 50,), -1), torch.ones(num_ids + 50)
    result = TorchRows().statistics(logits_CV, no_labels_C, ones_C, None, first_id=0)
    largest_C, argmax_C = logits_CV.max(1)
    torch.testing.assert_close(result[:, 3], largest_C, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(result[:, 4].long(), argmax_C)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize(
    ("inputs", "output", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 4e-3),
    ],
)
@pytest.mark.parametrize("num_ids", [17, 1408])
def test_gradient_of_a_shard_is_autograd_of_the_whole(
    num_ids: int, inputs: torch.dtype, output: torch.dtype, tolerance: float, entropy: bool
) -> None:
    """The shard's columns start at 100 of a vocabulary of 100 + V + 50."""
    whole, inverse_C = _logits(5, FIRST_ID + num_ids + 50, inputs)
    labels_C = torch.tensor([FIRST_ID, FIRST_ID + num_ids - 1, 3, FIRST_ID + num_ids, FIRST_ID + 5])
    grad_logprobs_C, grad_entropy_C = _logits(2, 5, inputs)[0]

    leaf = whole.double().clone().requires_grad_()
    log_probs = (leaf * inverse_C.double()[:, None]).log_softmax(1)
    entropy_C = -(log_probs.exp() * log_probs).sum(1)
    loss = (grad_logprobs_C * log_probs.gather(1, labels_C[:, None])[:, 0]).sum()
    if entropy:
        loss = loss + (grad_entropy_C * entropy_C).sum()
    (expected,) = torch.autograd.grad(loss, leaf)

    shard = slice(FIRST_ID, FIRST_ID + num_ids)
    actual = TorchRows().grad_logits_(
        whole[:, shard].contiguous(),
        labels_C,
        inverse_C,
        (whole.double() * inverse_C.double()[:, None]).logsumexp(1).to(inputs),
        entropy_C.detach().to(inputs),
        grad_logprobs_C,
        grad_entropy_C if entropy else None,
        first_id=FIRST_ID,
        dtype=output,
    )
    assert actual.dtype is output
    assert actual.shape == (5, num_ids)
    difference = actual.double() - expected[:, shard]
    assert float(difference.norm() / expected[:, shard].norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_lies_in_the_logits_memory(dtype: torch.dtype) -> None:
    logits_CV, inverse_C = _logits(3, 20, torch.float32)
    labels_C = torch.tensor([1, 2, 3])
    lse_C = (logits_CV * inverse_C[:, None]).logsumexp(1)
    result = TorchRows().grad_logits_(
        logits_CV, labels_C, inverse_C, lse_C, lse_C, lse_C, None, first_id=0, dtype=dtype
    )
    assert result.untyped_storage().data_ptr() == logits_CV.untyped_storage().data_ptr()


def test_gradient_of_padding_only_is_empty() -> None:
    empty, inverse_C = _logits(3, 0, torch.float32)
    labels_C = torch.tensor([1, 2, 3])
    for dtype in (torch.float32, torch.bfloat16):
        result = TorchRows().grad_logits_(
            empty, labels_C, inverse_C, inverse_C, inverse_C, inverse_C, None, first_id=0, dtype=dtype
        )
        assert result.shape == (3, 0)
