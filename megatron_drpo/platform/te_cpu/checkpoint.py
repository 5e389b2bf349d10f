"""Activation recomputation and random states, as Transformer Engine offers them.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/distributed.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: object = None,
    tp_group: object = None,
    **kwargs: Any,
) -> Any:
    """Compute `function(*args, **kwargs)`, and again in the backward pass instead of keeping activations."""
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


@contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    """FP8's bookkeeping around a recomputed forward pass, of which there is none."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    """FP8's bookkeeping is never on."""
    return False


class CudaRNGStatesTracker:
    """Named states of torch's random generator."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """A new state from a seed; neither may be there already."""
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} or seed {seed} is already tracked")
        self.seeds_.add(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the named state inside, and from the one outside afterwards."""
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
