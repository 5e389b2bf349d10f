"""How often tensor-parallel ranks wait for each other between hidden states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from megatron_drpo.batching.packing import to_device
from megatron_drpo.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    Dtype,
    LogprobMode,
    LossConfig,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
)
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.forward import TrainForward
from megatron_drpo.policy.parallel import initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import TrainSequence

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90)]


def collectives(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `run` returned, and the collectives it started, as torch.distributed's dispatcher names them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = run()
    names = [event.name for event in profiler.events() or []]
    return result, sorted(name.removeprefix("c10d::") for name in names if name.startswith("c10d::"))


def count(config: Config, sequences: list[TrainSequence]) -> tuple[list[str], list[str]]:
    """Collectives of the forward pass and of the backward pass of one micro-batch's loss."""
    platform = build_platform(PlatformName.cpu)
    parallel = initialise_parallel(config.parallel, "gloo", platform.prepare(0))
    policy = Policy(config, platform, parallel)
    ((micro_batch,),) = iter_global_batches(config, policy, sequences)
    settings = policy.forward_settings
    forward = TrainForward(policy.objective, settings, parallel)
    output, loss_function = forward(iter([to_device(micro_batch, parallel.device)]), policy.chunks[0])
    hidden = output.detach().requires_grad_()
    (loss, _, _), in_forward = collectives(lambda: loss_function(hidden))
    _, in_backward = collectives(lambda: loss.backward())
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    return in_forward, in_backward


@pytest.mark.parametrize("loss", ["drpo", "gspo"])
@pytest.mark.parametrize("mode", [LogprobMode.auto, LogprobMode.recompute])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_collective_each_way(
    run_distributed: Callable[..., list[Any]],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    loss: str,
    mode: LogprobMode,
    sequence_parallel: bool,
) -> None:
    """Beside the gather of sequence parallelism: one all-gather forward; one reduction backward."""
    config = Config(
        data=DataConfig(train_path="unused"),
        algorithm=AlgorithmConfig(loss=LossConfig(name=loss)),
        policy=PolicyConfig(model_path=str(hf_model("dense")), dtype=Dtype.fp32, logprob_mode=mode),
        parallel=ParallelConfig(tensor_parallel_size=2, sequence_parallel=sequence_parallel),
    )
    for in_forward, in_backward in run_distributed(count, 2, config, make_sequences([9, 14, 4])):
        assert in_forward == (["_allgather_base_"] if sequence_parallel else []) + ["allgather_"]
        assert in_backward == (["_reduce_scatter_base_"] if sequence_parallel else ["allreduce_"])
