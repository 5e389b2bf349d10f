"""Against float64: in Triton's interpreter where there is no GPU, compiled where there is one.

`pytest -m gpu` on a GPU runs the same tests on it; TRITON_INTERPRET=1 would interpret them there as well.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_drpo.policy.kernels.base import RowKernels
from megatron_drpo.policy.kernels.torch_rows import TorchRows
from megatron_drpo.policy.kernels.triton_rows import INTERPRETED, TritonRows

EPS = torch.finfo(torch.float32).eps
INF = float("inf")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the kernels are compiled in this process")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and no TRITON_INTERPRET")
    return torch.device(request.param)


class Rows(NamedTuple):
    """A chunk, on any device. Values that a test does not set are random."""

    logits_CV: Tensor
    labels_C: Tensor
    inverse_temperature_C: Tensor
    grad_logprobs_C: Tensor
    grad_entropy_C: Tensor
    first_id: int

    @property
    def scale(self) -> float:
        """The largest finite |z / T|."""
        scaled_CV = self.logits_CV * self.inverse_temperature_C[:, None]
        return scaled_CV[scaled_CV.isfinite()].abs().max().item()


def make_rows(
    device: torch.device, num_rows: int, num_ids: int, *, first_id: int = 0, std: float = 4.0
) -> Rows:
    """Labels at the first and the last column, elsewhere here, and nowhere here."""
    random = torch.Generator().manual_seed(num_rows * 100_003 + num_ids)
    labels_C = torch.randint(first_id, first_id + num_ids, (num_rows,), generator=random)
    edges = [first_id, first_id + num_ids - 1, first_id + num_ids, first_id - 1]
    labels_C[: len(edges)] = torch.tensor(edges)[:num_rows]
    logits_CV = std * torch.randn(num_rows, num_ids, generator=random)
    inverse_temperature_C = 0.5 + 1.5 * torch.rand(num_rows, generator=random)
    grad_logprobs_C, grad_entropy_C = torch.randn(2, num_rows, generator=random)
    return Rows(
        logits_CV.to(device),
        labels_C.to(device),
        inverse_temperature_C.to(device),
        grad_logprobs_C.to(device),
        grad_entropy_C.to(device),
        first_id,
    )


def statistics(rows: Rows, topk_ids_CK: Tensor | None = None, kernels: RowKernels | None = None) -> Tensor:
    return (kernels or TritonRows()).statistics(
        rows.logits_CV, rows.labels_C, rows.inverse_temperature_C, topk_ids_CK, first_id=rows.first_id
    )


def grad_logits(
    rows: Rows,
    *,
    entropy: bool,
    dtype: torch.dtype = torch.float32,
    whole: Rows | None = None,
    kernels: RowKernels | None = None,
) -> Tensor:
    """In the logits' place, with the float64 log-sum-exp and entropy of `whole`, rounded to fp32."""
    logsumexp_C, entropy_C = reference_statistics(whole or rows)[:, :2].unbind(1)
    return (kernels or TritonRows()).grad_logits_(
        rows.logits_CV,
        rows.labels_C,
        rows.inverse_temperature_C,
        logsumexp_C.to(rows.logits_CV),
        entropy_C.to(rows.logits_CV),
        rows.grad_logprobs_C,
        rows.grad_entropy_C if entropy else None,
        first_id=rows.first_id,
        dtype=dtype,
    )


def reference_statistics(rows: Rows, topk_ids_CK: Tensor | None = None) -> Tensor:
    """float64, by torch's own functions, id by id."""
    scaled_CV = rows.logits_CV.double() * rows.inverse_temperature_C.double()[:, None]
    columns = [
        scaled_CV.logsumexp(1),
        torch.special.entr(scaled_CV.softmax(1)).sum(1),
        pick(scaled_CV, rows.labels_C, rows.first_id),
        scaled_CV.amax(1),
        scaled_CV.argmax(1).double() + rows.first_id,
    ]
    given = (
        [] if topk_ids_CK is None else [pick(scaled_CV, ids, rows.first_id) for ids in topk_ids_CK.unbind(1)]
    )
    return torch.stack(columns + given, 1)


def pick(scaled_CV: Tensor, ids_C: Tensor, first_id: int) -> Tensor:
    num_ids = scaled_CV.shape[1]
    columns = [int(i) - first_id for i in ids_C]
    picked = [
        row[column] if 0 <= column < num_ids else -INF for row, column in zip(scaled_CV, columns, strict=True)
    ]
    return torch.tensor([float(value) for value in picked], dtype=torch.float64, device=scaled_CV.device)


def reference_grad(rows: Rows, *, entropy: bool) -> Tensor:
    """Autograd in float64 of sum(g logprob + h entropy)."""
    logits_CV = rows.logits_CV.double().clone().requires_grad_()
    logprobs_CV = (logits_CV * rows.inverse_temperature_C.double()[:, None]).log_softmax(1)
    columns_C = rows.labels_C - rows.first_id
    here_C = (columns_C >= 0) & (columns_C < logits_CV.shape[1])
    assert bool(here_C.all()), "for labels elsewhere there is no whole softmax to differentiate"
    loss = (rows.grad_logprobs_C * logprobs_CV.gather(1, columns_C[:, None])[:, 0]).sum()
    if entropy:
        loss = loss - (rows.grad_entropy_C * (logprobs_CV.exp() * logprobs_CV).sum(1)).sum()
    loss.backward()
    assert logits_CV.grad is not None
    return logits_CV.grad


def with_labels_here(rows: Rows) -> Rows:
    last = rows.first_id + rows.logits_CV.shape[1] - 1
    return rows._replace(labels_C=rows.labels_C.clamp(rows.first_id, last))


def assert_grad_close(grad_CV: Tensor, expected_CV: Tensor, scale: float) -> None:
    """1e-5 of the row's largest, and what rounding z / T and the log-sum-exp to fp32 does to p."""
    error_C = (grad_CV.double() - expected_CV).abs().amax(1)
    limit_C = (1e-5 + 2 * EPS * scale) * expected_CV.abs().amax(1)
    assert bool((error_C <= limit_C).all()), (error_C / expected_CV.abs().amax(1)).tolist()


SIZES = [(1, 1), (2, 17), (7, 1000), (3, 1024), (5, 1408), (3, 32000)]


@pytest.mark.parametrize(("num_rows", "num_ids"), SIZES)
@pytest.mark.parametrize("first_id", [0, 60_001])
def test_statistics(device: torch.device, num_rows: int, num_ids: int, first_id: int) -> None:
    rows = make_rows(device, num_rows, num_ids, first_id=first_id)
    before_CV = rows.logits_CV.clone()
    torch.testing.assert_close(
        statistics(rows).double(), reference_statistics(rows), atol=1e-6, rtol=3 * EPS, check_dtype=False
    )
    assert torch.equal(rows.logits_CV, before_CV)


@pytest.mark.parametrize("num_given", [1, 5, 32])
def test_given_ids(device: torch.device, num_given: int) -> None:
    """Here, not here, at both edges, and negative, which pads a list of ids."""
    rows = make_rows(device, 3, 100, first_id=50)
    ids_CK = torch.arange(3 * num_given, device=device).view(3, num_given) * 7 % 190
    ids_CK[:, 0] = torch.tensor([50, 149, -1])
    result = statistics(rows, ids_CK)
    assert result.shape == (3, 5 + num_given)
    torch.testing.assert_close(result.double(), reference_statistics(rows, ids_CK), atol=1e-6, rtol=3 * EPS)


@pytest.mark.parametrize(("std", "shift"), [(1e4, 0.0), (1e-4, 0.0), (1.0, -1e4), (1.0, 1e4), (0.0, 3.0)])
@pytest.mark.parametrize("num_ids", [17, 5000])
def test_statistics_of_any_magnitude(device: torch.device, num_ids: int, std: float, shift: float) -> None:
    """Relative to the size of the logits, entropies absolutely: a maximum held above 0 would fail at -1e4."""
    rows = make_rows(device, 3, num_ids, std=std)
    rows.logits_CV.add_(shift)
    result, expected = statistics(rows).double(), reference_statistics(rows)
    torch.testing.assert_close(result, expected, atol=1e-6 + EPS * rows.scale, rtol=0.0)
    torch.testing.assert_close(result[:, 1], expected[:, 1], atol=1e-5, rtol=0.0)
    assert torch.equal(result[:, 4], expected[:, 4])


def test_lowest_of_equal_maxima(device: torch.device) -> None:
    """In one block; in two, where a lower lane meets it in the later one; in all columns."""
    rows = make_rows(device, 3, 5000, first_id=11)
    rows.logits_CV[0, [3001, 3000]] = 50.0
    rows.logits_CV[1, [4100, 2500]] = 50.0
    rows.logits_CV[2] = -7.0
    assert statistics(rows)[:, 4].tolist() == [3011, 2511, 11]


def test_columns_of_minus_infinity(device: torch.device) -> None:
    """They count nothing, wherever they are: all but some, all of a block, and all of a row."""
    rows = make_rows(device, 4, 5000)
    rows.logits_CV[0, ::2] = -INF
    rows.logits_CV[1, :4096] = -INF
    rows.logits_CV[2, 1:] = -INF
    rows.logits_CV[3] = -INF
    result = statistics(rows).double()
    torch.testing.assert_close(result[:3], reference_statistics(rows)[:3], atol=1e-6, rtol=3 * EPS)
    assert result[3].tolist() == [-INF, 0, -INF, -INF, 0]


@pytest.mark.parametrize("entropy", [False, True])
def test_gradient_at_columns_of_minus_infinity(device: torch.device, entropy: bool) -> None:
    """Is 0, and that of the others is as if they were not there."""
    rows = with_labels_here(make_rows(device, 3, 300))
    masked = rows._replace(logits_CV=torch.cat([rows.logits_CV, torch.full_like(rows.logits_CV, -INF)], 1))
    grad_CV = grad_logits(masked, entropy=entropy)
    assert_grad_close(grad_CV[:, :300], reference_grad(rows, entropy=entropy), rows.scale)
    assert bool((grad_CV[:, 300:] == 0).all())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("num_rows", "num_ids"), SIZES)
def test_gradient(device: torch.device, num_rows: int, num_ids: int, entropy: bool) -> None:
    rows = with_labels_here(make_rows(device, num_rows, num_ids, first_id=1000))
    expected_CV, scale = reference_grad(rows, entropy=entropy), rows.scale
    grad_CV = grad_logits(rows, entropy=entropy)
    assert grad_CV.data_ptr() == rows.logits_CV.data_ptr()
    if num_ids == 1:
        assert grad_CV.abs().max() <= 2 * EPS * scale
    else:
        assert_grad_close(grad_CV, expected_CV, scale)


@pytest.mark.parametrize(("std", "shift"), [(1e4, 0.0), (1e-4, 0.0), (1.0, -1e3), (0.0, 3.0)])
def test_gradient_of_any_magnitude(device: torch.device, std: float, shift: float) -> None:
    rows = with_labels_here(make_rows(device, 3, 5000, std=std))
    rows.logits_CV.add_(shift)
    expected_CV, scale = reference_grad(rows, entropy=True), rows.scale
    assert_grad_close(grad_logits(rows, entropy=True), expected_CV, scale)


@pytest.mark.parametrize("num_ids", [17, 1408, 9001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradient_is_rounded_to_nearest(
    device: torch.device, dtype: torch.dtype, num_ids: int
) -> None:
    """Half a unit in the last place away at most (2^-8 or 2^-11, relative); truncation would double it."""
    rows = with_labels_here(make_rows(device, 3, num_ids))
    rows.grad_logprobs_C.mul_(100.0)  # few of fp16's subnormal numbers
    expected_CV = reference_grad(rows, entropy=True)
    fp32_CV = grad_logits(rows._replace(logits_CV=rows.logits_CV.clone()), entropy=True)
    grad_CV = grad_logits(rows, entropy=True, dtype=dtype)
    assert (grad_CV.dtype, grad_CV.shape) == (dtype, rows.logits_CV.shape)
    half_unit = torch.finfo(dtype).eps / 2
    atol = max(torch.finfo(dtype).smallest_normal * half_unit, 1e-6 * fp32_CV.abs().max().item())
    torch.testing.assert_close(grad_CV.double(), expected_CV, rtol=1.01 * half_unit, atol=atol)
    if device.type == "cpu":
        assert torch.equal(grad_CV, fp32_CV.to(dtype))
    if not INTERPRETED or dtype is torch.float16:  # each row at the start of its row
        assert (grad_CV.data_ptr(), grad_CV.stride()) == (rows.logits_CV.data_ptr(), (2 * num_ids, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_may_lie_apart(device: torch.device, dtype: torch.dtype) -> None:
    """Nothing is read or written between them; vectors of any stride, as an expanded temperature has."""
    rows = with_labels_here(make_rows(device, 3, 1001))
    apart_CV = torch.full((3, 1004), torch.nan, device=device)
    apart_CV[:, :1001] = rows.logits_CV
    rows = rows._replace(
        inverse_temperature_C=torch.tensor(1.25, device=device).expand(3),
        labels_C=rows.labels_C.repeat_interleave(2)[::2],
    )
    apart = rows._replace(logits_CV=apart_CV[:, :1001])
    assert torch.equal(statistics(apart), statistics(rows))
    expected_CV = grad_logits(rows, entropy=True, dtype=dtype).clone()
    assert torch.equal(grad_logits(apart, entropy=True, dtype=dtype), expected_CV)
    assert bool(apart_CV[:, 1001:].isnan().all())


@pytest.mark.parametrize("column", [0, 999, 4999])
def test_nan_stays_in_its_row(device: torch.device, column: int) -> None:
    rows = with_labels_here(make_rows(device, 4, 5000))
    broken = rows._replace(logits_CV=rows.logits_CV.clone())
    broken.logits_CV[1, column] = torch.nan
    result, healthy = statistics(broken), statistics(rows)
    assert bool(result[1, [0, 1, 3]].isnan().all())
    others = [0, 2, 3]
    assert torch.equal(result[others], healthy[others])
    grad_CV, healthy_grad_CV = grad_logits(broken, entropy=True), grad_logits(rows, entropy=True)
    assert bool(grad_CV[1].isnan().all())
    broken.logits_CV[1] = torch.nan
    assert bool(statistics(broken)[1, :4].isnan().all())
    assert torch.equal(grad_CV[others], healthy_grad_CV[others])


def test_two_shards_make_the_whole_softmax(device: torch.device) -> None:
    whole = with_labels_here(make_rows(device, 5, 1408, first_id=300))
    expected, expected_grad_CV, scale = (
        reference_statistics(whole),
        reference_grad(whole, entropy=True),
        whole.scale,
    )
    left = whole._replace(logits_CV=whole.logits_CV[:, :513].clone())
    right = whole._replace(logits_CV=whole.logits_CV[:, 513:].clone(), first_id=300 + 513)
    stats_2CS = torch.stack([statistics(left), statistics(right)]).double()
    logsumexp_C = stats_2CS[:, :, 0].logsumexp(0)
    share_2C = (stats_2CS[:, :, 0] - logsumexp_C).exp()
    entropy_C = (share_2C * (stats_2CS[:, :, 1] - share_2C.log())).sum(0)
    winner_C = stats_2CS[:, :, 3].argmax(0)
    argmax_C = stats_2CS[:, :, 4].gather(0, winner_C[None])[0]
    combined = torch.stack(
        [logsumexp_C, entropy_C, stats_2CS[:, :, 2].amax(0), stats_2CS[:, :, 3].amax(0), argmax_C], 1
    )
    torch.testing.assert_close(combined, expected, atol=1e-6, rtol=3 * EPS)
    grads = [grad_logits(shard, entropy=True, whole=whole) for shard in (left, right)]
    assert_grad_close(torch.cat(grads, 1), expected_grad_CV, scale)


def test_equal_to_torch_rows(device: torch.device) -> None:
    """Statistics to 1e-6 of the largest logit, gradients to 1e-6 of the largest gradient."""
    rows = with_labels_here(make_rows(device, 5, 5000, first_id=70))
    ids_CK = 70 + torch.arange(20, device=device).view(5, 4) * 300
    expected = statistics(rows, ids_CK, TorchRows())
    torch.testing.assert_close(statistics(rows, ids_CK), expected, atol=1e-6 * rows.scale, rtol=0.0)
    copy = rows._replace(logits_CV=rows.logits_CV.clone())
    expected_CV = grad_logits(copy, entropy=True, kernels=TorchRows())
    atol = 1e-6 * expected_CV.abs().max().item()
    torch.testing.assert_close(grad_logits(rows, entropy=True), expected_CV, atol=atol, rtol=0.0)


def test_float64(device: torch.device) -> None:
    rows = with_labels_here(make_rows(device, 3, 5000))
    rows = rows._replace(
        logits_CV=rows.logits_CV.double(),
        inverse_temperature_C=rows.inverse_temperature_C.double(),
        grad_logprobs_C=rows.grad_logprobs_C.double(),
        grad_entropy_C=rows.grad_entropy_C.double(),
    )
    expected_CV = reference_grad(rows, entropy=True)
    torch.testing.assert_close(statistics(rows), reference_statistics(rows), atol=1e-12, rtol=1e-14)
    grad_CV = grad_logits(rows, entropy=True, dtype=torch.float64)
    torch.testing.assert_close(grad_CV, expected_CV, atol=1e-13, rtol=1e-12)


def test_no_columns_and_no_rows(device: torch.device) -> None:
    """A shard that is padding throughout has no probability; a chunk without tokens is none."""
    rows = make_rows(device, 2, 4, first_id=8)
    empty = rows._replace(logits_CV=rows.logits_CV[:, :0])
    ids_CK = rows.labels_C[:, None]
    assert statistics(empty, ids_CK).tolist() == [[-INF, 0, -INF, -INF, 0, -INF]] * 2
    none = Rows(*(tensor[:0] for tensor in rows[:5]), first_id=8)
    assert statistics(none, ids_CK[:0]).shape == (0, 6)
    zeros_C = torch.zeros(2, device=device)
    for chunk in (empty, none):
        args = (*chunk[:3], zeros_C, zeros_C, *chunk[3:5])
        grad_CV = TritonRows().grad_logits_(*args, first_id=8, dtype=torch.float16)
        assert grad_CV.shape == chunk.logits_CV.shape


def test_results_are_equal_in_every_run(device: torch.device) -> None:
    rows = with_labels_here(make_rows(device, 3, 32000))
    results = [statistics(rows) for _ in range(2)]
    grads = [grad_logits(rows._replace(logits_CV=rows.logits_CV.clone()), entropy=True) for _ in range(2)]
    assert torch.equal(*results)
    assert torch.equal(*grads)
