"""Experts that a real SGLang server chose, replayed by the trainer: every choice of every layer is
compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from transformers import PreTrainedTokenizerFast

from megatron_drpo.batching.route_check import RouteCheck
from megatron_drpo.batching.sequences import build_sequences
from megatron_drpo.config.schema import (
    AlgorithmConfig,
    Anchor,
    Config,
    DataConfig,
    Dtype,
    OnBadRoutes,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    Recompute,
    RolloutConfig,
    RoutingReplay,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.parallel import initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.rollout.completion import RouteShape
from megatron_drpo.rollout.engine import RolloutEngine, SamplingPlan
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import MicroBatch, Prompt, TrainSequence
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weights.hf_folder import HfFolder

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

MODEL = "moe_renormalised"
NUM_LAYERS, NUM_EXPERTS = 4, 8
MIN_TOKENS = 10_000
SHAPE = RouteShape(
    moe_layers=tuple(range(NUM_LAYERS)),
    num_layers=NUM_LAYERS,
    num_experts=NUM_EXPERTS,
    num_experts_per_token=2,
)
LAYOUTS: dict[str, tuple[dict[str, Any], Recompute]] = {
    "TP2+SP, PP2, EP2": (
        {
            "tensor_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_parallel_size": 2,
            "expert_parallel_size": 2,
        },
        Recompute.full,
    ),
    "PP2, VPP2": ({"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}, Recompute.none),
}


@pytest.fixture(scope="module")
def sequences(
    sglang_server: Callable[[Path], str],
    hf_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[TrainSequence]:
    """More than 10,000 tokens with the experts that the server chose, in groups that share a prefix."""
    endpoint, folder = sglang_server(hf_model(MODEL)), HfFolder(hf_model(MODEL))
    pusher = WeightPusher(
        WeightSyncConfig(path=WeightSyncPath.tensor),
        model_path=hf_model(MODEL),
        run_dir=tmp_path_factory.mktemp("push"),
    )
    assert pusher.push(((name, folder.get(name)) for name in folder), 0, [endpoint]).updated == [endpoint]
    pusher.close()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_model(MODEL))
    config = RolloutConfig(num_samples_per_prompt=4, max_response_tokens=100, num_retries=0)
    engine = RolloutEngine(config, tokenizer, [], vocab_size=101, seed=0, route_shape=SHAPE)
    try:
        engine.set_servers([endpoint], 0)
        prompts = [
            Prompt(id=i, text="", token_ids=tuple(3 + (5 * i + j) % 90 for j in range(9))) for i in range(30)
        ]
        groups = engine.generate(prompts, SamplingPlan(step=0))
    finally:
        engine.close()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    check = RouteCheck(num_experts=NUM_EXPERTS, on_bad=OnBadRoutes.error)
    built = build_sequences(
        rollouts, torch.ones(len(rollouts)), [False] * len(rollouts), vocab_size=101, route_check=check
    )
    assert sum(len(sequence) for sequence in built) >= MIN_TOKENS
    return built


def keep_map(used: list[tuple[bool, torch.Tensor]], _: object, __: object, output: Any) -> None:
    """A router's forward hook: its output is (probabilities, map of the experts taken)."""
    used.append((torch.is_grad_enabled(), output[1]))


def run(config: Config, sequences: list[TrainSequence]) -> dict[str, Any]:
    """Score and update; how many choices of this rank's routers were those of the sequences."""
    platform = build_platform(PlatformName.cpu)
    parallel = initialise_parallel(config.parallel, "gloo", platform.prepare(0))
    policy = Policy(config, platform, parallel)
    (micro_batches,) = iter_global_batches(config, policy, sequences)
    (micro_batches,) = policy.add_logprobs([micro_batches])
    differences = [
        (m.old_logprobs_T - m.rollout_logprobs_T)[m.loss_mask_T].abs()
        for m in micro_batches
        if m.old_logprobs_T is not None
    ]
    maps: dict[int, list[tuple[bool, torch.Tensor]]] = {}
    for chunk in policy.chunks:
        for module in unwrap(chunk).modules():
            if isinstance(module, TopKRouter):
                used = maps.setdefault(int(module.layer_number or 0) - 1, [])
                module.register_forward_hook(partial(keep_map, used))
    policy.forward_backward(micro_batches)
    counts = [compare(policy, micro_batches, layer, used) for layer, used in maps.items()]
    return {
        "equal": sum(equal for equal, _ in counts),
        "all": sum(total for _, total in counts),
        "layers": sorted(maps),
        "mismatch": float(torch.cat(differences).mean()) if differences else None,
    }


def compare(
    policy: Policy, micro_batches: list[MicroBatch], layer: int, used: list[tuple[bool, torch.Tensor]]
) -> tuple[int, int]:
    """Of one layer: tokens whose experts were those told, and all. A layer that is computed again runs
    without gradients first; either kind of pass comes in the order of the micro-batches."""
    is_split = policy.config.parallel.sequence_parallel
    rank, size = (policy.parallel.tensor_rank, policy.parallel.tensor_size) if is_split else (0, 1)
    is_recomputed = policy.config.policy.recompute is Recompute.full
    equal = total = 0
    for has_gradients in (False, True) if is_recomputed else (True,):
        maps = [routing_map for flag, routing_map in used if flag is has_gradients]
        for routing_map, micro_batch in zip(maps, micro_batches, strict=True):
            if micro_batch.routes_TMK is None or micro_batch.has_routes_T is None:
                # The interleaved schedule rounds their number up: a micro-batch without sequences.
                assert not micro_batch.loss_mask_T.any()
                continue
            routes_TK = micro_batch.routes_TMK[:, layer].chunk(size)[rank].long()
            has_routes_T = micro_batch.has_routes_T.chunk(size)[rank]
            told = torch.zeros_like(routing_map).scatter(1, routes_TK, True)
            equal += int((routing_map == told).all(1)[has_routes_T].sum())
            total += int(has_routes_T.sum())
    return equal, total


@pytest.mark.parametrize("perturbed_layer", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_router_takes_the_servers_experts(
    hf_model: Callable[[str], Path],
    sequences: list[TrainSequence],
    run_distributed: Callable[..., list[dict[str, Any]]],
    layout: str,
    perturbed_layer: int | None,
) -> None:
    """All of them, in the forward pass and when it is computed again; also where one layer's are made up."""
    parallel, recompute = LAYOUTS[layout]
    config = Config(
        data=DataConfig(train_path="unused"),
        rollout=RolloutConfig(num_prompts_per_step=2),
        algorithm=AlgorithmConfig(anchor=Anchor.recomputed),
        policy=PolicyConfig(
            model_path=str(hf_model(MODEL)),
            dtype=Dtype.fp32,
            max_tokens_per_micro_batch=1500,
            recompute=recompute,
            routing_replay=RoutingReplay.rollout,
        ),
        parallel=ParallelConfig(**parallel),
    )
    told = [perturb(sequence, perturbed_layer) for sequence in sequences]
    ranks = run_distributed(run, config.parallel.world_size, config, told, timeout_s=150.0)
    assert sum(rank["equal"] for rank in ranks) == sum(rank["all"] for rank in ranks)
    num_passes = 2 if recompute is Recompute.full else 1
    num_tokens = sum(len(sequence) - 1 for sequence in sequences)
    assert sum(rank["all"] for rank in ranks) == num_passes * NUM_LAYERS * num_tokens
    assert sorted({layer for rank in ranks for layer in rank["layers"]}) == list(range(NUM_LAYERS))
    mismatch = max(rank["mismatch"] for rank in ranks if rank["mismatch"] is not None)
    assert (mismatch <= 1e-5) == (perturbed_layer is None)


def perturb(sequence: TrainSequence, layer: int | None) -> TrainSequence:
    """Other experts in one layer."""
    if layer is None or sequence.routes is None:
        return sequence
    routes = sequence.routes.clone()
    routes[:, layer] = (routes[:, layer] + 3) % NUM_EXPERTS
    return dataclasses.replace(sequence, routes=routes)
