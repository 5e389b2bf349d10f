"""Recomputation and random states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_drpo.platform.base import Platform
from megatron_drpo.platform.te_cpu.checkpoint import CudaRNGStatesTracker, checkpoint


def test_recomputation_gives_the_same_gradient() -> None:
    x = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    calls = []

    def function(y: Tensor, *, power: int) -> Tensor:
        calls.append(1)
        return y.sin() ** power

    checkpoint(function, x, power=3, tp_group=None).sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, 3 * x.detach().sin() ** 2 * x.detach().cos())


def test_named_random_states(cpu_platform: Platform) -> None:
    tracker = CudaRNGStatesTracker()
    tracker.add("one", 5)
    outside = torch.get_rng_state()
    with tracker.fork("one"):
        first = torch.rand(2)
    with tracker.fork("one"):
        second = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), outside)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat([first, second]), expected)
    for name, seed in (("one", 6), ("two", 5)):
        with pytest.raises(ValueError, match="already tracked"):
            tracker.add(name, seed)
    states = tracker.get_states()
    tracker.reset()
    assert tracker.get_states() == {}
    tracker.set_states(states)
    assert set(tracker.get_states()) == {"one"}
