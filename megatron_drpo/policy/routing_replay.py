"""Which experts a token goes to, taken from an earlier pass instead of the router's current scores.

R3 (arXiv 2510.11370): the experts that the rollout server chose. R2: those of the trainer's own pass before
the step's first update. Either way the weights of the experts are the router's current ones, so gradients
flow into it.

Megatron asks an object at each router (`router_replay`) for the top-k choice. Its own object is one of a
global list, which feeds every model of the process; these here belong to one policy, and to a chunk and a
layer of it.
https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/moe/router_replay.py

    T  tokens of a micro-batch that this rank's router sees     K  experts per token
    M  mixture-of-experts layers of the model                   E  experts
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from megatron.core.transformer.moe.router import TopKRouter

from megatron_drpo.policy.model import unwrap
from megatron_drpo.types import MicroBatch

ComputeTopk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Mode(Enum):
    own = auto()
    """The router's choice."""
    forward = auto()
    """A forward pass over a micro-batch: replay or record."""
    recompute = auto()
    """A backward pass that computes earlier forward passes again, oldest first."""


@dataclass(slots=True)
class Agreement:
    """How often routers would have chosen otherwise."""

    num_choices: int = 0
    """Replayed tokens times layers."""
    num_equal: int = 0
    """Of them, where the router's own experts are the replayed ones, in any order."""


class AgreementCounter:
    """Agreement of all routers of a rank, counted where they compute: to read it there would make the host
    wait for the device in every layer."""

    def __init__(self) -> None:
        self._counts_2: torch.Tensor | None = None

    def add(self, replayed_T: Bool[torch.Tensor, " T"], equal_T: Bool[torch.Tensor, " T"]) -> None:
        counts_2 = torch.stack([replayed_T.sum(), equal_T.sum()])
        self._counts_2 = counts_2 if self._counts_2 is None else self._counts_2 + counts_2

    def take(self, device: torch.device) -> Int[torch.Tensor, 2]:
        """(choices, equal ones) since they were taken last, int64; the host does not wait."""
        taken_2, self._counts_2 = self._counts_2, None
        return torch.zeros(2, dtype=torch.int64, device=device) if taken_2 is None else taken_2


class RouterReplay:
    """What one router is told; has the method of Megatron's class of this name."""

    def __init__(self, layer: int, agreement: AgreementCounter) -> None:
        """
        Args:
            layer: index among the model's mixture-of-experts layers.
        """
        self.layer = layer
        self._agreement = agreement
        self._mode = _Mode.own
        self._is_recording = False
        self._has_backward = False
        self._target: tuple[torch.Tensor, torch.Tensor] | None = None
        self._used: deque[torch.Tensor] = deque()
        """Choices of forward passes whose backward pass is still to come."""
        self._recorded: list[torch.Tensor] = []
        """R2: choices of the recording pass, by micro-batch; kept until the step is over."""
        self._num_taken = 0
        self._update_start = 0

    def start_forward(
        self,
        target: tuple[Int[torch.Tensor, "T K"], Bool[torch.Tensor, " T"]] | None,
        *,
        records: bool,
        has_backward: bool,
    ) -> None:
        """What the next forward pass does.

        Args:
            target: experts to take, and for which tokens; None: the router's own.
            records: keep what is taken, for `take_recorded`.
            has_backward: a backward pass follows, which may compute the layer again.
        """
        self._mode = _Mode.forward
        self._target = target
        self._is_recording = records
        self._has_backward = has_backward

    def end_forward(self) -> None:
        """From here on the router is only called by backward passes, which compute it again."""
        self._mode = _Mode.recompute if self._has_backward else _Mode.own

    def take_recorded(self) -> tuple[Int[torch.Tensor, "T K"], Bool[torch.Tensor, " T"]]:
        """The choices of the oldest recorded pass not taken yet, as a target for all its tokens."""
        chosen = self._recorded[self._num_taken]
        self._num_taken += 1
        return chosen, torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)

    def start_update(self, *, again: bool) -> None:
        """The passes of an update's micro-batches follow; `again`: of those that the latest update had."""
        if again:
            self._num_taken = self._update_start
        self._update_start = self._num_taken

    def clear(self) -> None:
        """Forget all passes."""
        self._mode = _Mode.own
        self._target = None
        self._used.clear()
        self._recorded.clear()
        self._num_taken = self._update_start = 0

    def get_replay_topk(
        self,
        scores: Float[torch.Tensor, "T E"],
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopk | None = None,
    ) -> tuple[Float[torch.Tensor, "T K"], Int[torch.Tensor, "T K"]]:
        """The chosen experts' scores, with their gradients, and the experts. Called by Megatron's router."""
        assert default_compute_topk is not None
        if self._mode is _Mode.recompute:
            chosen = self._used.popleft().long()
            return scores.gather(1, chosen), chosen
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._mode is _Mode.own:
            return values, chosen
        if self._target is not None:
            chosen = self._replay(chosen, *self._target)
            values = scores.gather(1, chosen)
        if self._is_recording:
            self._recorded.append(chosen.to(torch.int16))
        # A layer that is computed again runs without gradients the first time.
        if self._has_backward and not torch.is_grad_enabled():
            self._used.append(chosen.to(torch.int16))
        return values, chosen

    def _replay(
        self, own_TK: torch.Tensor, target_TK: torch.Tensor, replays_T: torch.Tensor
    ) -> Int[torch.Tensor, "T K"]:
        target_TK = target_TK.to(own_TK.dtype)
        equal_T = (own_TK.sort(1).values == target_TK.sort(1).values).all(1) & replays_T
        self._agreement.add(replays_T, equal_T)
        return torch.where(replays_T[:, None], target_TK, own_TK)


class ReplaySource(StrEnum):
    """What a pass takes its routes from."""

    none = "none"
    """The routers choose."""
    micro_batch = "micro_batch"
    """`MicroBatch.routes_TMK`, where there are any."""
    record = "record"
    """The routers choose, and their choices are kept."""
    recorded = "recorded"
    """What the last recording pass chose for the same micro-batches."""


class RoutingReplay:
    """All routers of a policy's chunks on this rank."""

    def __init__(
        self, chunks: Sequence[Any], is_moe_layer: Sequence[bool], *, tensor_rank: int, tensor_size: int
    ) -> None:
        """
        Args:
            chunks: this rank's model chunks, wrapped or bare. Their routers call back from now on.
            is_moe_layer: of each layer of the whole model.
            tensor_rank, tensor_size: sequence parallelism's cut of the tokens; 0 and 1 without it.
        """
        self._agreement = AgreementCounter()
        self._tensor_rank = tensor_rank
        self._tensor_size = tensor_size
        self._routers: dict[int, list[RouterReplay]] = {}
        """Of each chunk, by its identity."""
        moe_index = {layer: sum(is_moe_layer[:layer]) for layer, is_moe in enumerate(is_moe_layer) if is_moe}
        for chunk in chunks:
            replays = self._routers.setdefault(id(unwrap(chunk)), [])
            for module in unwrap(chunk).modules():
                if isinstance(module, TopKRouter):
                    assert module.layer_number is not None
                    replay = RouterReplay(moe_index[module.layer_number - 1], self._agreement)
                    module.router_replay = replay  # type: ignore[assignment]  the same method
                    replays.append(replay)

    @contextmanager
    def forward(
        self, micro_batch: MicroBatch, chunk: Any, source: ReplaySource, *, has_backward: bool
    ) -> Iterator[None]:
        """Around one chunk's forward pass over one micro-batch."""
        routers = self._routers[id(unwrap(chunk))]
        for router in routers:
            if source is ReplaySource.recorded:
                target = router.take_recorded()
            elif source is ReplaySource.micro_batch:
                target = self._target(micro_batch, router.layer)
            else:
                target = None
            records = source is ReplaySource.record
            router.start_forward(target, records=records, has_backward=has_backward)
        try:
            yield
        finally:
            for router in routers:
                router.end_forward()

    def start_update(self, *, again: bool) -> None:
        """Before the passes of an update; `again`: it is computed a second time."""
        for routers in self._routers.values():
            for router in routers:
                router.start_update(again=again)

    def clear(self) -> None:
        """Forget all passes: the step is over, or failed."""
        for routers in self._routers.values():
            for router in routers:
                router.clear()

    def take_agreement(self, device: torch.device) -> Int[torch.Tensor, 2]:
        """See AgreementCounter.take; of this rank."""
        return self._agreement.take(device)

    def _target(self, micro_batch: MicroBatch, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """One layer's routes of this rank's tokens; sequence parallelism cuts them into equal parts."""
        if micro_batch.routes_TMK is None or micro_batch.has_routes_T is None:
            return None
        num_tokens = micro_batch.num_tokens // self._tensor_size
        part = slice(self._tensor_rank * num_tokens, (self._tensor_rank + 1) * num_tokens)
        return micro_batch.routes_TMK[part, layer], micro_batch.has_routes_T[part]
