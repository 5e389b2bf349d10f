"""What the replicas agree on: normalisation over all of them, and equal numbers of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.config.schema import (
    Aggregation,
    AlgorithmConfig,
    Config,
    DataConfig,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.parallel import ParallelState, initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import MicroBatch, TrainSequence


@dataclass
class PolicyWithoutModel:
    """The part of a policy that packing asks: the mesh, and what the schedule wants."""

    parallel: ParallelState
    multiple: int = 1
    objective: Objective = field(default_factory=lambda: Objective(loss=SurrogateLoss()))

    @property
    def pad_to_multiple(self) -> int:
        return self.parallel.pad_to_multiple

    def round_up_micro_batches(self, count: int) -> int:
        return -(-count // self.multiple) * self.multiple


def make_config(*, num_updates: int = 1, aggregation: Aggregation = Aggregation.token_mean) -> Config:
    return Config(
        data=DataConfig(train_path="unused"),
        train=TrainConfig(num_updates_per_step=num_updates),
        rollout=RolloutConfig(num_prompts_per_step=12, max_response_tokens=50),
        algorithm=AlgorithmConfig(aggregation=aggregation),
        policy=PolicyConfig(model_path="unused", max_tokens_per_micro_batch=20),
    )


def batches_of(
    config: Config, parallel: ParallelState, sequences: list[TrainSequence], multiple: int = 1
) -> list[list[MicroBatch]]:
    policy = cast(Policy, PolicyWithoutModel(parallel, multiple))
    return list(iter_global_batches(config, policy, sequences))


def test_each_update_takes_an_equal_share_in_order(
    one_rank: ParallelState, make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    sequences = make_sequences([5, 9, 4, 12, 7, 8])
    batches = batches_of(make_config(num_updates=3), one_rank, sequences)
    ids = [sorted(id_ for m in batch for id_ in m.sequence_ids) for batch in batches]
    assert ids == [[0, 1], [2, 3], [4, 5]]
    for batch in batches:
        total = sum(m.token_weights_T.double().sum().item() for m in batch)
        assert total == pytest.approx(1.0, rel=1e-6)  # each update is normalised by itself


@pytest.mark.parametrize(
    ("num_sequences", "num_updates", "expected"),
    [
        (7, 3, [[0, 1, 2], [3, 4], [5, 6]]),
        (5, 4, [[0, 1], [2], [3], [4]]),
        (2, 3, [[0], [1], []]),
        (1, 2, [[0], []]),
        (0, 2, [[], []]),
    ],
)
def test_fewer_sequences_than_planned_are_spread(
    one_rank: ParallelState,
    make_sequences: Callable[..., list[TrainSequence]],
    num_sequences: int,
    num_updates: int,
    expected: list[list[int]],
) -> None:
    """None is lost; an update without any has one micro-batch without loss."""
    sequences = make_sequences([5, 9, 4, 12, 7, 8, 6][:num_sequences])
    batches = batches_of(make_config(num_updates=num_updates), one_rank, sequences)
    assert [sorted(id_ for m in batch for id_ in m.sequence_ids) for batch in batches] == expected
    for batch, ids in zip(batches, expected, strict=True):
        assert len(batch) >= 1
        total = sum(m.token_weights_T.double().sum().item() for m in batch)
        assert total == pytest.approx(1.0 if ids else 0.0, rel=1e-6)


def test_the_schedule_gets_the_number_it_wants(
    one_rank: ParallelState, make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    """Filled up with micro-batches without loss."""
    (batch,) = batches_of(make_config(), one_rank, make_sequences([15, 15, 15]), multiple=4)
    assert [len(m.sequence_ids) for m in batch] == [1, 1, 1, 0]
    assert batch[-1].token_weights_T.tolist() == [0.0]
    assert not batch[-1].loss_mask_T.any()


def test_a_batch_whose_every_token_is_masked(
    one_rank: ParallelState, make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    sequences = make_sequences([5, 9])
    for sequence in sequences:
        sequence.loss_mask.zero_()
    (batch,) = batches_of(make_config(), one_rank, sequences)
    assert all(not m.token_weights_T.any() for m in batch)


def _pack_own_share(
    config: Config, parallel: ParallelConfig, shares: list[list[TrainSequence]]
) -> list[tuple[list[int], int, float, list[float]]]:
    state = initialise_parallel(parallel, "gloo", build_platform(PlatformName.cpu).prepare(dist.get_rank()))
    share = shares[state.data_rank] if state.is_leader else []
    (batch,) = batches_of(config, state, share)
    return [
        (m.sequence_ids, m.num_tokens, m.token_weights_T.double().sum().item(), m.token_weights_T.tolist())
        for m in batch
    ]


@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.parametrize("aggregation", Aggregation)
def test_replicas_agree(
    run_distributed: Callable[..., list[Any]],
    make_sequences: Callable[..., list[TrainSequence]],
    aggregation: Aggregation,
) -> None:
    """Unequal shares: as many micro-batches on both, and the weights of the batch as a whole."""
    sequences = make_sequences([5, 17, 2, 9, 13])
    shares = [sequences[:1], sequences[1:]]
    config = make_config(aggregation=aggregation)
    first, second = run_distributed(_pack_own_share, 2, config, ParallelConfig(data_parallel_size=2), shares)
    assert len(first) == len(second) == 3
    assert [ids for ids, *_ in first] == [[0], [], []]
    assert sorted(id_ for ids, *_ in second for id_ in ids) == [1, 2, 3, 4]
    num_tokens = torch.tensor([int(s.loss_mask.sum()) for s in sequences], dtype=torch.float64)
    assert num_tokens.min() > 0
    expected = {
        Aggregation.token_mean: 1.0,
        Aggregation.sequence_mean_token_mean: 1.0,
        Aggregation.sequence_mean_token_sum: num_tokens.sum().item() / 5 / 50,
    }
    total = sum(weight for _, _, weight, _ in first + second)
    assert total == pytest.approx(expected[aggregation], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_the_ranks_of_a_replica_get_the_leaders_batch(
    run_distributed: Callable[..., list[Any]], make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    """Padded for tensor parallelism: every micro-batch divides by the number of its ranks."""
    sequences = make_sequences([5, 17, 2, 9, 13])
    parallel = ParallelConfig(tensor_parallel_size=2)
    leader, other = run_distributed(_pack_own_share, 2, make_config(), parallel, [sequences])
    assert leader == other
    assert all(num_tokens % 2 == 0 for _, num_tokens, *_ in leader)
    assert sorted(id_ for ids, *_ in leader for id_ in ids) == [0, 1, 2, 3, 4]


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_context_ranks_share_the_tokens_of_every_micro_batch(
    run_distributed: Callable[..., list[Any]], make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    """Padded to 8, 20, 4, 12 and 16 tokens, in micro-batches of at most 20; each rank has half of each."""
    sequences = make_sequences([5, 17, 2, 9, 13])
    parallel = ParallelConfig(context_parallel_size=2)
    first, second = run_distributed(_pack_own_share, 2, make_config(), parallel, [sequences])
    assert [ids for ids, *_ in first] == [ids for ids, *_ in second]
    assert sorted(ids for ids, *_ in first) == [[0, 3], [1], [2, 4]]
    assert [num_tokens for _, num_tokens, *_ in first] == [10, 10, 10]
    assert [num_tokens for _, num_tokens, *_ in second] == [10, 10, 10]
    assert all(weight > 0 for _, _, weight, _ in first + second)
    assert sum(weight for _, _, weight, _ in first + second) == pytest.approx(1.0, rel=1e-6)
