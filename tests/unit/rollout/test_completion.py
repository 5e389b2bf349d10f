"""Every way in which a response can be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.completion import Completion, parse_completion
from megatron_drpo.types import FinishReason

Damage = Callable[[dict[str, Any]], object]

GOOD: dict[str, Any] = {
    "output_ids": [5, 6, 7],
    "meta_info": {
        "completion_tokens": 3,
        "finish_reason": {"type": "stop", "matched": 7},
        "weight_version": "4",
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
        "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None], [0.0, 7, None]],
    },
}


def parse(response: Any, num_topk: int = 0) -> Completion:
    where = "http://server/generate: request r"
    return parse_completion(
        response, oldest_version=2, newest_version=4, where=where, vocab_size=10, num_topk=num_topk
    )


def test_a_good_response() -> None:
    assert parse(GOOD) == Completion([5, 6, 7], [-0.5, -1.5, 0.0], [3, 3, 4], FinishReason.stop)


def test_without_spans_the_one_version_counts() -> None:
    response = copy.deepcopy(GOOD)
    del response["meta_info"]["weight_versions"]
    assert parse(response).policy_versions == [4, 4, 4]


def test_an_aborted_response_may_be_empty() -> None:
    meta: dict[str, Any] = {
        "completion_tokens": 0,
        "finish_reason": {"type": "abort"},
        "weight_version": "4",
        "weight_versions": [{"version": "4", "start": 0, "end": 0}],
        "output_token_logprobs": [],
    }
    assert parse({"output_ids": [], "meta_info": meta}) == Completion([], [], [], FinishReason.abort)


TOPK: list[Any] = [
    [[-0.5, 5, None], [-1.25, 2, None]],
    [[-0.75, 9, None], [-1.5, 6, None]],
    [[0.0, 7, None], [-40.0, 0, None]],
]


def with_topk(rows: Any) -> dict[str, Any]:
    response = copy.deepcopy(GOOD)
    response["meta_info"]["output_top_logprobs"] = rows
    return response


def test_the_most_probable_ids() -> None:
    completion = parse(with_topk(TOPK), num_topk=2)
    assert completion.topk_ids == [[5, 2], [9, 6], [7, 0]]
    assert completion.topk_logprobs == [[-0.5, -1.25], [-0.75, -1.5], [0.0, -40.0]]
    unasked = parse(with_topk(TOPK))
    assert unasked == parse(GOOD)
    assert unasked.topk_ids is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "output_top_logprobs are of 0 tokens, the response has 3; the request asked for"),
        (TOPK[:2], "output_top_logprobs are of 2 tokens, the response has 3"),
        ([TOPK[0], TOPK[1], TOPK[2][:1]], "of response token 2 has 1 ids; the request asked for top_log"),
        ([TOPK[0], [*TOPK[1], [-9.0, 1, None]], TOPK[2]], "of response token 1 has 3 ids"),
        ([TOPK[0], None, TOPK[2]], "malformed output_top_logprobs: TypeError"),
        ([TOPK[0], [[None, 9, None], [-1.0, 6, None]], TOPK[2]], "malformed output_top_logprobs: TypeError"),
        ([TOPK[0], [[-1.0], [-1.0]], TOPK[2]], "malformed output_top_logprobs: IndexError"),
        ([TOPK[0], [[-1.0, "a"], [-1.0, 3]], TOPK[2]], "malformed output_top_logprobs: ValueError"),
        (3, "malformed output_top_logprobs: TypeError"),
    ],
)
def test_most_probable_ids_that_are_missing_or_malformed(rows: Any, message: str) -> None:
    response = copy.deepcopy(GOOD) if rows is None else with_topk(rows)
    with pytest.raises(RolloutError) as caught:
        parse(response, num_topk=2)
    assert str(caught.value).startswith("http://server/generate: request r: ")
    assert message in str(caught.value)


def test_an_empty_response_needs_no_most_probable_ids() -> None:
    meta: dict[str, Any] = {"completion_tokens": 0, "finish_reason": {"type": "abort"}, "weight_version": "4"}
    no_tokens: list[object] = []
    meta["output_token_logprobs"] = no_tokens
    completion = parse({"output_ids": no_tokens, "meta_info": meta}, num_topk=2)
    assert completion.topk_ids == completion.topk_logprobs == []


def change(key: str, value: Any) -> Damage:
    return lambda response: response["meta_info"].update({key: value})


def spans(*spans: tuple[Any, int, int]) -> Damage:
    return change("weight_versions", [{"version": v, "start": s, "end": e} for v, s, e in spans])


BAD: list[tuple[Damage, str]] = [
    (lambda r: r.pop("meta_info"), "malformed response: KeyError: 'meta_info'"),
    (change("finish_reason", None), "malformed response"),
    (change("finish_reason", {"type": "error"}), "'error' is not a valid FinishReason"),
    (change("output_token_logprobs", [[-1.0, 5]]), "disagree"),
    (change("output_token_logprobs", [[None, 5], [-1.0, 6], [-1.0, 7]]), "malformed response"),
    (
        lambda r: r["output_ids"].pop(),
        "2 output_ids, 3 output_token_logprobs and completion_tokens=3 disagree",
    ),
    (lambda r: r.update(output_ids=[5, 6, 8]), "disagree"),
    (change("completion_tokens", 4), "disagree"),
    (change("output_token_logprobs", [[-1, 5], [float("nan"), 6], [-1, 7]]), "response token 1 is nan"),
    (change("output_token_logprobs", [[float("-inf"), 5], [-1, 6], [-1, 7]]), "response token 0 is -inf"),
    (change("output_token_logprobs", [[-1, 5], [-1, 6], [0.01, 7]]), "response token 2 is 0.01"),
    (
        lambda r: (
            r.update(output_ids=[5, 10, 7]),
            r["meta_info"]["output_token_logprobs"].__setitem__(1, [-1, 10]),
        ),
        "response token 1 is the id 10, which is not in 0..9",
    ),
    (
        lambda r: (
            r.update(output_ids=[-2, 6, 7]),
            r["meta_info"]["output_token_logprobs"].__setitem__(0, [-1, -2]),
        ),
        "response token 0 is the id -2",
    ),
    (spans(("default", 0, 3)), "weight version 'default'; the request is for versions 2..4"),
    (spans((None, 0, 3)), "no other token is used"),
    (spans(("5", 0, 3)), "weight version '5'"),
    (spans(("3", 0, 2), ("5", 2, 3)), "weight version '5'"),
    (spans(("-1", 0, 3)), "weight version '-1'"),
    (spans(("3", 0, 2)), "do not cover the 3 tokens"),
    (spans(("3", 0, 1), ("4", 2, 3)), "do not cover the 3 tokens"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_a_bad_response_is_refused_with_server_and_request(damage: Damage, message: str) -> None:
    response = copy.deepcopy(GOOD)
    damage(response)
    with pytest.raises(RolloutError) as caught:
        parse(response)
    assert str(caught.value).startswith("http://server/generate: request r: ")
    assert message in str(caught.value)


def test_a_missing_version_is_refused() -> None:
    response = copy.deepcopy(GOOD)
    del response["meta_info"]["weight_versions"], response["meta_info"]["weight_version"]
    with pytest.raises(RolloutError, match="no other token is used"):
        parse(response)
