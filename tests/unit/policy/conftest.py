"""Policies of tiny models on one rank. Megatron is imported when the first is built: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_drpo.config.schema import (
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
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import Platform
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.types import MicroBatch, TrainSequence
from megatron_drpo.weights.hf_folder import HfFolder

if TYPE_CHECKING:
    from megatron_drpo.policy.model import PolicyModel
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
def architecture(hf_model: Callable[[str], Path]) -> Callable[[str], ArchitectureConfig]:
    """`architecture(model)`: what its config.json says."""

    def read(name: str) -> ArchitectureConfig:
        folder = HfFolder(hf_model(name))
        return get_family(folder.config).architecture(folder.config)

    return read


@pytest.fixture
def build_model(
    cpu_platform: Platform,
    one_rank: ParallelState,
    hf_model: Callable[[str], Path],
    architecture: Callable[[str], ArchitectureConfig],
    policy_config: Callable[..., Config],
) -> Callable[..., PolicyModel]:
    """`build_model(name, **policy_fields)`: the bare model of one rank, weights loaded."""
    from megatron_drpo.policy.model import build_model_chunks, build_transformer_config
    from megatron_drpo.weights.load_hf import load_hf_weights

    def build(name: str, **fields: Any) -> PolicyModel:
        described = architecture(name)
        config = build_transformer_config(policy_config(name, **fields), described, cpu_platform)
        (model,) = build_model_chunks(config, described, cpu_platform, one_rank.device)
        folder = HfFolder(hf_model(name))
        load_hf_weights([model], folder, get_family(folder.config).mapping(described))
        return model

    return build


@pytest.fixture
def build_policy(cpu_platform: Platform, one_rank: ParallelState) -> Callable[[Config], Policy]:
    """`build_policy(config)` on this process's one rank."""
    from megatron_drpo.policy.policy import Policy

    return lambda config: Policy(config, cpu_platform, one_rank)


@pytest.fixture
def pack_all() -> Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]:
    """One global batch of these sequences, packed as the policy's configuration says."""

    from megatron_drpo.step.global_batch import iter_global_batches

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
