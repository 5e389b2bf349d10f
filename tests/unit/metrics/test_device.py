"""The memory that metrics tell, with numbers that a GPU would tell."""

from __future__ import annotations

import pytest
import torch

from megatron_drpo.metrics import device as device_metrics
from megatron_drpo.metrics.device import device_memory


def test_a_cpu_has_none() -> None:
    assert device_memory(torch.device("cpu")) == {}


def test_the_fullest_rank_is_told_and_the_peak_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    peaks = {gpu: 3 * 2**30}
    other_rank = [5.0, 0.5, 2.5]

    def largest(values: list[float], device: torch.device) -> list[float]:
        return [max(pair) for pair in zip(values, other_rank, strict=True)]

    def reset(device: torch.device) -> None:
        peaks[device] = 2**30

    monkeypatch.setattr(torch.cuda, "memory_allocated", {gpu: 2**30}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {gpu: 2**31}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(device_metrics, "_largest", largest)
    assert device_memory(gpu) == {
        "memory/allocated_gib": 5.0,
        "memory/reserved_gib": 2.0,
        "memory/peak_gib": 3.0,
    }
    assert device_memory(gpu)["memory/peak_gib"] == 2.5
