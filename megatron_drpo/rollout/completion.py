"""From one response object of SGLang's /generate to checked tokens, logprobs and policy versions.

All logprobs, the sampled token's and the top-k, must be of one distribution: the whole vocabulary's at the
request's temperature, before top-k and top-p. That is what SGLang reports by default. A server started with
SGLANG_RETURN_ORIGINAL_LOGPROB=1 reports them at temperature 1 instead: right for rollout.temperature=1 only.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_drpo.errors import RolloutError
from megatron_drpo.sequences import MAX_LOGPROB
from megatron_drpo.types import FinishReason

if TYPE_CHECKING:
    from megatron_drpo.types import Routes


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server sampled; the lists have one entry per response token."""

    token_ids: list[int]
    logprobs: list[float]
    policy_versions: list[int]
    finish_reason: FinishReason
    topk_ids: list[list[int]] | None = None
    """The most probable ids, if they were asked for; their values are checked with the whole step's."""
    topk_logprobs: list[list[float]] | None = None
    routes: Routes | None = None
    """[L-1, M, K] of the whole context and the response, if they were asked for; the ids are checked with the
    whole step's."""


@dataclass(frozen=True, slots=True)
class RouteShape:
    """Of what a server says of its experts."""

    moe_layers: tuple[int, ...]
    """Indices of the mixture-of-experts layers; the server counts all layers."""
    num_layers: int
    num_experts: int
    num_experts_per_token: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.num_experts <= 256 else torch.int16


class WrongVersionError(RolloutError):
    """A server sampled with weights that it should not have: its tokens must not be used."""


def parse_completion(
    response: Any,
    *,
    oldest_version: int,
    newest_version: int,
    where: str,
    vocab_size: int,
    num_topk: int = 0,
    route_shape: RouteShape | None = None,
) -> Completion:
    """Check one response.

    Args:
        oldest_version: the policy version that the request was sent for; no token may be older.
        newest_version: no server may be ahead of it.
        where: server and request, for messages.
        vocab_size: every sampled id must be below it.
        num_topk: `top_logprobs_num` of the request.
        route_shape: of the routed experts, if they were asked for.

    Raises:
        WrongVersionError: a token of an older, newer or unknown version.
        RolloutError: fields that are missing, lengths that disagree, an id outside the vocabulary, a logprob
            that is not finite or is positive.
    """
    try:
        meta = response["meta_info"]
        token_ids = [int(entry[1]) for entry in meta["output_token_logprobs"]]
        logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"]]
        lengths = {len(token_ids), int(meta["completion_tokens"]), len(response["output_ids"])}
        finish_reason = FinishReason(meta["finish_reason"]["type"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RolloutError(f"{where}: malformed response: {type(error).__name__}: {error}") from error
    if len(lengths) != 1 or response["output_ids"] != token_ids:
        raise RolloutError(
            f"{where}: {len(response['output_ids'])} output_ids, {len(token_ids)} output_token_logprobs and "
            f"completion_tokens={meta['completion_tokens']} disagree"
        )
    for index, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        if not 0 <= token_id < vocab_size:
            raise RolloutError(
                f"{where}: response token {index} is the id {token_id}, which is not in 0..{vocab_size - 1}: "
                "the server has another model"
            )
        if not math.isfinite(logprob) or logprob > MAX_LOGPROB:
            raise RolloutError(f"{where}: the logprob of response token {index} is {logprob}")
    versions = _policy_versions(meta, len(token_ids), (oldest_version, newest_version), where)
    topk = _topk(meta, len(token_ids), num_topk, where) if num_topk else (None, None)
    routes = None if route_shape is None else _routes(meta, route_shape, where)
    return Completion(token_ids, logprobs, versions, finish_reason, *topk, routes)


def _routes(meta: dict[str, Any], shape: RouteShape, where: str) -> Routes | None:
    """From base64 of int32 [L-1, layers, K]; None if the server says nothing.

    Raises:
        RolloutError: not of this form: the server has another model.
    """
    encoded = meta.get("routed_experts")
    if encoded is None:
        return None
    size = (shape.num_layers, shape.num_experts_per_token)
    try:
        values = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.int32)
        rows = values.view(-1, *size)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RolloutError(
            f"{where}: routed_experts are not int32 [_, {size[0]}, {size[1]}]: {error}"
        ) from error
    chosen = rows[:, list(shape.moe_layers)]
    if ((chosen < 0) | (chosen >= shape.num_experts)).any():
        return chosen.to(torch.int16)  # the check of the whole step names the token
    return chosen.to(shape.dtype)


def _topk(
    meta: dict[str, Any], num_tokens: int, num_topk: int, where: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and logprobs, [tokens][num_topk] each, from rows of [logprob, id, text]."""
    rows = meta.get("output_top_logprobs") or []
    try:
        ids = [[int(entry[1]) for entry in row] for row in rows]
        logprobs = [[float(entry[0]) for entry in row] for row in rows]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RolloutError(
            f"{where}: malformed output_top_logprobs: {type(error).__name__}: {error}"
        ) from error
    if len(ids) != num_tokens:
        raise RolloutError(
            f"{where}: output_top_logprobs are of {len(ids)} tokens, the response has {num_tokens}; the "
            f"request asked for top_logprobs_num={num_topk}"
        )
    for index, row in enumerate(ids):
        if len(row) != num_topk:
            raise RolloutError(
                f"{where}: output_top_logprobs of response token {index} has {len(row)} ids; the request "
                f"asked for top_logprobs_num={num_topk}"
            )
    return ids, logprobs


def _policy_versions(
    meta: dict[str, Any], num_tokens: int, allowed: tuple[int, int], where: str
) -> list[int]:
    """Per token, from the spans of versions if there are any, else from the one version."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": num_tokens}
    ]
    versions: list[int] = []
    for span in spans:
        version = str(span["version"])
        if not version.isdecimal() or not allowed[0] <= int(version) <= allowed[1]:
            raise WrongVersionError(
                f"{where}: weight version {span['version']!r}; the request is for versions "
                f"{allowed[0]}..{allowed[1]}, and no other token is used"
            )
        if span["start"] != len(versions):
            break
        versions += [int(version)] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise RolloutError(f"{where}: the version spans {spans} do not cover the {num_tokens} tokens")
    return versions
