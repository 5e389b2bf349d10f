"""The JSON of requests and responses, in SGLang's shapes; unknown keys of a request are ignored.

https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/managers/io_struct.py (GenerateReqInput) and
https://docs.sglang.io/basic_usage/sampling_params.html.
"""

from __future__ import annotations

import base64
import math
import secrets
import uuid
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int

from megatron_drpo.embedded_server.sampling import SamplingParams
from megatron_drpo.errors import RolloutError

T = TypeVar("T", int, float, bool, str)


class BadRequest(RolloutError, ValueError):
    """A request the server refuses: HTTP 400."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request must respect."""

    vocab_size: int
    max_tokens: int
    """Prompt and response together."""
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response to generate."""

    rid: str
    prompt: tuple[int, ...]
    params: SamplingParams
    return_routes: bool = False
    """Report the experts of every token of prompt and response but the last."""


@dataclass(slots=True)
class SampleResult:
    """One generated response; incomplete until `finish_reason` is set."""

    request: SampleRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk_logprobs: list[list[float]] = field(default_factory=list)
    """Of each token, `params.num_topk` of them, descending."""
    topk_ids: list[list[int]] = field(default_factory=list)
    version_spans: list[tuple[str, int, int]] = field(default_factory=list)
    """(weight version, first token, end), without gaps."""
    routes: list[torch.Tensor] = field(default_factory=list)
    """[_, layers, K] each, one after the other: experts of the tokens so far, if they were asked for."""
    finish_reason: dict[str, Any] | None = None
    is_aborted: bool = False
    """It ends with its next token, whatever that is."""

    def close_span(self, version: str) -> None:
        """Attribute all tokens since the last span to `version`; a span may be empty only if it is alone."""
        start = self.version_spans[-1][2] if self.version_spans else 0
        is_alone = self.finish_reason is not None and not self.version_spans
        if len(self.token_ids) > start or is_alone:
            self.version_spans.append((version, start, len(self.token_ids)))

    def add_routes(self, routes: Int[torch.Tensor, "_ layers K"]) -> None:
        """Experts of the next tokens; kept if they were asked for."""
        if self.request.return_routes:
            self.routes.append(routes)


def parse_generate(body: dict[str, Any], limits: ModelLimits) -> tuple[list[SampleRequest], bool]:
    """The samples of a /generate body, and whether it was a batch (list of lists).

    Raises:
        BadRequest: names the sample and the key.
    """
    input_ids = body.get("input_ids")
    if not isinstance(input_ids, list) or not input_ids:
        raise BadRequest("input_ids is missing: give a list of token ids, or a list of such lists")
    is_batch = isinstance(input_ids[0], list)
    prompts: list[Any] = input_ids if is_batch else [input_ids]
    rids = _rids(body.get("rid"), len(prompts), is_batch)
    params = body.get("sampling_params") or {}
    per_sample = params if isinstance(params, list) else [params] * len(prompts)
    if len(per_sample) != len(prompts):
        raise BadRequest(f"{len(prompts)} prompts, but {len(per_sample)} sampling_params")
    topk = _topk(body.get("top_logprobs_num"), len(prompts), limits)
    return_routes = bool(body.get("return_routed_experts"))
    return [
        replace(_parse_sample(rid, prompt, sample_params, num_topk, limits), return_routes=return_routes)
        for rid, prompt, sample_params, num_topk in zip(rids, prompts, per_sample, topk, strict=True)
    ], is_batch


def render_result(result: SampleResult, seconds: float) -> dict[str, Any]:
    """One response of /generate. As SGLang without a tokenizer: `output_ids` and no `text`."""
    assert result.finish_reason is not None
    spans = [{"version": version, "start": start, "end": end} for version, start, end in result.version_spans]
    meta_info = {
        "id": result.request.rid,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.request.prompt),
        "completion_tokens": len(result.token_ids),
        "cached_tokens": 0,
        "weight_version": spans[-1]["version"],
        "weight_versions": spans,
        "output_token_logprobs": _entries(result.logprobs, result.token_ids),
        "e2e_latency": seconds,
    }
    if result.request.params.num_topk:
        rows = zip(result.topk_logprobs, result.topk_ids, strict=True)
        meta_info["output_top_logprobs"] = [_entries(logprobs, ids) for logprobs, ids in rows]
    if result.routes:
        routes = torch.cat(result.routes).to(torch.int32)
        meta_info["routed_experts"] = base64.b64encode(routes.numpy().tobytes()).decode()
    return {"output_ids": result.token_ids, "meta_info": meta_info}


def _entries(logprobs: list[float], ids: list[int]) -> list[list[Any]]:
    """SGLang's triples of logprob, id and text; no text without a tokenizer."""
    return [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]


def _rids(rid: object, num_prompts: int, is_batch: bool) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(num_prompts)]
    if isinstance(rid, str):
        return [f"{rid}_{i}" for i in range(num_prompts)] if is_batch else [rid]
    if not isinstance(rid, list) or len(rid) != num_prompts:
        raise BadRequest(f"rid must be a string or a list of {num_prompts} strings")
    return [str(item) for item in rid]


def _topk(value: object, num_prompts: int, limits: ModelLimits) -> list[int]:
    """`top_logprobs_num`: one number for all samples, or one each."""
    numbers: list[Any] = value if isinstance(value, list) else [value or 0] * num_prompts
    if len(numbers) != num_prompts or not all(
        type(number) is int and 0 <= number <= limits.vocab_size for number in numbers
    ):
        raise BadRequest(
            f"top_logprobs_num={value!r} must be a number in 0..{limits.vocab_size}, or a list of "
            f"{num_prompts} of them"
        )
    return numbers


def _parse_sample(
    rid: str, prompt: object, params: object, num_topk: int, limits: ModelLimits
) -> SampleRequest:
    if not isinstance(prompt, list) or not prompt or not all(type(item) is int for item in prompt):
        raise BadRequest(f"request {rid}: input_ids must be a non-empty list of integers")
    outside = [item for item in prompt if not 0 <= item < limits.vocab_size]
    if outside:
        raise BadRequest(f"request {rid}: input id {outside[0]} is outside 0..{limits.vocab_size - 1}")
    if not isinstance(params, dict):
        raise BadRequest(f"request {rid}: sampling_params must be an object")
    parsed = _parse_params(rid, params, num_topk, limits)
    if len(prompt) + parsed.max_new_tokens > limits.max_tokens:
        raise BadRequest(
            f"request {rid}: {len(prompt)} prompt tokens + max_new_tokens {parsed.max_new_tokens} "
            f"exceed the model's {limits.max_tokens} positions"
        )
    return SampleRequest(rid, tuple(prompt), parsed)


def _parse_params(rid: str, params: dict[str, Any], num_topk: int, limits: ModelLimits) -> SamplingParams:
    stops = params.get("stop_token_ids") or []
    if not isinstance(stops, list) or not all(type(item) is int for item in stops):
        raise BadRequest(f"request {rid}: stop_token_ids must be a list of integers")
    parsed = SamplingParams(
        max_new_tokens=_value(rid, params, "max_new_tokens", int, 128),
        temperature=_value(rid, params, "temperature", float, 1.0),
        top_p=_value(rid, params, "top_p", float, 1.0),
        top_k=_value(rid, params, "top_k", int, -1),
        seed=_value(rid, params, "sampling_seed", int, secrets.randbits(63)),
        stop_token_ids=frozenset()
        if _value(rid, params, "ignore_eos", bool, False)
        else limits.eos_token_ids.union(stops),
        num_topk=num_topk,
    )
    rules = {
        f"max_new_tokens={parsed.max_new_tokens} must be at least 1": parsed.max_new_tokens >= 1,
        f"temperature={parsed.temperature} must be finite and not negative": 0
        <= parsed.temperature
        < math.inf,
        f"top_p={parsed.top_p} must be in (0, 1]": 0 < parsed.top_p <= 1,
        f"top_k={parsed.top_k} must be -1 or at least 1": parsed.top_k == -1 or parsed.top_k >= 1,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise BadRequest(f"request {rid}: {'; '.join(broken)}")
    return parsed


def _value(rid: str, params: dict[str, Any], key: str, kind: type[T], default: T) -> T:
    value = params.get(key)
    if value is None:
        return default
    if kind is float and type(value) is int:
        return kind(value)
    if type(value) is not kind:
        raise BadRequest(f"request {rid}: {key}={value!r} must be of type {kind.__name__}")
    return value
