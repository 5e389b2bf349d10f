"""Scored rollouts as training sequences, checked: what is no number ends here, not in the policy's weights.

N  response tokens of all rollouts, end to end       K  most probable ids per response token
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, repeat

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from megatron_drpo.batching.route_check import RouteCheck
from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.types import Origin, Prompt, Rollout, TrainSequence

MAX_LOGPROB = 1e-3
"""A logprob is at most 0, up to the rounding of an engine's 16-bit arithmetic."""
MAX_MASS = 1 + 1e-3
"""Likewise the probabilities of distinct ids add up to at most this."""


def build_sequences(
    rollouts: Sequence[Rollout],
    advantages: Float[Tensor, " S"],
    left_out: Sequence[bool],
    *,
    vocab_size: int,
    num_topk: int = 0,
    route_check: RouteCheck | None = None,
) -> list[TrainSequence]:
    """One training sequence per rollout; every response token gets its sample's advantage.

    A response without tokens becomes no sequence. Ids are positions among the rollouts. Each field is one
    tensor, cut up: a tensor of its own per rollout and field would cost more than packing.

    Args:
        advantages: one per rollout.
        left_out: where True, no token of the rollout has a loss.
        vocab_size: token ids must be below it.
        num_topk: K; the rollouts must have that many ids per token. 0: sequences without top-k.
        route_check: of the rollouts' routes; None: sequences without routes.

    Raises:
        RewardError: an advantage that is not finite.
        DataError: lengths that disagree, an id outside the vocabulary, a logprob that is not finite or is
            positive, top-k ids twice in a token's list or of a mass above 1; names sequence, line and token.
    """
    if not rollouts:
        return []
    _check_lengths(rollouts, num_topk)
    _check_advantages(rollouts, advantages)
    tokens = _ResponseTokens(rollouts)
    ids = [(*rollout.prompt.token_ids, *rollout.response_ids) for rollout in rollouts]
    tokens.check_ids(vocab_size)
    topk: Iterable[tuple[Tensor, Tensor] | tuple[None, None]] = repeat((None, None), len(rollouts))
    if num_topk:
        topk = zip(*map(tokens.split, tokens.topk(num_topk, vocab_size)), strict=True)
    columns = zip(
        torch.tensor([*chain.from_iterable(ids)]).split([len(ids_L) for ids_L in ids]),
        tokens.split(tokens.spread(advantages.float())),
        tokens.split(tokens.logprobs()),
        tokens.split(tokens.spread(~torch.tensor(left_out, dtype=torch.bool)) & tokens.sampled()),
        topk,
        strict=True,
    )
    return [
        TrainSequence(
            id=number,
            token_ids=ids_L,
            prompt_length=len(rollouts[number].prompt.token_ids),
            advantages=advantages_R,
            rollout_logprobs=logprobs_R,
            loss_mask=mask_R,
            topk_ids=topk_R[0],
            topk_logprobs=topk_R[1],
            routes=None if route_check is None else route_check.check(number, rollouts[number]),
            origin=_origin(rollouts[number]),
        )
        for number, (ids_L, advantages_R, logprobs_R, mask_R, topk_R) in enumerate(columns)
        if len(mask_R) > 0
    ]


def describe_prompt(prompt: Prompt) -> str:
    return f"prompt {prompt.id} (line {prompt.id + 1})"


def _origin(rollout: Rollout) -> Origin:
    where = f"{describe_prompt(rollout.prompt)}, sample {rollout.sample_index}"
    return Origin(where=where, servers=tuple(rollout.servers))


def _describe(number: int, rollout: Rollout) -> str:
    return f"sequence {number}, {_origin(rollout).where}"


def _check_lengths(rollouts: Sequence[Rollout], num_topk: int) -> None:
    for number, rollout in enumerate(rollouts):
        lengths = {
            "response_ids": len(rollout.response_ids),
            "rollout_logprobs": len(rollout.rollout_logprobs),
            "policy_versions": len(rollout.policy_versions),
        }
        if rollout.response_mask is not None:
            lengths["response_mask"] = len(rollout.response_mask)
        if num_topk:
            lengths["topk_ids"] = len(rollout.topk_ids or [])
            lengths["topk_logprobs"] = len(rollout.topk_logprobs or [])
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise DataError(f"{_describe(number, rollout)}: lengths disagree: {told}")
        if num_topk:
            for name, rows in (("topk_ids", rollout.topk_ids), ("topk_logprobs", rollout.topk_logprobs)):
                position = next((p for p, row in enumerate(rows or []) if len(row) != num_topk), None)
                if position is not None:
                    raise DataError(
                        f"{_describe(number, rollout)}, response token {position}: {name} has "
                        f"{len((rows or [])[position])} entries, the loss needs {num_topk}"
                    )


def _check_advantages(rollouts: Sequence[Rollout], advantages: Float[Tensor, " S"]) -> None:
    for number, is_finite in enumerate(advantages.isfinite().tolist()):
        if not is_finite:
            raise RewardError(
                f"{_describe(number, rollouts[number])}: its advantage is {advantages[number].item()}: a "
                "reward of its group is not a number, or too large for float32"
            )


class _ResponseTokens:
    """The response tokens of all rollouts, end to end."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._rollouts = rollouts
        self._lengths = [len(rollout.response_ids) for rollout in rollouts]

    def split(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """One part per rollout of values per token, [N] or [N, K]."""
        return values_N.split(self._lengths)

    def spread(self, values_S: Shaped[Tensor, " S"]) -> Shaped[Tensor, " N"]:
        """A value per rollout as a value per token."""
        return values_S.repeat_interleave(torch.tensor(self._lengths))

    def check_ids(self, vocab_size: int) -> None:
        ids_N = torch.tensor(
            [*chain.from_iterable(r.response_ids for r in self._rollouts)], dtype=torch.int64
        )
        self._refuse(
            (ids_N < 0) | (ids_N >= vocab_size),
            lambda n: f"the id {int(ids_N[n])} is not in 0..{vocab_size - 1}",
        )

    def sampled(self) -> Bool[Tensor, " N"]:
        """Where the policy sampled the token."""
        masks = (
            rollout.response_mask or repeat(True, len(rollout.response_ids)) for rollout in self._rollouts
        )
        return torch.tensor([*chain.from_iterable(masks)], dtype=torch.bool)

    def logprobs(self) -> Float[Tensor, " N"]:
        """float32, checked."""
        flat = chain.from_iterable(rollout.rollout_logprobs for rollout in self._rollouts)
        logprobs_N = torch.tensor([*flat], dtype=torch.float32)
        self._refuse(_is_no_logprob(logprobs_N), lambda n: f"its logprob is {logprobs_N[n].item():g}")
        return logprobs_N

    def topk(self, num_topk: int, vocab_size: int) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Ids (int64) and logprobs (float32), checked."""
        rows = chain.from_iterable(rollout.topk_ids or [] for rollout in self._rollouts)
        ids_NK = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64).view(-1, num_topk)
        rows = chain.from_iterable(rollout.topk_logprobs or [] for rollout in self._rollouts)
        logprobs_NK = torch.tensor([*chain.from_iterable(rows)], dtype=torch.float32).view(-1, num_topk)
        self._refuse(
            ((ids_NK < 0) | (ids_NK >= vocab_size)).any(1),
            lambda n: f"its top-k ids {ids_NK[n].tolist()} are not all in 0..{vocab_size - 1}",
        )
        self._refuse(
            (ids_NK.sort(1).values.diff(dim=1) == 0).any(1),
            lambda n: f"its top-k ids {ids_NK[n].tolist()} are not distinct",
        )
        self._refuse(
            _is_no_logprob(logprobs_NK).any(1),
            lambda n: f"its top-k logprobs are {logprobs_NK[n].tolist()}",
        )
        mass_N = logprobs_NK.exp().sum(1)
        self._refuse(mass_N > MAX_MASS, lambda n: f"its top-k probabilities add up to {mass_N[n].item():g}")
        return ids_NK, logprobs_NK

    def _refuse(self, wrong_N: Bool[Tensor, " N"], problem: Callable[[int], str]) -> None:
        """Raise a DataError that names the first token that is wrong, if one is."""
        if not wrong_N.any():
            return
        n = int(wrong_N.nonzero()[0])
        ends = list(accumulate(self._lengths))
        number = bisect_right(ends, n)
        position = n - ends[number] + self._lengths[number]
        where = f"{_describe(number, self._rollouts[number])}, response token {position}"
        raise DataError(f"{where}: {problem(n)}")


def _is_no_logprob(values: Tensor) -> Tensor:
    return ~values.isfinite() | (values > MAX_LOGPROB)
