"""A NaN on one of two ranks stops both before any weight changes, with one message, and can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Dtype,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    Recompute,
    RolloutConfig,
)
from megatron_drpo.errors import NumericsError
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.parallel import initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.step.failed_update import load_failed_micro_batches, save_failure
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import TrainSequence

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90)]

TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any], Recompute]] = {
    "TP2+SP": ("dense", TENSOR, Recompute.full),
    "PP2": ("dense_tied", {"pipeline_parallel_size": 2}, Recompute.full),
    "PP2, VPP2": ("moe", {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}, Recompute.none),
    "EP2": ("moe", {"data_parallel_size": 2, "expert_parallel_size": 2}, Recompute.none),
}


NUM_MICRO_BATCHES = 3


def make_config(path: Path, run_dir: Path, sizes: dict[str, Any], recompute: Recompute) -> Config:
    return Config(
        run_dir=str(run_dir),
        data=DataConfig(train_path="unused"),
        rollout=RolloutConfig(num_prompts_per_step=2),
        policy=PolicyConfig(
            model_path=str(path), dtype=Dtype.fp32, max_tokens_per_micro_batch=33, recompute=recompute
        ),
        parallel=ParallelConfig(**sizes),
    )


def build(config: Config) -> Policy:
    platform = build_platform(PlatformName.cpu)
    parallel = initialise_parallel(config.parallel, "gloo", platform.prepare(0))
    return Policy(config, platform, parallel)


def fail_in_a_weight(config: Config, sequences: list[TrainSequence], number: int) -> str:
    """The message when one weight of layer `number` is NaN, on whichever rank has it."""
    policy = build(config)
    for chunk in policy.chunks:
        layers: Any = unwrap(chunk).decoder.layers
        for layer in layers:
            if layer.layer_number == number and policy.parallel.rank == policy.parallel.world_size - 1:
                with torch.no_grad():
                    layer.self_attention.linear_proj.weight[0, 0] = torch.nan
    (micro_batches,) = iter_global_batches(config, policy, sequences)
    with pytest.raises(NumericsError) as caught:
        policy.train_step(micro_batches, StepTimer())
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_names_the_layer(
    run_distributed: Callable[..., list[Any]],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    tmp_path: Path,
    layout: str,
) -> None:
    model, sizes, recompute = LAYOUTS[layout]
    config = make_config(hf_model(model), tmp_path, sizes, recompute)
    messages = run_distributed(fail_in_a_weight, 2, config, make_sequences([5, 17, 9]), 4)
    assert messages[0] == messages[1]
    assert "the output of layer 4, on rank" in messages[0]
    assert "sequence 0, 1, 2" in messages[0]


def fail_in_a_gradient(config: Config, sequences: list[TrainSequence]) -> str:
    """The message when the backward pass of layer 1 spoils the first micro-batch."""
    policy = build(config)
    passes: list[int] = []

    def fill(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.inf)

    def spoil(_: torch.nn.Module, __: object, output: tuple[torch.Tensor, object]) -> None:
        if torch.is_grad_enabled():  # else the layer is computed again
            passes.append(len(passes) % NUM_MICRO_BATCHES)
            if passes[-1] == 0:
                output[0].register_hook(fill)

    (micro_batches,) = iter_global_batches(config, policy, sequences)
    assert len(micro_batches) == NUM_MICRO_BATCHES
    if policy.parallel.is_leader:
        unwrap(policy.chunks[0]).decoder.layers[0].register_forward_hook(spoil)
    with pytest.raises(NumericsError) as caught:
        policy.train_step(micro_batches, StepTimer())
    [first] = micro_batches[0].sequence_ids
    return f"{first} | {caught.value}"


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.none])
def test_a_gradient_is_of_the_micro_batch_that_is_on_its_way_back(
    run_distributed: Callable[..., list[Any]],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    tmp_path: Path,
    recompute: Recompute,
) -> None:
    """The first stage has begun the next micro-batch by then."""
    config = make_config(hf_model("dense"), tmp_path, {"pipeline_parallel_size": 2}, recompute)
    messages = run_distributed(fail_in_a_gradient, 2, config, make_sequences([30, 31, 29]))
    ids, _, message = messages[0].partition(" | ")
    assert "the gradient of layer 1's output, on rank 0" in message
    assert message.endswith(f"sequence {ids}")


def fail_and_replay(config: Config, sequences: list[TrainSequence]) -> list[str]:
    """A NaN advantage in the second replica's share: the message, and the message of the replay."""
    policy = build(config)
    share = sequences[policy.parallel.data_rank :: policy.parallel.data_size]
    (micro_batches,) = iter_global_batches(config, policy, share)
    with pytest.raises(NumericsError) as first:
        policy.train_step(micro_batches, StepTimer())
    folder = save_failure(config, policy, RunState(step=2), micro_batches, first.value)
    dist.barrier()
    again = build(config)
    path = Checkpointer(str(folder), config.checkpoint).find()
    assert path is not None
    Checkpointer(str(folder), config.checkpoint).load(path, again)
    with pytest.raises(NumericsError) as second:
        again.train_step(load_failed_micro_batches(folder, again.parallel.rank), StepTimer())
    return [str(first.value), str(second.value)]


def test_the_sequence_of_another_replica_is_named_and_replayed(
    run_distributed: Callable[..., list[Any]],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    tmp_path: Path,
) -> None:
    model, sizes, recompute = LAYOUTS["EP2"]
    sequences = make_sequences([5, 17, 9, 12])
    sequences[3].advantages[2] = torch.inf
    config = make_config(hf_model(model), tmp_path, sizes, recompute)
    ranks = run_distributed(fail_and_replay, 2, config, sequences)
    (message,) = {text for texts in ranks for text in texts}
    assert "not finite first: the loss, on rank 1, sequence 3" in message
