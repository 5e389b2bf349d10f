"""From one response object of SGLang's /generate to checked tokens, logprobs and policy versions.

All logprobs, the sampled token's and the top-k, must be of one distribution: the whole vocabulary's at the
request's temperature, before top-k and top-p. That is what SGLang reports by default. A server started with
SGLANG_RETURN_ORIGINAL_LOGPROB=1 reports them at temperature 1 instead: right for rollout.temperature=1 only.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_drpo.batching.route_check import find_route_problem
from megatron_drpo.batching.sequences import MAX_LOGPROB, MAX_MASS
from megatron_drpo.config.schema import OnBadRoutes
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.answer import Answer, shorten
from megatron_drpo.rollout.client import SampleRequest
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
    """The most probable ids, if they were asked for."""
    topk_logprobs: list[list[float]] | None = None
    routes: Routes | None = None
    """[L-1, M, K] of the whole context and the response, if they were asked for."""
    abort_message: str = ""
    """Why it was aborted, in the server's words."""

    def first(self, num_tokens: int, finish_reason: FinishReason) -> Completion:
        """Its first tokens, with what belongs to them."""
        num_dropped = len(self.token_ids) - num_tokens
        return replace(
            self,
            token_ids=self.token_ids[:num_tokens],
            logprobs=self.logprobs[:num_tokens],
            policy_versions=self.policy_versions[:num_tokens],
            finish_reason=finish_reason,
            topk_ids=None if self.topk_ids is None else self.topk_ids[:num_tokens],
            topk_logprobs=None if self.topk_logprobs is None else self.topk_logprobs[:num_tokens],
            routes=None if self.routes is None else self.routes[: len(self.routes) - num_dropped],
        )


@dataclass(frozen=True, slots=True)
class RouteShape:
    """Of what a server says of its experts."""

    moe_layers: tuple[int, ...]
    """Indices of the mixture-of-experts layers; the server counts all layers."""
    num_layers: int
    num_experts: int
    num_experts_per_token: int
    on_bad: OnBadRoutes = OnBadRoutes.error
    """fallback: routes that cannot be right are as if there were none."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.num_experts <= 256 else torch.int16


class WrongVersionError(RolloutError):
    """A server sampled with weights that it should not have: its tokens must not be used."""


_MIN_LOGPROB = torch.finfo(torch.float32).min
"""What SGLang reports where a probability underflows."""
_MAX_VERSION_DIGITS = 18


def parse_completion(
    response: Any,
    *,
    request: SampleRequest,
    oldest_version: int,
    newest_version: int,
    where: str,
    vocab_size: int,
    num_topk: int = 0,
    route_shape: RouteShape | None = None,
) -> Completion:
    """Check one response, field by field.

    Args:
        request: what it answers.
        oldest_version: the policy version that the request was sent for; no token may be older.
        newest_version: no server may be ahead of it.
        where: server and request, for messages.
        vocab_size: every sampled id must be below it.
        num_topk: `top_logprobs_num` of the request.
        route_shape: of the routed experts, if they were asked for.

    Raises:
        WrongVersionError: a token of an older, newer or unknown version.
        RolloutError: a field that is missing, malformed or cannot be true: the answer to another request,
            more tokens than were asked for, tokens behind a stop id, lengths that disagree, an id outside the
            vocabulary, a logprob that is not finite or is positive. Names the field and its value.
    """
    answer = Answer(response, where)
    meta = answer.nested("meta_info")
    token_ids = answer.get("output_ids", list)
    _check_request(meta, request)
    for index, token_id in enumerate(token_ids):
        if not _is_id(token_id, vocab_size):
            expected = f"an id in 0..{vocab_size - 1}: the server has another model"
            raise answer.lie(f"output_ids[{index}]", token_id, expected)
    completion = Completion(
        token_ids,
        _logprobs(meta, token_ids),
        _policy_versions(meta, len(token_ids), (oldest_version, newest_version)),
        _finish_reason(answer, meta, token_ids, request),
        *(_topk(meta, len(token_ids), num_topk, vocab_size) if num_topk else (None, None)),
        None if route_shape is None else _routes(meta, route_shape, len(request.token_ids) + len(token_ids)),
        meta.nested("finish_reason").find("message", str) or "",
    )
    if meta.get("completion_tokens", int) != len(token_ids):
        raise meta.lie("completion_tokens", meta.raw("completion_tokens"), f"{len(token_ids)}, as output_ids")
    return completion


def _is_id(value: object, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and _MIN_LOGPROB <= value <= MAX_LOGPROB


def _check_request(meta: Answer, request: SampleRequest) -> None:
    """It is the answer to this request, and of the whole prompt; SGLang says neither of what never ran."""
    rid, prompt_tokens = meta.find("id", str), meta.find("prompt_tokens", int)
    if rid not in (None, request.rid):
        raise meta.lie("id", rid, f"{request.rid!r}: the answers are in another order than the requests")
    if prompt_tokens not in (None, len(request.token_ids)):
        raise meta.lie("prompt_tokens", prompt_tokens, f"{len(request.token_ids)}, as were sent")


def _finish_reason(
    answer: Answer, meta: Answer, token_ids: list[int], request: SampleRequest
) -> FinishReason:
    """Why it ended; whether the tokens agree. Those of an abort may be too many: an aborted request takes all
    that its last step brings, several with speculative decoding, unchecked (`Sample.add` cuts them off).

    Source: sglang 0.5.23, srt/managers/schedule_batch.py, Req.update_finish_state.
    """
    reason = meta.nested("finish_reason")
    kind, matched = reason.get("type", str), reason.raw("matched")
    if kind not in FinishReason.__members__:
        raise reason.lie("type", kind, ", ".join(FinishReason))
    if kind == FinishReason.abort:
        return FinishReason.abort
    if not token_ids:
        raise answer.lie("output_ids", token_ids, f"tokens, as the finish reason is {kind!r}")
    limit = request.sampling_params["max_new_tokens"]
    if len(token_ids) > limit:
        raise answer.lie("output_ids", token_ids, f"{limit} tokens at most, got {len(token_ids)}")
    stops = set(request.sampling_params.get("stop_token_ids", ()))
    position = next((i for i, token in enumerate(token_ids[:-1]) if token in stops), None)
    if position is not None:
        raise answer.lie(f"output_ids[{position}]", token_ids[position], "no token behind that stop id")
    # SGLang puts a stop id in the place of a token whose logits were NaN, and says so here.
    if kind == FinishReason.stop and (
        type(matched) is str or (type(matched) is int and matched != token_ids[-1])
    ):
        raise reason.lie("matched", matched, f"the last token, {token_ids[-1]}")
    return FinishReason(kind)


def _logprobs(meta: Answer, token_ids: list[int]) -> list[float]:
    """Of the sampled tokens, from [logprob, id, text] of each."""
    entries = meta.get("output_token_logprobs", list)
    if len(entries) != len(token_ids):
        expected = f"one entry for each of the {len(token_ids)} output_ids, got {len(entries)}"
        raise meta.lie("output_token_logprobs", entries, expected)
    for index, (entry, token_id) in enumerate(zip(entries, token_ids, strict=True)):
        field = f"output_token_logprobs[{index}]"
        if type(entry) is not list or len(entry) < 2:
            raise meta.lie(field, entry, "[logprob, id, text]")
        if not _is_logprob(entry[0]):
            raise meta.lie(f"{field}[0]", entry[0], f"a finite logprob of at most {MAX_LOGPROB:g}")
        if type(entry[1]) is not int or entry[1] != token_id:
            raise meta.lie(f"{field}[1]", entry[1], f"{token_id}, as output_ids[{index}]")
    return [float(entry[0]) for entry in entries]


def _topk(
    meta: Answer, num_tokens: int, num_topk: int, vocab_size: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and logprobs, [tokens][num_topk] each, from rows of [logprob, id, text]."""
    rows = meta.find("output_top_logprobs", list) or []
    if len(rows) != num_tokens:
        expected = f"a row for each of the {num_tokens} tokens, got {len(rows)}"
        raise meta.lie(
            "output_top_logprobs", rows, f"{expected}; the request has top_logprobs_num={num_topk}"
        )
    for index, row in enumerate(rows):
        if (problem := _topk_problem(row, num_topk, vocab_size)) is not None:
            raise meta.lie(f"output_top_logprobs[{index}]", row, problem)
    ids = [[entry[1] for entry in row] for row in rows]
    return ids, [[float(entry[0]) for entry in row] for row in rows]


def _topk_problem(row: Any, num_topk: int, vocab_size: int) -> str | None:
    """What a row should be, if it is not."""
    if type(row) is not list or len(row) != num_topk:
        return f"{num_topk} entries, as the request has top_logprobs_num={num_topk}"
    for entry in row:
        if type(entry) is not list or len(entry) < 2:
            return "entries [logprob, id, text]"
        if not _is_logprob(entry[0]):
            return f"finite logprobs of at most {MAX_LOGPROB:g}"
        if not _is_id(entry[1], vocab_size):
            return f"ids in 0..{vocab_size - 1}"
    if len({entry[1] for entry in row}) < num_topk:
        return "distinct ids"
    if sum(math.exp(entry[0]) for entry in row) > MAX_MASS:
        return "probabilities that add up to at most 1"
    return None


def _routes(meta: Answer, shape: RouteShape, num_tokens: int) -> Routes | None:
    """From base64 of int32 [L-1, layers, K], L being `num_tokens`; None if the server says nothing, or
    nothing of use and `shape.on_bad` is fallback."""
    encoded = meta.raw("routed_experts")
    if encoded is None:
        return None
    try:
        values = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.int32)
        rows = values.view(-1, shape.num_layers, shape.num_experts_per_token)[:, list(shape.moe_layers)]
    except (TypeError, ValueError, RuntimeError) as error:
        rows, form = None, f"[_, {shape.num_layers}, {shape.num_experts_per_token}]"
        problem = f"base64 of int32 {form}: {error}"
    else:
        problem = find_route_problem(rows, shape.num_experts, num_tokens)
    if rows is not None and problem is None:
        return rows.to(shape.dtype)
    if shape.on_bad is OnBadRoutes.fallback:
        return None
    hint = "policy.on_bad_routes=fallback lets the router choose for such a response"
    raise meta.lie("routed_experts", encoded, f"{problem}. {hint}")


def _policy_versions(meta: Answer, num_tokens: int, allowed: tuple[int, int]) -> list[int]:
    """Per token, from the spans of versions if there are any, else from the one version."""
    if not meta.find("weight_versions", list):
        return [_version(meta, "weight_version", allowed)] * num_tokens
    versions: list[int] = []
    for span in meta.objects("weight_versions"):
        version = _version(span, "version", allowed)
        start, end = span.get("start", int), span.get("end", int)
        if start != len(versions):
            raise span.lie("start", start, f"{len(versions)}, where the span before it ends")
        if not start <= end <= num_tokens:
            raise span.lie("end", end, f"a position in {start}..{num_tokens}")
        versions += [version] * (end - start)
    if len(versions) != num_tokens:
        spans = meta.raw("weight_versions")
        raise meta.lie("weight_versions", spans, f"spans that cover the {num_tokens} tokens")
    return versions


def _version(fields: Answer, key: str, allowed: tuple[int, int]) -> int:
    """SGLang's versions are texts; ours are numbers."""
    value = fields.raw(key)
    text = str(value) if type(value) is int else value
    is_number = type(text) is str and text.isascii() and text.isdecimal() and len(text) <= _MAX_VERSION_DIGITS
    if not is_number or not allowed[0] <= int(text) <= allowed[1]:
        raise WrongVersionError(
            f"{fields.where}: {fields.name(key)}: weight version {shorten(value)}; the request is for "
            f"versions {allowed[0]}..{allowed[1]}, and no other token is used"
        )
    return int(text)
