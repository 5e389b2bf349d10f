"""Where a number stopped being finite: the update is computed once more, under observation.

Only after a loss or a gradient norm that is not finite, on all ranks together. Forward pass, loss and
backward pass are watched; the first place along their way is the culprit, the others follow from it.
Activations are recomputed as in the update, and a look at a tensor makes one number per row: the memory that
sufficed for the update suffices here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_drpo.config.schema import Config
from megatron_drpo.errors import NumericsError
from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.tokens import LossTokens
from megatron_drpo.policy.forward import ForwardObserver, LossRows
from megatron_drpo.policy.model import PolicyModel, unwrap
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.types import MicroBatch

_FORWARD, _LOSS, _BACKWARD, _WEIGHT_GRADIENT = range(4)
_MAX_IDS = 8
"""Sequences named in one message."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A place where values are not finite; sorts by the order in which an update visits places."""

    phase: int
    depth: int
    """Along the direction of the pass."""
    rank: int
    replica: int
    where: str
    sequence_ids: tuple[int, ...]


class WatchedPolicy(Protocol):
    """The parts of a `Policy` that the second computation needs."""

    config: Config
    parallel: ParallelState
    objective: Objective
    chunks: list[DistributedDataParallel]
    num_updates: int

    def forward_backward(
        self, micro_batches: list[MicroBatch], *, observer: ForwardObserver | None = None, again: bool = False
    ) -> object: ...


def find_non_finite(
    policy: WatchedPolicy, micro_batches: list[MicroBatch], loss: float, grad_norm: float
) -> NumericsError:
    """Compute an update's gradients again and say where they broke. Collective; the same on every rank.

    Args:
        micro_batches: this rank's share of the global batch.
        loss, grad_norm: what the update gave; one of them is not finite.
    """
    watch = _Watch(policy)
    with watch.attached():
        policy.forward_backward(micro_batches, observer=watch, again=True)
    watch.see_weight_gradients()
    gathered: list[list[Finding]] = [[] for _ in range(policy.parallel.world_size)]
    dist.all_gather_object(gathered, watch.findings)
    findings = sorted(finding for of_rank in gathered for finding in of_rank)
    what = f"update {policy.num_updates + 1}: loss {loss:g}, gradient norm {grad_norm:g}"
    if not findings:
        return NumericsError(f"{what}; computed again, both are finite: suspect the machine, not the data")
    first = findings[0]
    # Every sequence that is spoilt there, wherever its tokens are; ids are unique within a replica.
    place = (first.phase, first.where, first.replica)
    same_place = [f for f in findings if (f.phase, f.where, f.replica) == place]
    ids = [str(id_) for id_ in sorted({id_ for f in same_place for id_ in f.sequence_ids})]
    more = f" and {len(ids) - _MAX_IDS} more" if len(ids) > _MAX_IDS else ""
    sequences = f", sequence {', '.join(ids[:_MAX_IDS])}{more}" if ids else ""
    return NumericsError(f"{what}; not finite first: {first.where}, on rank {first.rank}{sequences}")


class _Watch:
    """Looks at every layer of this rank's chunks. An observer of `TrainForward`."""

    def __init__(self, policy: WatchedPolicy) -> None:
        self.findings: list[Finding] = []
        self._policy = policy
        self._current: MicroBatch | None = None
        self._begun: dict[int, MicroBatch] = {}
        """By the identity of their cu_seqlens."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on all layers."""
        with ExitStack() as stack:
            for chunk in self._policy.chunks:
                for name, depth, module in _places(unwrap(chunk)):
                    hook = module.register_forward_hook(self._hook(name, depth), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    def begins(self, micro_batch: MicroBatch) -> None:
        self._current = self._begun[id(micro_batch.cu_seqlens)] = micro_batch

    def sees(
        self, micro_batch: MicroBatch, rows: LossRows, tokens: LossTokens, entropy_N: torch.Tensor
    ) -> None:
        value_N = self._policy.objective.value(tokens, entropy_N) * rows.token_weights_N
        for where, values_N in (("the LM head's logprobs", tokens.logprobs_N), ("the loss", value_N)):
            rows_T = rows.logprobs.rows_N[~torch.isfinite(values_N)]
            if len(rows_T):
                self._report(_LOSS, 0, where, _sequences_at(micro_batch, rows_T))
                return

    def see_weight_gradients(self) -> None:
        """After the backward pass: accumulated gradients, which name no sequence any more."""
        for chunk in self._policy.chunks:
            numbers = {f"layers.{i}.": f"layers.{n}." for i, n in _layer_numbers(unwrap(chunk))}
            for name, parameter in unwrap(chunk).named_parameters():
                if not torch.isfinite(_largest(vars(parameter)["main_grad"].flatten(), 0)):
                    match = re.search(r"layers\.\d+\.", name)
                    where = name.replace(match[0], numbers[match[0]]) if match else name
                    self._report(_WEIGHT_GRADIENT, 0, f"the gradient of {where}", ())

    def _hook(self, name: str, depth: int) -> Any:
        def look(_: torch.nn.Module, __: object, kwargs: dict[str, Any], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            micro_batch = self._micro_batch(kwargs.get("packed_seq_params"))
            if micro_batch is None:
                return
            self._look(_FORWARD, depth, f"the output of {name}", hidden.detach(), micro_batch)
            if hidden.requires_grad:

                def look_back(gradient: torch.Tensor) -> None:
                    where = f"the gradient of {name}'s output"
                    self._look(_BACKWARD, -depth, where, gradient, micro_batch)

                hidden.register_hook(look_back)

        return look

    def _micro_batch(self, packed: PackedSeqParams | None) -> MicroBatch | None:
        """What a layer works on: in the backward pass, where it is recomputed, not the one begun last."""
        return self._current if packed is None else self._begun.get(id(packed.cu_seqlens_q), self._current)

    def _look(
        self, phase: int, depth: int, where: str, values: torch.Tensor, micro_batch: MicroBatch
    ) -> None:
        """[T or T / tp, 1, H] hidden states or their gradients."""
        rows = (~torch.isfinite(_largest(values.flatten(1), 1))).nonzero()[:, 0]
        if not len(rows):
            return
        if self._policy.config.parallel.sequence_parallel:
            rows = rows + self._policy.parallel.tensor_rank * len(values)
        self._report(phase, depth, where, _sequences_at(micro_batch, rows))

    def _report(self, phase: int, depth: int, where: str, sequence_ids: tuple[int, ...]) -> None:
        parallel = self._policy.parallel
        self.findings.append(Finding(phase, depth, parallel.rank, parallel.data_rank, where, sequence_ids))


def _largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest absolute value, NaN if there is one; unlike `isfinite` without tensors of the same size."""
    return torch.linalg.vector_norm(values, ord=torch.inf, dim=dim)


def _places(model: PolicyModel) -> Iterator[tuple[str, int, torch.nn.Module]]:
    """(name, depth, module) of what passes hidden states on; layers have their number in the whole model."""
    if model.pre_process:
        yield "the embedding", 0, model.embedding
    for index, number in _layer_numbers(model):
        yield f"layer {number}", number, model.decoder.layers[index]
    if model.decoder.final_layernorm is not None:
        norm: Any = model.decoder.final_layernorm
        yield "the final norm", model.config.num_layers + 1, norm


def _layer_numbers(model: PolicyModel) -> Iterator[tuple[int, int]]:
    """(index in this chunk, number in the whole model from 1)."""
    layers: Any = model.decoder.layers
    for index, layer in enumerate(layers):
        yield index, layer.layer_number


def _sequences_at(micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[int, ...]:
    """Ids of the sequences at these positions; padding has none."""
    indices = sorted(set(micro_batch.sequence_index_T[rows].tolist()))
    return tuple(micro_batch.sequence_ids[i] for i in indices if i < len(micro_batch.sequence_ids))
