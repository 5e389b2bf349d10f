"""The diagnostics against a plain loop over tokens, in total and by bucket, and their additivity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.config.schema import Anchor, KlEstimator
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.corrections import IcePop, SequenceMask, TruncatedImportanceSampling
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.kl import KlPenalty
from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.losses.tokens import LossTokens, Sequences, TopK
from megatron_drpo.metrics.diagnostics import (
    MU_BUCKET_EDGES,
    W_HISTOGRAM_EDGES,
    Diagnostics,
    compute_diagnostics,
    summarise,
)

CPU = torch.device("cpu")
DRPO = DrpoLoss(delta=0.1)
GRPO = GrpoLoss(clip_low=0.1, clip_high=0.2)


@dataclass(frozen=True)
class Row:
    """One token in Python's floats: probabilities, the advantage and the entropy."""

    pi: float
    anchor: float
    mu: float
    ref: float
    advantage: float
    entropy: float

    @property
    def ratio(self) -> float:
        return self.pi / self.anchor


def drpo_weight(row: Row) -> float:
    return 1 - math.copysign(1, row.advantage) * (row.pi - row.anchor) / 0.1 if row.advantage else 1.0


def grpo_weight(row: Row) -> float:
    if row.advantage > 0:
        return float(row.ratio <= 1.2)
    return float(row.ratio >= 0.9) if row.advantage < 0 else 1.0


def one(_: Row) -> float:
    return 1.0


def icepop_factor(row: Row) -> float:
    rho = row.anchor / row.mu
    return rho if 0.8 <= rho <= 1.25 else 0.0


def k2(row: Row) -> float:
    return math.log(row.pi / row.ref) ** 2 / 2


def k3(row: Row) -> float:
    return row.ref / row.pi - 1 + math.log(row.pi / row.ref)


@dataclass(frozen=True)
class Case:
    """An objective and what it is per token, written out."""

    objective: Objective
    recomputed: bool
    weight: Callable[[Row], float]
    outside: Callable[[Row], bool]
    factor: Callable[[Row], float] | None = None
    kl: Callable[[Row], float] | None = None


ICEPOP = IcePop(low=0.8, high=1.25, anchor=Anchor.recomputed)
TIS = TruncatedImportanceSampling(high=1.1, anchor=Anchor.recomputed)
CASES = {
    "drpo": Case(Objective(loss=DRPO), False, drpo_weight, lambda row: abs(row.pi - row.anchor) > 0.1),
    "drpo, recomputed, icepop, kl k2": Case(
        Objective(
            loss=DRPO,
            corrections=(ICEPOP,),
            kl=KlPenalty(coef=0.3, estimator=KlEstimator.k2),
            entropy_coef=0.1,
        ),
        True,
        drpo_weight,
        lambda row: abs(row.pi - row.anchor) > 0.1,
        icepop_factor,
        k2,
    ),
    "grpo, recomputed, tis and icepop": Case(
        Objective(loss=GRPO, corrections=(TIS, ICEPOP)),
        True,
        grpo_weight,
        lambda row: not 0.9 <= row.ratio <= 1.2,
        lambda row: icepop_factor(row) * min(row.anchor / row.mu, 1.1),
    ),
    "surrogate, kl k3": Case(
        Objective(loss=SurrogateLoss(), kl=KlPenalty(coef=0.01, estimator=KlEstimator.k3)),
        False,
        one,
        lambda row: False,
        kl=k3,
    ),
}


def make_tokens(num_tokens: int, *, seed: int = 0, recomputed: bool = False) -> tuple[LossTokens, Tensor]:
    """(tokens in float32, entropy): mu from 1e-6 to 1, the others near it in probability or in logarithm."""
    generator = torch.Generator().manual_seed(seed)

    def near(logprobs_N: Tensor) -> Tensor:
        return (logprobs_N + 0.2 * torch.randn(num_tokens, generator=generator)).clamp(max=-1e-4)

    exponent_N = 6 * torch.rand(num_tokens, generator=generator) ** 2
    rollout_N = -math.log(10) * exponent_N
    anchor_N = near(rollout_N) if recomputed else rollout_N
    tokens = LossTokens(
        logprobs_N=near(anchor_N).requires_grad_(),
        anchor_logprobs_N=anchor_N,
        rollout_logprobs_N=rollout_N,
        advantages_N=torch.randn(num_tokens, generator=generator).round(decimals=1),
        ref_logprobs_N=near(rollout_N),
    )
    return tokens, torch.rand(num_tokens, generator=generator)


def part_of(tokens: LossTokens, entropy_N: Tensor, part: slice) -> tuple[LossTokens, Tensor]:
    columns = ("logprobs", "anchor_logprobs", "rollout_logprobs", "advantages", "ref_logprobs")
    parts = {f"{name}_N": getattr(tokens, f"{name}_N")[part] for name in columns}
    return LossTokens(**parts), entropy_N[part]


def rollout_tokens(logpi_N: Tensor, logmu_N: Tensor, advantages_N: Tensor) -> LossTokens:
    return LossTokens(
        logprobs_N=logpi_N, anchor_logprobs_N=logmu_N, rollout_logprobs_N=logmu_N, advantages_N=advantages_N
    )


def rows_of(tokens: LossTokens, entropy_N: Tensor) -> list[Row]:
    assert tokens.ref_logprobs_N is not None
    logprobs = (tokens.logprobs_N, tokens.anchor_logprobs_N, tokens.rollout_logprobs_N, tokens.ref_logprobs_N)
    probs = [[math.exp(x) for x in column.tolist()] for column in logprobs]
    return [Row(*row) for row in zip(*probs, tokens.advantages_N.tolist(), entropy_N.tolist(), strict=True)]


def expect(case: Case, rows: list[Row]) -> dict[str, float]:
    """The metrics over `rows`, one formula each; 0 without any."""

    def mean(function: Callable[[Row], float]) -> float:
        return sum(map(function, rows)) / len(rows) if rows else 0.0

    def largest(function: Callable[[Row], float]) -> float:
        return max(map(function, rows), default=0.0)

    square = mean(lambda row: row.ratio**2)
    metrics = {
        "policy/entropy": mean(lambda row: row.entropy),
        "policy/ratio_mean": mean(lambda row: row.ratio),
        "policy/ratio_max": largest(lambda row: row.ratio),
        "policy/kl_k1": mean(lambda row: -math.log(row.ratio)),
        "policy/kl_k3": mean(lambda row: row.ratio - 1 - math.log(row.ratio)),
        "policy/ess": mean(lambda row: row.ratio) ** 2 / square if rows else 0.0,
        "mismatch/logprob_abs_mean": mean(lambda row: abs(math.log(row.pi / row.mu))),
        "mismatch/logprob_abs_max": largest(lambda row: abs(math.log(row.pi / row.mu))),
        "mismatch/prob_abs_mean": mean(lambda row: abs(row.pi - row.mu)),
        "trust_region/outside_share": mean(case.outside),
        "trust_region/diverging_share": mean(lambda row: row.advantage * (row.pi - row.anchor) > 0),
        "trust_region/converging_share": mean(lambda row: row.advantage * (row.pi - row.anchor) < 0),
        "trust_region/corrective_share": mean(lambda row: case.weight(row) < 0),
    }
    if case.recomputed:
        metrics |= {
            "mismatch/old_logprob_abs_mean": mean(lambda row: abs(math.log(row.anchor / row.mu))),
            "mismatch/old_logprob_abs_max": largest(lambda row: abs(math.log(row.anchor / row.mu))),
            "policy/anchor_prob_abs_mean": mean(lambda row: abs(row.pi - row.anchor)),
        }
    factor, kl = case.factor, case.kl
    if factor is not None:
        metrics |= {
            "correction/factor_mean": mean(factor),
            "correction/masked_share": mean(lambda row: factor(row) == 0),
        }
    if kl is not None:
        metrics |= {"policy/ref_kl": mean(kl), "policy/ref_kl_k3": mean(k3)}
    return metrics


def bucket_of(row: Row) -> int:
    return next(i for i, edge in enumerate((1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, math.inf)) if row.mu <= edge)


def count_weights(case: Case, rows: list[Row]) -> list[int]:
    bounds = [-math.inf, *W_HISTOGRAM_EDGES, math.inf]
    weights = [case.weight(row) for row in rows]
    return [sum(low <= w < high for w in weights) for low, high in itertools.pairwise(bounds)]


@pytest.mark.parametrize("name", CASES)
def test_summary_is_the_definition_in_total_and_by_bucket(name: str) -> None:
    case = CASES[name]
    tokens, entropy_N = make_tokens(400, recomputed=case.recomputed)
    diagnostics = compute_diagnostics(tokens, entropy_N, case.objective)
    rows = rows_of(tokens, entropy_N)
    found = summarise(diagnostics)

    parts = [[row for row in rows if bucket_of(row) == bucket] for bucket in range(7)]
    assert min(map(len, parts)) > 3, "every bucket is tried"
    expected: dict[str, float | list[float]] = dict(expect(case, rows))
    by_bucket = [expect(case, part) for part in parts]
    for metric in by_bucket[0]:
        expected[f"mu_bucket/{metric.partition('/')[2]}"] = [part[metric] for part in by_bucket]
    expected["mu_bucket/token_share"] = [len(part) / len(rows) for part in parts]
    expected["trust_region/w_histogram"] = [*map(float, count_weights(case, rows))]
    expected["mu_bucket/w_histogram"] = [
        float(count) for part in parts for count in count_weights(case, part)
    ]
    assert found.keys() == expected.keys()
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=1e-9, abs=1e-15), metric
    assert diagnostics.num_tokens == 400
    assert diagnostics.num_outside == sum(map(case.outside, rows))
    if name != "surrogate, kl k3":
        assert 0 < expected["trust_region/outside_share"] < 1  # pyrefly: ignore[unsupported-operation]


def test_the_sum_over_micro_batches_is_the_whole() -> None:
    """Also where a part is empty; maxima are not added."""
    case = CASES["drpo, recomputed, icepop, kl k2"]
    tokens, entropy_N = make_tokens(100, seed=3, recomputed=True)
    whole = compute_diagnostics(tokens, entropy_N, case.objective)
    total = Diagnostics.zeros(CPU)
    for part in (slice(0, 1), slice(1, 1), slice(1, 60), slice(60, 100)):
        total = total + compute_diagnostics(*part_of(tokens, entropy_N, part), case.objective)
    torch.testing.assert_close(total.sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(total.maxima, whole.maxima)


def _rank_diagnostics() -> tuple[Diagnostics, Diagnostics]:
    """(reduced over two ranks that hold every other token, computed here from all tokens): a mask of whole
    sequences, whose tokens the ranks share, as under context parallelism."""
    mask = SequenceMask(low=0.95, high=1.05, anchor=Anchor.recomputed)
    objective = Objective(loss=DRPO, corrections=(mask,))
    tokens, entropy_N = make_tokens(60, seed=5, recomputed=True)
    index_N = torch.arange(60) // 10

    def add_up(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    everything = replace(tokens, sequences=Sequences(index_N=index_N, num_sequences=6))
    expected = compute_diagnostics(everything, entropy_N, objective)
    part = slice(dist.get_rank(), None, 2)
    mine, my_entropy_N = part_of(tokens, entropy_N, part)
    mine = replace(mine, sequences=Sequences(index_N=index_N[part], num_sequences=6, reduce=add_up))
    found = compute_diagnostics(mine, my_entropy_N, objective)
    dist.all_reduce(found.sums)
    dist.all_reduce(found.maxima, op=dist.ReduceOp.MAX)
    return found, expected


def test_ranks_that_share_sequences_add_up_to_the_whole(
    run_distributed: Callable[..., list[tuple[Diagnostics, Diagnostics]]],
) -> None:
    for found, expected in run_distributed(_rank_diagnostics, 2):
        torch.testing.assert_close(found.sums, expected.sums, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.maxima, expected.maxima)
        masked = summarise(found)["correction/masked_share"]
        assert isinstance(masked, float)
        assert 0 < masked < 1


def test_edges_belong_to_the_lower_bucket_and_mu_above_one_to_the_last() -> None:
    """Each edge as float64 has it, the next number above, and what an engine's rounding makes of 1."""
    edges = torch.tensor(MU_BUCKET_EDGES, dtype=torch.float64)
    above = edges * (1 + 1e-9)
    logmu_N = torch.cat([edges * (1 - 1e-9), above, torch.tensor([1e-30], dtype=torch.float64)]).log()
    tokens = rollout_tokens(logmu_N, logmu_N, torch.ones(15))
    metrics = summarise(compute_diagnostics(tokens, torch.zeros(15), Objective(loss=DRPO)))
    counts = [2, 2, 2, 2, 2, 2, 3]
    assert metrics["mu_bucket/token_share"] == pytest.approx([count / 15 for count in counts])


@pytest.mark.parametrize(
    ("loss", "bins"),
    [
        (
            DRPO,
            {0: 1, W_HISTOGRAM_EDGES.index(1.0) + 1: 1, len(W_HISTOGRAM_EDGES): 1},
        ),  # w = -7, 9, exactly 1
        (GRPO, {W_HISTOGRAM_EDGES.index(0.0) + 1: 1, W_HISTOGRAM_EDGES.index(1.0) + 1: 2}),
    ],
)
def test_extreme_weights_fall_into_the_outer_bins(loss: Loss, bins: dict[int, int]) -> None:
    logmu_N = torch.tensor([0.1, 0.1, 0.5]).log()
    logpi_N = torch.tensor([0.9, 0.9, 0.5]).log()
    tokens = rollout_tokens(logpi_N, logmu_N, torch.tensor([1.0, -1.0, 1.0]))
    metrics = summarise(compute_diagnostics(tokens, torch.zeros(3), Objective(loss=loss)))
    histogram, by_bucket = metrics["trust_region/w_histogram"], metrics["mu_bucket/w_histogram"]
    assert isinstance(histogram, list)
    assert isinstance(by_bucket, list)
    assert {index: count for index, count in enumerate(histogram) if count} == bins
    num_bins = len(histogram)
    buckets = [sum(by_bucket[i : i + num_bins]) for i in range(0, len(by_bucket), num_bins)]
    assert buckets == [0, 0, 0, 2, 1, 0, 0]


@pytest.mark.parametrize("name", CASES)
def test_no_loss_tokens_give_zeros(name: str) -> None:
    case = CASES[name]
    tokens, entropy_N = make_tokens(0, recomputed=case.recomputed)
    diagnostics = compute_diagnostics(tokens, entropy_N, case.objective)
    zeros = Diagnostics.zeros(CPU)
    assert torch.equal(diagnostics.sums, zeros.sums)
    assert torch.equal(diagnostics.maxima, zeros.maxima)
    assert diagnostics.sums.dtype == zeros.sums.dtype == torch.float64
    for value in summarise(diagnostics).values():
        assert value == 0.0 or not any(value)  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_ever_nan(name: str) -> None:
    """Probabilities that underflow in float32 and in float64, and ordinary ones: all metrics are finite."""
    case = CASES[name]
    logprobs = torch.tensor([-1e-7, -1.0, -90.0, -800.0, -1e4])
    pi, anchor, mu = (x.flatten() for x in torch.meshgrid(logprobs, logprobs, logprobs, indexing="ij"))
    tokens = LossTokens(
        logprobs_N=pi,
        anchor_logprobs_N=anchor if case.recomputed else mu,
        rollout_logprobs_N=mu,
        advantages_N=torch.linspace(-1, 1, len(pi)),
        ref_logprobs_N=anchor,
    )
    for metric, value in summarise(compute_diagnostics(tokens, torch.zeros(len(pi)), case.objective)).items():
        values = value if isinstance(value, list) else [value]
        assert all(map(math.isfinite, values)), metric


def test_a_top_k_loss_gets_float64_like_everything_else() -> None:
    """A loss that reads the top k and whole sequences sees the tokens unchanged but for their precision."""
    seen: list[LossTokens] = []

    class Watching(SurrogateLoss):
        def weight(self, tokens: LossTokens) -> Tensor:
            seen.append(tokens)
            return super().weight(tokens)

    tokens, entropy_N = make_tokens(9, seed=1, recomputed=True)
    logprobs_NK = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    topk = TopK(logprobs_NK=logprobs_NK, rollout_logprobs_NK=logprobs_NK + 0.5)
    sequences = Sequences(index_N=torch.arange(9) // 3, num_sequences=3)
    compute_diagnostics(
        replace(tokens, topk=topk, sequences=sequences), entropy_N, Objective(loss=Watching())
    )
    (given,) = seen
    assert given.topk is not None
    assert given.sequences is sequences
    pairs = [
        (given.logprobs_N, tokens.logprobs_N.detach()),
        (given.anchor_logprobs_N, tokens.anchor_logprobs_N),
        (given.rollout_logprobs_N, tokens.rollout_logprobs_N),
        (given.advantages_N, tokens.advantages_N),
        (given.ref_logprobs_N, tokens.ref_logprobs_N),
        (given.topk.logprobs_NK, topk.logprobs_NK),
        (given.topk.rollout_logprobs_NK, topk.rollout_logprobs_NK),
    ]
    for found, original in pairs:
        assert found is not None
        assert original is not None
        assert torch.equal(found, original.double())
        assert found.dtype == torch.float64


def test_a_reference_policy_that_is_equal_has_no_divergence() -> None:
    """The KL metrics are there, and exactly 0: that is not the same as no reference."""
    tokens, entropy_N = make_tokens(20, seed=2)
    penalty = KlPenalty(coef=0.5, estimator=KlEstimator.k1)
    same = replace(tokens, ref_logprobs_N=tokens.logprobs_N.detach())
    metrics = summarise(compute_diagnostics(same, entropy_N, Objective(loss=DRPO, kl=penalty)))
    assert (metrics["policy/ref_kl"], metrics["policy/ref_kl_k3"]) == (0.0, 0.0)
    without = summarise(compute_diagnostics(same, entropy_N, Objective(loss=DRPO)))
    assert not any("ref_kl" in name for name in without)
