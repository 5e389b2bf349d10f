"""Experts forced on the policy, on every layout, beside a float64 model that is forced to the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.batching.context_parallel import merge_context_parallel
from megatron_drpo.batching.packing import unpack
from megatron_drpo.config.schema import (
    AlgorithmConfig,
    Anchor,
    Config,
    DataConfig,
    Dtype,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    Recompute,
    RolloutConfig,
    RoutingReplay,
)
from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.sft import SftLoss
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.parallel import initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import TrainSequence
from tools.gradients import gather_gradients
from tools.reference_model import ReferenceModel

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

LENGTHS = [5, 17, 2, 9, 31, 3, 12]
NUM_LAYERS, NUM_EXPERTS, NUM_CHOSEN = 4, 8, 2
TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], Recompute]] = {
    "single": ({}, Recompute.none),
    "single, recompute": ({}, Recompute.full),
    "TP2+SP, ETP2": ({**TENSOR, "expert_tensor_parallel_size": 2}, Recompute.full),
    "EP2": ({"data_parallel_size": 2, "expert_parallel_size": 2}, Recompute.full),
    "PP2": (PIPELINE, Recompute.full),
    "PP2, VPP2": ({**PIPELINE, "virtual_pipeline_parallel_size": 2}, Recompute.none),
    "PP2, VPP2, recompute": ({**PIPELINE, "virtual_pipeline_parallel_size": 2}, Recompute.full),
    "CP2": ({"context_parallel_size": 2}, Recompute.full),
    "TP2+SP, PP2, EP2": ({**TENSOR, **PIPELINE, "expert_parallel_size": 2}, Recompute.full),
}


def make_config(path: Path, layout: str, replay: RoutingReplay = RoutingReplay.rollout) -> Config:
    parallel, recompute = LAYOUTS[layout]
    return Config(
        data=DataConfig(train_path="unused"),
        rollout=RolloutConfig(num_prompts_per_step=2),
        algorithm=AlgorithmConfig(anchor=Anchor.recomputed),
        policy=PolicyConfig(
            model_path=str(path),
            dtype=Dtype.fp32,
            max_tokens_per_micro_batch=33,
            recompute=recompute,
            routing_replay=replay,
        ),
        parallel=ParallelConfig(**parallel),
    )


def with_routes(sequences: list[TrainSequence], seed: int = 0) -> list[TrainSequence]:
    """Random experts for every token but the last, in every layer."""
    generator = torch.Generator().manual_seed(seed)
    for sequence in sequences:
        size = (len(sequence) - 1, NUM_LAYERS, NUM_EXPERTS)
        sequence.routes = torch.rand(size, generator=generator).topk(NUM_CHOSEN).indices.to(torch.uint8)
    return sequences


def build(config: Config) -> Policy:
    platform = build_platform(PlatformName.cpu)
    parallel = initialise_parallel(config.parallel, "gloo", platform.prepare(0))
    policy = Policy(config, platform, parallel)
    policy.objective = Objective(loss=SftLoss())
    return policy


def share_of(policy: Policy, sequences: list[TrainSequence]) -> list[TrainSequence]:
    """Unequal shares for two replicas."""
    if policy.parallel.data_size == 1:
        return sequences
    return sequences[:1] if policy.parallel.data_rank == 1 else sequences[1:]


def run(config: Config, sequences: list[TrainSequence]) -> dict[str, Any]:
    """Two passes of the same global batch; what the second gives on this rank."""
    policy = build(config)
    for _ in range(2):  # nothing of the first may be left in the second
        (micro_batches,) = iter_global_batches(config, policy, share_of(policy, sequences))
        (micro_batches,) = policy.add_logprobs([micro_batches])
        loss, _, agreement = policy.reduce(policy.forward_backward(micro_batches))
        gradients = gather_gradients(policy)
    logprobs: dict[int, torch.Tensor] = {}
    for micro_batch in micro_batches:
        if micro_batch.old_logprobs_T is not None:
            pieces = policy.parallel.gather_over_context(micro_batch.old_logprobs_T)
            logprobs |= unpack(merge_context_parallel(pieces, micro_batch.cu_seqlens), micro_batch)
    return {
        "loss": loss,
        "gradients": gradients,
        "logprobs": logprobs,
        "agreement": (agreement.num_choices, agreement.num_equal),
    }


def expected(path: Path, sequences: list[TrainSequence]) -> dict[str, Any]:
    """The same in float64, one sequence at a time."""
    model = ReferenceModel(path)
    total = torch.zeros((), dtype=torch.float64)
    count = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    logprobs = {}
    for sequence in sequences:
        logits = model.logits(sequence.token_ids, sequence.routes)[sequence.prompt_length - 1 : -1]
        labels = sequence.token_ids[sequence.prompt_length :]
        values = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        logprobs[sequence.id] = values.detach()
        total = total - values[sequence.loss_mask].sum() / count
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.parameters.items()}
    return {"loss": total.item(), "gradients": gradients, "logprobs": logprobs}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("moe_renormalised", layout) for layout in LAYOUTS),
        ("moe", "single, recompute"),  # how scores become weights does not depend on the layout
        ("moe", "PP2, VPP2"),
    ],
)
def test_the_policy_takes_the_experts_it_is_told(
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    run_distributed: Callable[..., list[Any]],
    model: str,
    layout: str,
) -> None:
    """Logprobs, loss and every gradient, the routers' among them; with several micro-batches in flight."""
    config = make_config(hf_model(model), layout)
    sequences = with_routes(make_sequences(LENGTHS))
    ranks = run_distributed(run, config.parallel.world_size, config, sequences, timeout_s=90.0)
    reference = expected(hf_model(model), sequences)
    assert ranks[0]["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert ranks[0]["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        scale = max(gradient.abs().max().item(), 1e-3)
        difference = (ranks[0]["gradients"][name].double() - gradient).abs().max().item()
        assert difference <= 1e-5 * scale, name
    logprobs = {number: values for rank in ranks for number, values in rank["logprobs"].items()}
    assert logprobs.keys() == reference["logprobs"].keys()
    for number, values in reference["logprobs"].items():
        mask = sequences[number].loss_mask
        torch.testing.assert_close(logprobs[number][mask].double(), values[mask], atol=1e-5, rtol=0)
    # Each layer is asked once in the scoring pass and once in the update: recomputing asks nobody.
    num_choices = 2 * NUM_LAYERS * sum(length - 1 for length in LENGTHS)
    assert ranks[0]["agreement"][0] == num_choices
    assert 0 < ranks[0]["agreement"][1] < num_choices / 4


def run_recorded(config: Config, sequences: list[TrainSequence]) -> dict[str, Any]:
    """R2: score, turn the routers upside down, update."""
    policy = build(config)
    (micro_batches,) = iter_global_batches(config, policy, sequences)
    (micro_batches,) = policy.add_logprobs([micro_batches])
    with torch.no_grad():
        for chunk in policy.chunks:
            for name, parameter in unwrap(chunk).named_parameters():
                if name.endswith("router.weight"):
                    parameter.neg_()
    first, *_ = policy.reduce(policy.forward_backward(micro_batches))
    # A second time, as for faulty tokens and for the place where numbers stopped being finite.
    loss, _, agreement = policy.reduce(policy.forward_backward(micro_batches, again=True))
    assert loss == first
    return {
        "loss": loss,
        "gradients": gather_gradients(policy),
        "agreement": agreement.num_equal / agreement.num_choices,
    }


@pytest.mark.parametrize("layout", ["single, recompute", "PP2, VPP2, recompute"])
def test_an_update_takes_the_experts_of_the_pass_before_it(
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    run_distributed: Callable[..., list[Any]],
    layout: str,
) -> None:
    """With their scores of now: the float64 model has the turned routers and the experts of the original
    ones."""
    path = hf_model("moe_renormalised")
    config = make_config(path, layout, RoutingReplay.recomputed)
    sequences = make_sequences(LENGTHS)
    ranks = run_distributed(run_recorded, config.parallel.world_size, config, sequences, timeout_s=90.0)
    model = ReferenceModel(path)
    total = torch.zeros((), dtype=torch.float64)
    count = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    for sequence in sequences:
        chosen = model.choices(sequence.token_ids)
        with torch.no_grad():
            for name, parameter in model.parameters.items():
                if name.endswith("mlp.gate.weight"):
                    parameter.neg_()
        logits = model.logits(sequence.token_ids, chosen)[sequence.prompt_length - 1 : -1]
        labels = sequence.token_ids[sequence.prompt_length :]
        values = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        (-values[sequence.loss_mask].sum() / count).backward()
        total = total - values[sequence.loss_mask].sum().detach() / count
        with torch.no_grad():
            for name, parameter in model.parameters.items():
                if name.endswith("mlp.gate.weight"):
                    parameter.neg_()
    assert ranks[0]["loss"] == pytest.approx(float(total), rel=1e-6)
    for name, parameter in model.parameters.items():
        assert parameter.grad is not None
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        difference = (ranks[0]["gradients"][name].double() - parameter.grad).abs().max().item()
        assert difference <= 1e-5 * scale, name
    assert ranks[0]["agreement"] < 0.5
