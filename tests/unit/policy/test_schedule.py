"""What the schedule is given, and where Megatron's scaling is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import Config
from megatron_drpo.policy import schedule
from megatron_drpo.policy.policy import Policy
from megatron_drpo.policy.schedule import finalize_gradients, run_schedule
from megatron_drpo.types import MicroBatch, TrainSequence


def test_megatrons_division_by_tokens_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one place where its scaling is cancelled; groups are passed on."""
    calls: list[tuple[object, dict[str, Any]]] = []

    def finalize(model: object, **kwargs: Any) -> None:
        calls.append((model, kwargs))

    monkeypatch.setattr(schedule, "finalize_model_grads", finalize)
    chunks: list[torch.nn.Module] = []
    finalize_gradients(chunks, torch.tensor(1234), pg_collection="groups")
    assert calls == [(chunks, {"num_tokens": None, "pg_collection": "groups"})]


def test_every_micro_batch_passes_once_in_order(
    build_policy: Callable[[Config], Policy],
    policy_config: Callable[..., Config],
    make_sequences: Callable[..., list[TrainSequence]],
    pack_all: Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]],
) -> None:
    policy = build_policy(policy_config("dense", max_tokens_per_micro_batch=8))
    micro_batches = pack_all(policy, make_sequences([6, 7, 8]))
    seen: list[list[int]] = []

    def forward(batches: Any, module: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        seen.append(next(batches).sequence_ids)
        return torch.zeros(1), lambda output, non_loss_data: len(seen)

    results = run_schedule(
        forward,
        policy.chunks,
        micro_batches,
        policy.parallel.device,
        forward_only=True,
        collect_non_loss_data=True,
    )
    assert seen == [[0], [1], [2]]
    assert results == [1, 2, 3]
