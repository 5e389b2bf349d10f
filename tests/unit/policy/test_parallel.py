"""The rules between mesh and model, and this project's view of the mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.config.schema import ParallelConfig, PlatformName
from megatron_drpo.errors import ConfigError
from megatron_drpo.models.base import ArchitectureConfig, MoeConfig
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.parallel import ParallelState, RankInfo, check_layout, initialise_parallel

DENSE = ArchitectureConfig(
    num_layers=12,
    hidden_size=64,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=16,
    ffn_hidden_size=96,
    norm_eps=1e-6,
    qk_norm=True,
    rope_theta=1e4,
    max_position_embeddings=128,
    vocab_size=100,
    tie_word_embeddings=False,
)
EXPERTS = replace(
    DENSE,
    moe=MoeConfig(
        num_experts=6,
        num_experts_per_token=2,
        ffn_hidden_size=32,
        renormalise=True,
        is_moe_layer=(True,) * 12,
    ),
)
ONE_QUERY_GROUP = replace(DENSE, num_query_groups=1)
ODD_WIDTH = replace(DENSE, ffn_hidden_size=97)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, DENSE),
        ({}, EXPERTS),
        ({"tensor_parallel_size": 6}, DENSE),
        ({"pipeline_parallel_size": 3, "virtual_pipeline_parallel_size": 4}, DENSE),
        ({"data_parallel_size": 6, "expert_parallel_size": 6}, EXPERTS),
        ({"tensor_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}, EXPERTS),
        ({"tensor_parallel_size": 2, "sequence_parallel": True, "expert_parallel_size": 2}, EXPERTS),
        ({"context_parallel_size": 6, "expert_parallel_size": 3}, EXPERTS),
    ],
)
def test_layouts_that_fit(fields: dict[str, Any], architecture: ArchitectureConfig) -> None:
    assert check_layout(ParallelConfig(**fields), architecture) == []


MISFITS: list[tuple[dict[str, Any], ArchitectureConfig, list[str]]] = [
    (
        {"tensor_parallel_size": 8},
        DENSE,
        [
            "parallel.tensor_parallel_size=8 must divide the model's num_attention_heads, 12",
            "parallel.tensor_parallel_size=8 must divide the model's num_key_value_heads, 6",
        ],
    ),
    (
        {"tensor_parallel_size": 2},
        ONE_QUERY_GROUP,
        ["parallel.tensor_parallel_size=2 must divide the model's num_key_value_heads, 1"],
    ),
    (
        {"tensor_parallel_size": 2},
        ODD_WIDTH,
        ["parallel.tensor_parallel_size=2 must divide the model's intermediate_size, 97"],
    ),
    (
        {"pipeline_parallel_size": 3, "virtual_pipeline_parallel_size": 3},
        DENSE,
        [
            "parallel.pipeline_parallel_size * virtual_pipeline_parallel_size = 9 must divide "
            "the model's num_hidden_layers, 12"
        ],
    ),
    (
        {"data_parallel_size": 4, "expert_parallel_size": 4},
        EXPERTS,
        ["parallel.expert_parallel_size=4 must divide the model's num_experts, 6"],
    ),
    (
        {"data_parallel_size": 9, "expert_parallel_size": 3, "expert_tensor_parallel_size": 3},
        EXPERTS,
        ["parallel.expert_tensor_parallel_size=3 must divide the model's moe_intermediate_size, 32"],
    ),
    (
        {"data_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2},
        DENSE,
        [
            "parallel.expert_parallel_size=2 needs a mixture-of-experts model; this one is dense",
            "parallel.expert_tensor_parallel_size=2 needs a mixture-of-experts model; this one is dense",
        ],
    ),
    (
        {"tensor_parallel_size": 2, "sequence_parallel": True},
        EXPERTS,
        [
            "parallel.expert_tensor_parallel_size=1 must equal tensor_parallel_size=2 while "
            "expert_parallel_size is 1 (Megatron then reduces expert gradients like dense ones and "
            "loses those of other tensor ranks)"
        ],
    ),
    (
        {"tensor_parallel_size": 2, "expert_parallel_size": 2},
        EXPERTS,
        [
            "parallel.tensor_parallel_size=2 with a mixture-of-experts model needs "
            "parallel.sequence_parallel=true (Megatron's dispatcher routes each token once only then)"
        ],
    ),
]
"""Sizes, model, and what is said."""


@pytest.mark.parametrize(("fields", "architecture", "expected"), MISFITS)
def test_layouts_that_do_not_fit(
    fields: dict[str, Any], architecture: ArchitectureConfig, expected: list[str]
) -> None:
    assert check_layout(ParallelConfig(**fields), architecture) == expected


def test_all_problems_are_told_at_once() -> None:
    parallel = ParallelConfig(tensor_parallel_size=5, pipeline_parallel_size=5)
    assert len(check_layout(parallel, EXPERTS)) == 6


def test_rank_info_is_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert RankInfo.from_environment() == RankInfo(rank=0, local_rank=0, world_size=1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert RankInfo.from_environment() == RankInfo(rank=5, local_rank=1, world_size=8)


def test_wrong_number_of_ranks(one_rank: ParallelState) -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, context_parallel_size=3, data_parallel_size=2)
    with pytest.raises(ConfigError, match=r"1 rank\(s\) were started, but .* need 12: start that many"):
        initialise_parallel(parallel, "gloo", torch.device("cpu"))


def test_one_rank_is_leader_main_and_last(one_rank: ParallelState) -> None:
    assert one_rank.is_leader
    assert one_rank.is_main
    assert one_rank.is_last_stage
    value = object()
    assert one_rank.broadcast_from_leader(value) is value
    assert one_rank.sum_over_data_parallel(torch.tensor([2.0])).tolist() == [2.0]
    values = torch.tensor([2.0])
    assert one_rank.gather_over_context(values)[0] is values
    assert (one_rank.pad_sequences_to, one_rank.pad_to_multiple) == (1, 1)


def _describe_rank(parallel: ParallelConfig) -> dict[str, Any]:
    device = build_platform(PlatformName.cpu).prepare(dist.get_rank())
    state = initialise_parallel(parallel, "gloo", device)
    received = state.broadcast_from_leader({"from": state.rank} if state.is_leader else None)
    return {
        "place": (state.tensor_rank, state.pipeline_rank, state.data_rank),
        "sizes": (state.tensor_size, state.pipeline_size, state.data_size, state.world_size),
        "leader": state.is_leader,
        "main": state.is_main,
        "last": state.is_last_stage,
        "received": received,
        "sum": state.sum_over_data_parallel(torch.tensor([10.0**state.rank])).item(),
        "replica": sorted(dist.get_process_group_ranks(state.model_group)),
        "context": (
            state.context_rank,
            state.context_size,
            dist.get_process_group_ranks(state.context_group),
        ),
        "gathered": torch.cat(state.gather_over_context(torch.tensor([10.0**state.rank]))).tolist(),
        "padding": (state.pad_sequences_to, state.pad_to_multiple),
    }


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_the_mesh_of_four_ranks(run_distributed: Callable[..., list[Any]]) -> None:
    """TP2 x DP2 and PP2 x DP2: who leads whom, and who sums with whom."""
    tensor = run_distributed(_describe_rank, 4, ParallelConfig(tensor_parallel_size=2, data_parallel_size=2))
    assert [rank["place"] for rank in tensor] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert {rank["sizes"] for rank in tensor} == {(2, 1, 2, 4)}
    assert [rank["leader"] for rank in tensor] == [True, False, True, False]
    assert [rank["main"] for rank in tensor] == [True, False, False, False]
    assert [rank["last"] for rank in tensor] == [True] * 4
    assert [rank["received"] for rank in tensor] == [{"from": 0}, {"from": 0}, {"from": 2}, {"from": 2}]
    assert [rank["sum"] for rank in tensor] == [101.0, 1010.0, 101.0, 1010.0]
    assert [rank["replica"] for rank in tensor] == [[0, 1], [0, 1], [2, 3], [2, 3]]

    pipeline = run_distributed(
        _describe_rank, 4, ParallelConfig(pipeline_parallel_size=2, data_parallel_size=2)
    )
    assert [rank["place"] for rank in pipeline] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [rank["leader"] for rank in pipeline] == [True, True, False, False]
    assert [rank["last"] for rank in pipeline] == [False, False, True, True]
    assert [rank["received"] for rank in pipeline] == [{"from": 0}, {"from": 1}, {"from": 0}, {"from": 1}]
    assert [rank["sum"] for rank in pipeline] == [11.0, 11.0, 1100.0, 1100.0]
    assert [rank["replica"] for rank in pipeline] == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_context_ranks_belong_to_one_replica(run_distributed: Callable[..., list[Any]]) -> None:
    """CP2 x DP2 and CP2 x PP2: one leader for all ranks that share a replica's sequences."""
    data = run_distributed(_describe_rank, 4, ParallelConfig(context_parallel_size=2, data_parallel_size=2))
    assert [rank["place"] for rank in data] == [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1)]
    assert [rank["context"] for rank in data] == [
        (0, 2, [0, 1]),
        (1, 2, [0, 1]),
        (0, 2, [2, 3]),
        (1, 2, [2, 3]),
    ]
    assert [rank["leader"] for rank in data] == [True, False, True, False]
    assert [rank["received"] for rank in data] == [{"from": 0}, {"from": 0}, {"from": 2}, {"from": 2}]
    assert [rank["sum"] for rank in data] == [101.0, 1010.0, 101.0, 1010.0]
    assert [rank["replica"] for rank in data] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["gathered"] for rank in data] == [[1.0, 10.0]] * 2 + [[100.0, 1000.0]] * 2
    assert {rank["padding"] for rank in data} == {(4, 4)}

    pipeline = run_distributed(
        _describe_rank, 4, ParallelConfig(context_parallel_size=2, pipeline_parallel_size=2)
    )
    assert [rank["place"] for rank in pipeline] == [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 0)]
    assert [rank["leader"] for rank in pipeline] == [True, False, False, False]
    assert [rank["last"] for rank in pipeline] == [False, False, True, True]
    assert [rank["received"] for rank in pipeline] == [{"from": 0}] * 4
    assert [rank["replica"] for rank in pipeline] == [[0, 1, 2, 3]] * 4
    assert [rank["gathered"] for rank in pipeline] == [[1.0, 10.0]] * 2 + [[100.0, 1000.0]] * 2


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_tensor_and_context_ranks(run_distributed: Callable[..., list[Any]]) -> None:
    """TP2 x CP2: a rank's tokens divide by TP, and no rank sums with itself in another place."""
    ranks = run_distributed(
        _describe_rank, 4, ParallelConfig(tensor_parallel_size=2, context_parallel_size=2)
    )
    assert [rank["place"] for rank in ranks] == [(0, 0, 0), (1, 0, 0), (0, 0, 0), (1, 0, 0)]
    assert [rank["context"] for rank in ranks] == [
        (0, 2, [0, 2]),
        (0, 2, [1, 3]),
        (1, 2, [0, 2]),
        (1, 2, [1, 3]),
    ]
    assert [rank["leader"] for rank in ranks] == [True, False, False, False]
    assert [rank["replica"] for rank in ranks] == [[0, 1, 2, 3]] * 4
    assert [rank["sum"] for rank in ranks] == [1.0, 10.0, 100.0, 1000.0]
    assert {rank["padding"] for rank in ranks} == {(4, 4)}


def test_padding_for_tensor_and_context_ranks(one_rank: ParallelState) -> None:
    """lcm(2 C, C * tensor ranks): whole parts for every context rank, equal shares for every tensor rank."""
    sizes = {(1, 1): (1, 1), (1, 8): (1, 8), (2, 1): (4, 4), (2, 2): (4, 4), (4, 3): (8, 24), (3, 8): (6, 24)}
    for (context, tensor), expected in sizes.items():
        state = copy.copy(one_rank)
        state.context_size, state.tensor_size = context, tensor
        assert (state.pad_sequences_to, state.pad_to_multiple) == expected
