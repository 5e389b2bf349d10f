"""The policy's parts leave the device and come back bit for bit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import AlgorithmConfig, Config, Dtype, KlConfig, LossConfig, PlatformName
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.offload import MemoryPart
from megatron_drpo.policy.parallel import initialise_parallel
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import MicroBatch, TrainSequence

PackAll = Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]
Update = Callable[[Policy, Sequence[TrainSequence]], UpdateResult]
LENGTHS = [5, 17, 2, 9]
WITH_REFERENCE = AlgorithmConfig(loss=LossConfig(delta=0.5), kl=KlConfig(coef=0.1))


@pytest.fixture(params=[Dtype.fp32, Dtype.bf16])
def config(request: pytest.FixtureRequest, policy_config: Callable[..., Config]) -> Config:
    return policy_config("moe", dtype=request.param)


def held_bytes(policy: Policy) -> dict[str, int]:
    """Of the storages below each kind of tensor."""

    def total(tensors: list[torch.Tensor]) -> int:
        return sum({t.untyped_storage(): t.untyped_storage().nbytes() for t in tensors}.values())

    moments = [
        value
        for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
        for state in part.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    return {
        "weights": total([p.data for p in parameters]),
        "gradients": total([vars(p)["main_grad"] for p in parameters]),
        "optimizer": total(moments),
        "reference": total([p.data for chunk in policy.reference_chunks for p in chunk.parameters()]),
    }


def test_an_update_after_a_journey_is_the_same(
    config: Config,
    build_policy: Callable[[Config], Policy],
    make_sequences: Callable[..., list[TrainSequence]],
    update: Update,
) -> None:
    """Before the first update, when there are no moments yet, and between two."""
    stayed, travelled = build_policy(config), build_policy(config)
    for length in (5, 8, 13):
        travelled.memory.offload()
        assert travelled.memory.parts_away == frozenset(MemoryPart)
        travelled.memory.onload()
        sequences = make_sequences([length, *LENGTHS])
        results = [update(policy, sequences) for policy in (stayed, travelled)]
        assert results[0].loss == results[1].loss
        assert results[0].grad_norm == results[1].grad_norm
    for (name, expected), (_, found) in zip(stayed.hf_tensors(), travelled.hf_tensors(), strict=True):
        assert torch.equal(expected, found), name


def test_nothing_is_left_on_the_device_and_weights_come_back_alone(
    config: Config,
    build_policy: Callable[[Config], Policy],
    make_sequences: Callable[..., list[TrainSequence]],
    pack_all: PackAll,
) -> None:
    config.algorithm = WITH_REFERENCE
    policy = build_policy(config)
    (micro_batches,) = policy.add_logprobs([pack_all(policy, make_sequences(LENGTHS))])
    policy.train_step(micro_batches, StepTimer())
    exported = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    before = held_bytes(policy)
    assert min(before.values()) > 0
    policy.memory.offload()
    assert set(held_bytes(policy).values()) == {0}
    policy.memory.offload()  # repeatable
    policy.memory.onload(MemoryPart.weights)
    assert held_bytes(policy) == {**dict.fromkeys(before, 0), "weights": before["weights"]}
    for name, tensor in policy.hf_tensors():
        assert torch.equal(tensor, exported[name]), name
    policy.memory.onload()
    assert held_bytes(policy) == before


def test_weights_can_stay(config: Config, build_policy: Callable[[Config], Policy]) -> None:
    """Also where the optimizer's main parameters are views of them, in fp32."""
    policy = build_policy(config)
    before = held_bytes(policy)
    policy.memory.offload(MemoryPart.gradients, MemoryPart.optimizer)
    assert held_bytes(policy)["weights"] == before["weights"]
    assert held_bytes(policy)["gradients"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_on_a_gpu(
    policy_config: Callable[..., Config], make_sequences: Callable[..., list[TrainSequence]], dtype: Dtype
) -> None:
    """In a process of its own: here torch.cuda may have the CPU platform's meaning."""
    config = policy_config("moe", dtype=dtype)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        seen = executor.submit(travel_on_gpu, config, make_sequences([40] * 8)).result(timeout=300)
    for found, expected in zip(seen["travelled"], seen["stayed"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5), "a GPU adds up in any order"
    assert seen["parameters"] > 100_000
    # A parameter has its own bytes, 4 of its gradient, 8 of its moments, and 4 of its main copy in bf16.
    per_parameter = 16 if dtype is Dtype.fp32 else 18
    assert seen["freed"] >= per_parameter * seen["parameters"]
    assert seen["left"] < 0.2 * seen["freed"]


def travel_on_gpu(config: Config, sequences: list[TrainSequence]) -> dict[str, Any]:
    """Losses and gradient norms of two policies, one of which leaves the device between its updates."""
    platform = build_platform(PlatformName.cuda)
    parallel = initialise_parallel(config.parallel, platform.backend, platform.prepare(0))
    seen: dict[str, Any] = {"stayed": [], "travelled": []}
    for name in ("stayed", "travelled"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        policy = Policy(config, platform, parallel)
        for _ in range(3):
            (micro_batches,) = iter_global_batches(config, policy, sequences)
            result = policy.train_step(micro_batches, StepTimer())
            seen[name].append((result.loss, result.grad_norm))
            if name == "travelled":
                full = torch.cuda.memory_allocated()
                policy.memory.offload()
                seen["left"] = torch.cuda.memory_allocated() - before
                seen["freed"] = full - torch.cuda.memory_allocated()
                policy.memory.onload()
        seen["parameters"] = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
    torch.distributed.destroy_process_group()
    return seen
