"""Routes that are missing or cannot be right."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_drpo.batching.packing import pack
from megatron_drpo.batching.route_check import RouteCheck
from megatron_drpo.batching.sequences import build_sequences
from megatron_drpo.config.schema import OnBadRoutes
from megatron_drpo.errors import DataError, RolloutError
from megatron_drpo.rollout.client import SampleRequest
from megatron_drpo.rollout.completion import RouteShape, parse_completion
from megatron_drpo.types import FinishReason, Prompt, Rollout

ROUTES = torch.tensor([[[0, 1], [2, 3]], [[3, 0], [1, 0]], [[1, 2], [0, 3]]], dtype=torch.uint8)
"""Of 3 of 4 tokens, in 2 layers, 2 of 4 experts."""


def make_rollout(routes: torch.Tensor | None) -> Rollout:
    return Rollout(
        prompt=Prompt(id=6, text="", token_ids=(5, 6)),
        sample_index=1,
        response_ids=[7, 8],
        rollout_logprobs=[-1.0, -2.0],
        policy_versions=[0, 0],
        finish_reason=FinishReason.stop,
        text="",
        routes=routes,
    )


def spoilt(token: int, layer: int, experts: list[int]) -> torch.Tensor:
    routes = ROUTES.to(torch.int16).clone()
    routes[token, layer] = torch.tensor(experts, dtype=torch.int16)
    return routes


@pytest.mark.parametrize(
    ("routes", "problem"),
    [
        (None, "the server reported no routed experts: start it with --enable-return-routed-experts"),
        (ROUTES[:2], "expected routes of 3 tokens, all but the last one, got 2"),
        (
            spoilt(2, 1, [4, 0]),
            r"expected distinct experts of 0\.\.3, got \[4, 0\] of token 2 in mixture-of-experts layer 1",
        ),
        (
            spoilt(0, 0, [-1, 0]),
            r"expected distinct .* got \[-1, 0\] of token 0 in mixture-of-experts layer 0",
        ),
        (spoilt(1, 0, [3, 3]), r"expected distinct .* got \[3, 3\] of token 1 in mixture-of-experts layer 0"),
    ],
)
def test_bad_routes_are_named_or_left_to_the_router(routes: torch.Tensor | None, problem: str) -> None:
    rollout = make_rollout(routes)
    strict = RouteCheck(num_experts=4, on_bad=OnBadRoutes.error)
    with pytest.raises(DataError, match=rf"^sequence 5, prompt 6 \(line 7\), sample 1: {problem}"):
        strict.check(5, rollout)
    assert RouteCheck(num_experts=4, on_bad=OnBadRoutes.fallback).check(5, rollout) is None
    assert strict.check(5, make_rollout(ROUTES)) is ROUTES


def test_routes_are_packed_where_their_tokens_are() -> None:
    """The last token of a sequence, a sequence without routes and padding are left to the router."""
    check = RouteCheck(num_experts=4, on_bad=OnBadRoutes.fallback)
    rollouts = [make_rollout(ROUTES), make_rollout(None), make_rollout(ROUTES)]
    sequences = build_sequences(rollouts, torch.ones(3), [False] * 3, vocab_size=10, route_check=check)
    batch = pack(sequences, [torch.ones(2)] * 3, pad_to_multiple=16)
    assert batch.routes_TMK is not None
    assert batch.has_routes_T is not None
    assert batch.routes_TMK.dtype is torch.uint8
    assert batch.has_routes_T.tolist() == [True] * 3 + [False] * 5 + [True] * 3 + [False] * 5
    assert torch.equal(batch.routes_TMK[0:3], ROUTES)
    assert torch.equal(batch.routes_TMK[8:11], ROUTES)
    plain = pack(
        build_sequences(rollouts, torch.ones(3), [False] * 3, vocab_size=10),
        [torch.ones(2)] * 3,
        pad_to_multiple=16,
    )
    assert plain.routes_TMK is plain.has_routes_T is None


SHAPE = RouteShape(moe_layers=(0, 2), num_layers=3, num_experts=4, num_experts_per_token=2)


REQUEST = SampleRequest(rid="r", token_ids=(8, 9), sampling_params={"max_new_tokens": 1})


def parse(encoded: str | None, shape: RouteShape = SHAPE) -> Any:
    """The routes of an answer of one token to a prompt of two."""
    meta = {
        "completion_tokens": 1,
        "finish_reason": {"type": "stop"},
        "weight_version": "0",
        "output_token_logprobs": [[-0.5, 5, None]],
        "routed_experts": encoded,
    }
    response = {"output_ids": [5], "meta_info": meta}
    return parse_completion(
        response,
        request=REQUEST,
        oldest_version=0,
        newest_version=0,
        where="here",
        vocab_size=10,
        route_shape=shape,
    ).routes


def encode(values: torch.Tensor) -> str:
    return base64.b64encode(values.to(torch.int32).numpy().tobytes()).decode()


def test_a_server_tells_all_layers_and_those_with_experts_are_kept() -> None:
    values = torch.tensor([[[0, 1], [9, 9], [2, 3]], [[3, 2], [9, 9], [1, 0]]])
    routes = parse(encode(values))
    assert routes.dtype is torch.uint8
    assert routes.tolist() == [[[0, 1], [2, 3]], [[3, 2], [1, 0]]]
    assert parse(None) is None
    wide = RouteShape(moe_layers=(0, 2), num_layers=3, num_experts=300, num_experts_per_token=2)
    assert parse(encode(values + 256), wide).tolist() == [[[256, 257], [258, 259]], [[259, 258], [257, 256]]]


GOOD = torch.tensor([[[0, 1], [9, 9], [2, 3]], [[3, 2], [9, 9], [1, 0]]])


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        ("", r"is ''; expected base64 of int32 \[_, 3, 2\]"),
        ("AAAA", r"is 'AAAA'; expected base64 of int32 \[_, 3, 2\]"),
        (encode(torch.zeros(5)), r"is 'A+='; expected base64 of int32 \[_, 3, 2\]"),
        (7, "is 7; expected base64 of int32"),
        (encode(GOOD[:1]), "expected routes of 2 tokens, all but the last one, got 1"),
        (encode(GOOD[[0, 1, 1]]), "expected routes of 2 tokens, all but the last one, got 3"),
        (
            encode(GOOD - 4),
            r"expected distinct experts of 0\.\.3, got \[-4, -3\] of token 0 in mixture-of-experts ",
        ),
        (encode(GOOD + 256), r"got \[256, 257\] of token 0 in mixture-of-experts layer 0"),
        (encode(GOOD // 2), r"got \[0, 0\] of token 0 in mixture-of-experts layer 0"),
    ],
)
def test_routes_that_cannot_be_are_refused_or_as_none(encoded: Any, expected: str) -> None:
    with pytest.raises(RolloutError, match=rf"^here: meta_info\.routed_experts .*{expected}"):
        parse(encoded)
    assert parse(encoded, replace(SHAPE, on_bad=OnBadRoutes.fallback)) is None
