"""The memory that metrics tell, with numbers that a GPU would tell."""

from __future__ import annotations

import pytest
import torch

from megatron_drpo.metrics import memory
from megatron_drpo.metrics.memory import device_memory


def test_a_cpu_has_none() -> None:
    assert device_memory(torch.device("cpu")) == {}


def test_the_fullest_rank_is_told_and_the_peak_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    peaks = [3.0]
    monkeypatch.setattr(torch.cuda, "memory_allocated", {gpu: 2**30}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {gpu: 2**31}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[-1] * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(1.0))
    other_rank = [5.0, 0.5, 2.5]
    monkeypatch.setattr(
        memory, "_largest", lambda values, device: list(map(max, zip(values, other_rank, strict=True)))
    )
    assert device_memory(gpu) == {
        "memory/allocated_gib": 5.0,
        "memory/reserved_gib": 2.0,
        "memory/peak_gib": 3.0,
    }
    assert device_memory(gpu)["memory/peak_gib"] == 2.5
