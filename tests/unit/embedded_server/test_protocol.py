"""Requests in SGLang's shapes, good and bad."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch

from megatron_drpo.embedded_server.protocol import (
    BadRequest,
    ModelLimits,
    SampleRequest,
    SampleResult,
    parse_generate,
    render_result,
)
from megatron_drpo.embedded_server.sampling import SamplingParams

LIMITS = ModelLimits(vocab_size=10, max_tokens=20, eos_token_ids=frozenset([1]))


def parse(**body: Any) -> list[SampleRequest]:
    return parse_generate(body, LIMITS)[0]


def test_a_full_request() -> None:
    params = {"max_new_tokens": 4, "temperature": 0, "top_p": 0.5, "top_k": 3, "sampling_seed": -7}
    [sample] = parse(input_ids=[3, 4], rid="r", sampling_params={**params, "stop_token_ids": [5]}, unknown=1)
    expected = SamplingParams(
        max_new_tokens=4, temperature=0.0, top_p=0.5, top_k=3, seed=-7, stop_token_ids=frozenset([1, 5])
    )
    assert sample == SampleRequest("r", (3, 4), expected)


def test_a_batch_shares_one_object_or_has_one_each() -> None:
    shared = parse(input_ids=[[1], [2, 3]], rid="r", sampling_params={"max_new_tokens": 2})
    assert [(s.rid, s.prompt, s.params.max_new_tokens) for s in shared] == [
        ("r_0", (1,), 2),
        ("r_1", (2, 3), 2),
    ]
    assert shared[0].params.seed != shared[1].params.seed
    own = parse(
        input_ids=[[1], [2]], rid=["a", "b"], sampling_params=[{"max_new_tokens": 2}, {"max_new_tokens": 3}]
    )
    assert [(s.rid, s.params.max_new_tokens) for s in own] == [("a", 2), ("b", 3)]


def test_ignore_eos_ignores_every_stop_token() -> None:
    params = {"max_new_tokens": 4, "ignore_eos": True, "stop_token_ids": [5]}
    assert parse(input_ids=[3], sampling_params=params)[0].params.stop_token_ids == frozenset()


def test_the_number_of_most_probable_ids_is_shared_or_each_samples_own() -> None:
    def numbers(**body: Any) -> list[int]:
        params = {"max_new_tokens": 2}
        return [s.params.num_topk for s in parse(input_ids=[[1], [2]], sampling_params=params, **body)]

    assert numbers() == [0, 0]
    assert numbers(top_logprobs_num=None) == [0, 0]
    assert numbers(top_logprobs_num=10) == [10, 10]
    assert numbers(top_logprobs_num=[3, 0]) == [3, 0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input_ids": [1], "top_logprobs_num": 11}, "top_logprobs_num=11 must be a number in 0..10"),
        ({"input_ids": [1], "top_logprobs_num": -1}, "top_logprobs_num=-1"),
        ({"input_ids": [1], "top_logprobs_num": 2.0}, "top_logprobs_num=2.0"),
        ({"input_ids": [[1], [2]], "top_logprobs_num": [1]}, "or a list of 2 of them"),
        ({}, "input_ids is missing"),
        ({"input_ids": []}, "input_ids is missing"),
        ({"input_ids": "text"}, "input_ids is missing"),
        ({"input_ids": [[], [1]]}, "non-empty list of integers"),
        ({"input_ids": [1, True]}, "non-empty list of integers"),
        ({"input_ids": [3, 10]}, "input id 10 is outside 0..9"),
        ({"input_ids": [-1]}, "input id -1 is outside 0..9"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid must be"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "2 prompts, but 1 sampling_params"),
        ({"input_ids": [1], "sampling_params": [7]}, "sampling_params must be an object"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 20}}, "exceed the model's 20 positions"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens=0"),
        (
            {"input_ids": [1], "sampling_params": {"max_new_tokens": 2.0}},
            "max_new_tokens=2.0 must be of type int",
        ),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature=-1.0"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p=0.0"),
        ({"input_ids": [1], "sampling_params": {"top_k": 0}}, "top_k=0"),
        ({"input_ids": [1], "sampling_params": {"stop_token_ids": 5}}, "stop_token_ids must be a list"),
    ],
)
def test_bad_requests_name_the_fault(body: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse_generate(body, LIMITS)


def test_version_spans_cover_the_tokens_without_gaps() -> None:
    result = SampleResult(parse(input_ids=[3], sampling_params={"max_new_tokens": 9})[0])
    result.close_span("0")  # an update before the first token leaves no span
    result.token_ids += [2, 3]
    result.close_span("1")
    result.close_span("2")  # two updates in a row: no token of version 2
    result.token_ids += [4]
    result.logprobs = [-0.5, -1.0, -2.0]
    result.finish_reason = {"type": "stop", "matched": 4}
    result.close_span("3")
    assert result.version_spans == [("1", 0, 2), ("3", 2, 3)]
    meta = render_result(result, 0.25)["meta_info"]
    assert meta["weight_version"] == "3"
    assert meta["weight_versions"][1] == {"version": "3", "start": 2, "end": 3}
    assert meta["output_token_logprobs"] == [[-0.5, 2, None], [-1.0, 3, None], [-2.0, 4, None]]


def test_most_probable_ids_are_triples_like_the_sampled_ones() -> None:
    """One row of [logprob, id, text] per token; no such key where none were asked for."""
    params = {"max_new_tokens": 9}
    [sample] = parse(input_ids=[3], sampling_params=params, top_logprobs_num=2)
    result = SampleResult(sample, token_ids=[2, 4], logprobs=[-0.5, -1.0])
    result.topk_logprobs, result.topk_ids = [[-0.5, -0.75], [-0.25, -1.0]], [[2, 6], [5, 4]]
    result.finish_reason = {"type": "stop", "matched": 4}
    result.close_span("0")
    assert render_result(result, 0.0)["meta_info"]["output_top_logprobs"] == [
        [[-0.5, 2, None], [-0.75, 6, None]],
        [[-0.25, 5, None], [-1.0, 4, None]],
    ]
    [result.request] = parse(input_ids=[3], sampling_params=params)
    assert "output_top_logprobs" not in render_result(result, 0.0)["meta_info"]


def test_routes_are_int32_in_base64_where_they_are_asked_for() -> None:
    """One after the other, as the tokens came: [L-1, layers, K]."""
    params = {"max_new_tokens": 9}
    first, second = torch.tensor([[[0, 1], [2, 3]], [[3, 0], [1, 0]]]), torch.tensor([[[1, 2], [0, 300]]])
    for asked in (True, False):
        [sample] = parse(input_ids=[3, 5], sampling_params=params, return_routed_experts=asked)
        result = SampleResult(sample, token_ids=[2, 4], logprobs=[-0.5, -1.0])
        result.add_routes(first)
        result.add_routes(second)
        result.finish_reason = {"type": "stop", "matched": 4}
        result.close_span("0")
        meta = render_result(result, 0.0)["meta_info"]
        if asked:
            values = torch.frombuffer(bytearray(base64.b64decode(meta["routed_experts"])), dtype=torch.int32)
            assert torch.equal(values.view(3, 2, 2), torch.cat([first, second]).int())
        else:
            assert "routed_experts" not in meta


def test_a_response_without_tokens_still_has_a_version() -> None:
    result = SampleResult(parse(input_ids=[3], sampling_params={"max_new_tokens": 9})[0])
    result.finish_reason = {"type": "abort", "message": "Aborted"}
    result.close_span("4")
    assert render_result(result, 0.0)["meta_info"]["weight_versions"] == [
        {"version": "4", "start": 0, "end": 0}
    ]
