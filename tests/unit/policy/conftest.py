"""Policies of tiny models on one rank. Megatron is imported when the first is built: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_drpo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    Dtype,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
)
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform import Platform
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.types import MicroBatch, TrainSequence

if TYPE_CHECKING:
    from megatron_drpo.policy.policy import Policy, UpdateResult


@pytest.fixture
def policy_config(hf_model: Callable[[str], Path]) -> Callable[..., Config]:
    """`policy_config(model, optimizer=None, **policy_fields)`: fp32, drpo with delta 0.5, temperature 0.9."""

    def config(model: str, optimizer: OptimizerConfig | None = None, **fields: Any) -> Config:
        return Config(
            data=DataConfig(train_path="unused"),
            algorithm=AlgorithmConfig(loss=LossConfig(delta=0.5)),
            rollout=RolloutConfig(temperature=0.9),
            policy=replace(PolicyConfig(model_path=str(hf_model(model)), dtype=Dtype.fp32), **fields),
            optimizer=optimizer or OptimizerConfig(lr=1e-3),
        )

    return config


@pytest.fixture
def build_policy(cpu_platform: Platform, one_rank: ParallelState) -> Callable[[Config], Policy]:
    """`build_policy(config)` on this process's one rank."""
    from megatron_drpo.policy.policy import Policy

    return lambda config: Policy(config, cpu_platform, one_rank)


@pytest.fixture
def pack_all() -> Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]:
    """One global batch of these sequences, packed as the policy's configuration says."""

    from megatron_drpo.global_batch import iter_global_batches

    def pack(policy: Policy, sequences: Sequence[TrainSequence]) -> list[MicroBatch]:
        (micro_batches,) = iter_global_batches(policy.config, policy, list(sequences))
        return micro_batches

    return pack


@pytest.fixture
def update(
    pack_all: Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]],
) -> Callable[[Policy, Sequence[TrainSequence]], UpdateResult]:
    """`update(policy, sequences)`: one optimizer step on them."""
    return lambda policy, sequences: policy.train_step(pack_all(policy, sequences), StepTimer())
