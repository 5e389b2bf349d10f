"""Faulty tokens on several ranks: left out of the update on every layout, and named where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import (
    Aggregation,
    AlgorithmConfig,
    Config,
    DataConfig,
    Dtype,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
)
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.parallel import initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import TrainSequence

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

LENGTHS = [5, 17, 2, 9, 31, 3, 12]
PLACES = [(1, 4), (2, 0), (4, 0), (4, 19)]
"""(sequence, response token) of the first replica; the third sequence has no other loss token."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 x CP2": {"tensor_parallel_size": 2, "context_parallel_size": 2},
    "PP2 x DP2": {"pipeline_parallel_size": 2, "data_parallel_size": 2},
}


def train(
    config: Config, with_faults: list[TrainSequence], masked: list[TrainSequence]
) -> tuple[list[Any], list[bool]]:
    """(faulty tokens, whether every number agrees) of two policies; the second replica has its own share."""
    platform = build_platform(PlatformName.cpu)
    parallel = initialise_parallel(config.parallel, "gloo", platform.prepare(0))
    outcomes = []
    for sequences in (with_faults, masked):
        policy = Policy(config, platform, parallel)
        share = sequences[:2] if parallel.data_rank == 1 else sequences
        (micro_batches,) = iter_global_batches(config, policy, share)
        outcomes.append((policy, policy.train_step(micro_batches, StepTimer())))
    (policy, result), (reference, plain) = outcomes
    equal = [
        result.loss == plain.loss,
        result.grad_norm == plain.grad_norm,
        torch.equal(result.diagnostics.sums, plain.diagnostics.sums),
        plain.faulty == [],
    ]
    for mine, theirs in zip(policy.chunks[0].parameters(), reference.chunks[0].parameters(), strict=True):
        equal += [torch.equal(mine, theirs)]
        equal += [torch.equal(vars(mine)["main_grad"], vars(theirs)["main_grad"])]
    faulty = [(fault.replica, fault.sequence_id, fault.position) for fault in result.faulty]
    return faulty, equal


@pytest.mark.parametrize(
    ("layout", "aggregation"),
    [("TP2 x CP2", Aggregation.sequence_mean_token_mean), ("PP2 x DP2", Aggregation.token_mean)],
)
def test_left_out_as_if_masked(
    run_distributed: Callable[..., list[Any]],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    layout: str,
    aggregation: Aggregation,
) -> None:
    config = Config(
        data=DataConfig(train_path="unused"),
        algorithm=AlgorithmConfig(loss=LossConfig(delta=0.5), aggregation=aggregation),
        rollout=RolloutConfig(num_prompts_per_step=2),
        policy=PolicyConfig(
            model_path=str(hf_model("dense")), dtype=Dtype.fp32, max_tokens_per_micro_batch=48
        ),
        parallel=ParallelConfig(**LAYOUTS[layout]),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    with_faults: list[TrainSequence] = []
    masked: list[TrainSequence] = []
    for sequence in make_sequences(LENGTHS):
        positions = [position for number, position in PLACES if number == sequence.id]
        logprobs, mask = sequence.rollout_logprobs.clone(), sequence.loss_mask.clone()
        logprobs[positions], mask[positions] = -29.0, False
        with_faults.append(replace(sequence, rollout_logprobs=logprobs))
        masked.append(replace(sequence, rollout_logprobs=logprobs, loss_mask=mask))
    expected = [(0, number, position) for number, position in PLACES]
    if "data_parallel_size" in LAYOUTS[layout]:
        expected.append((1, 1, 4))  # the second replica's share begins likewise
    for faulty, equal in run_distributed(train, 4, config, with_faults, masked):
        assert faulty == expected
        assert len(equal) > 20
        assert all(equal)
