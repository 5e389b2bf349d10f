"""Every way in which a response can be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SampleRequest
from megatron_drpo.rollout.completion import Completion, parse_completion
from megatron_drpo.types import FinishReason

Damage = Callable[[dict[str, Any]], object]

REQUEST = SampleRequest(
    rid="r", token_ids=(1, 2), sampling_params={"max_new_tokens": 4, "stop_token_ids": [7]}
)
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
        response,
        request=REQUEST,
        oldest_version=2,
        newest_version=4,
        where=where,
        vocab_size=10,
        num_topk=num_topk,
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
        (None, " is []; expected a row for each of the 3 tokens, got 0; the request has top_logprobs_num=2"),
        (TOPK[:2], "expected a row for each of the 3 tokens, got 2"),
        ([TOPK[0], TOPK[1], TOPK[2][:1]], "[2] is [[0.0, 7, None]]; expected 2 entries, as the request has"),
        ([TOPK[0], [*TOPK[1], [-9.0, 1, None]], TOPK[2]], "expected 2 entries, as the request has top_log"),
        ([TOPK[0], None, TOPK[2]], "[1] is None; expected 2 entries"),
        (
            [TOPK[0], [[None, 9, None], [-1.0, 6, None]], TOPK[2]],
            "[1] is [[None, 9, None], [-1.0, 6, None]]; ",
        ),
        ([TOPK[0], [[-1.0], [-1.0]], TOPK[2]], "expected entries [logprob, id, text]"),
        ([TOPK[0], [[-1.0, "a"], [-1.0, 3]], TOPK[2]], "expected ids in 0..9"),
        ([TOPK[0], [[-1.0, 2], [-1.0, 10]], TOPK[2]], "expected ids in 0..9"),
        ([TOPK[0], [[-1.0, 2], [-1.0, 2]], TOPK[2]], "[1] is [[-1.0, 2], [-1.0, 2]]; expected distinct ids"),
        ([TOPK[0], [[-0.1, 2], [-0.1, 3]], TOPK[2]], "expected probabilities that add up to at most 1"),
        ([TOPK[0], [[0.5, 2], [-1.0, 3]], TOPK[2]], "expected finite logprobs of at most 0.001"),
        ([TOPK[0], [[float("nan"), 2], [-1.0, 3]], TOPK[2]], "expected finite logprobs"),
        (3, "meta_info.output_top_logprobs is 3; expected a list"),
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


def spans(*spans: tuple[Any, Any, Any]) -> Damage:
    return change("weight_versions", [{"version": v, "start": s, "end": e} for v, s, e in spans])


def with_ids(ids: list[Any], **meta: Any) -> Damage:
    """Other tokens, with as many of everything that comes with each."""

    def damage(response: dict[str, Any]) -> None:
        response["output_ids"] = ids
        response["meta_info"] |= {
            "completion_tokens": len(ids),
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [[-0.5, i, None] for i in ids],
            "weight_versions": [{"version": "3", "start": 0, "end": len(ids)}],
            **meta,
        }

    return damage


def logprob(index: int, entry: Any) -> Damage:
    return lambda response: response["meta_info"]["output_token_logprobs"].__setitem__(index, entry)


TOO_LARGE = 10**400
"""An integer that no float holds."""
BAD: list[tuple[Damage, str]] = [
    (lambda r: r.pop("meta_info"), "the answer has no 'meta_info'; expected an object"),
    (lambda r: r.update(meta_info=[1]), "meta_info is [1]; expected an object"),
    (lambda r: r.pop("output_ids"), "the answer has no 'output_ids'; expected a list"),
    (lambda r: r.update(output_ids=None), "output_ids is None; expected a list"),
    (change("finish_reason", None), "meta_info.finish_reason is None; expected an object"),
    (change("finish_reason", "stop"), "meta_info.finish_reason is 'stop'; expected an object"),
    (change("finish_reason", {}), "the answer has no 'meta_info.finish_reason.type'"),
    (
        change("finish_reason", {"type": "error"}),
        "meta_info.finish_reason.type is 'error'; expected stop, length, abort",
    ),
    (
        change("finish_reason", {"type": ["stop"]}),
        "meta_info.finish_reason.type is ['stop']; expected a string",
    ),
    (
        change("finish_reason", {"type": "stop", "matched": "NaN happened"}),
        "meta_info.finish_reason.matched is 'NaN happened'; expected the last token, 7",
    ),
    (change("finish_reason", {"type": "stop", "matched": 6}), "matched is 6; expected the last token, 7"),
    (change("id", "q"), "meta_info.id is 'q'; expected 'r': the answers are in another order"),
    (change("prompt_tokens", 1), "meta_info.prompt_tokens is 1; expected 2, as were sent"),
    (with_ids([5, 6, 5, 6, 5, 6, 5, 6, 5]), "expected 4 tokens at most, got 9"),
    (with_ids([5, 6, 5, 6, 5], finish_reason={"type": "stop"}), "expected 4 tokens at most, got 5"),
    (with_ids([5, 7, 6]), "output_ids[1] is 7; expected no token behind that stop id"),
    (with_ids([]), "output_ids is []; expected tokens, as the finish reason is 'length'"),
    (with_ids([5, 6.0, 7]), "output_ids[1] is 6.0; expected an id in 0..9"),
    (with_ids([5, True, 7]), "output_ids[1] is True; expected an id in 0..9"),
    (with_ids([5, "6", 7]), "output_ids[1] is '6'; expected an id in 0..9"),
    (with_ids([5, 10, 7]), "output_ids[1] is 10; expected an id in 0..9: the server has another model"),
    (with_ids([-2, 6, 7]), "output_ids[0] is -2; expected an id in 0..9"),
    (
        change("output_token_logprobs", [[-1.0, 5]]),
        "output_token_logprobs is [[-1.0, 5]]; expected one entry for each of the 3 output_ids, got 1",
    ),
    (
        lambda r: r["output_ids"].pop(),
        "expected one entry for each of the 2 output_ids, got 3",
    ),
    (change("output_token_logprobs", None), "meta_info.output_token_logprobs is None; expected a list"),
    (
        logprob(2, [0.0, 6]),
        "meta_info.output_token_logprobs[2][1] is 6; expected 7, as output_ids[2]",
    ),
    (logprob(2, [0.0, 7.0]), "meta_info.output_token_logprobs[2][1] is 7.0; expected 7"),
    (logprob(1, [-1.0]), "meta_info.output_token_logprobs[1] is [-1.0]; expected [logprob, id, text]"),
    (logprob(1, -1.0), "meta_info.output_token_logprobs[1] is -1.0; expected [logprob, id, text]"),
    (logprob(0, [None, 5]), "meta_info.output_token_logprobs[0][0] is None; expected a finite logprob"),
    (
        logprob(1, [float("nan"), 6]),
        "meta_info.output_token_logprobs[1][0] is nan; expected a finite logprob",
    ),
    (logprob(0, [float("-inf"), 5]), "meta_info.output_token_logprobs[0][0] is -inf"),
    (logprob(0, [-1e39, 5]), "meta_info.output_token_logprobs[0][0] is -1e+39"),
    (logprob(0, [-TOO_LARGE, 5]), "meta_info.output_token_logprobs[0][0] is -1000"),
    (logprob(0, ["-0.5", 5]), "meta_info.output_token_logprobs[0][0] is '-0.5'"),
    (logprob(0, [False, 5]), "meta_info.output_token_logprobs[0][0] is False"),
    (logprob(2, [0.01, 7]), "[2][0] is 0.01; expected a finite logprob of at most 0.001"),
    (change("completion_tokens", 4), "meta_info.completion_tokens is 4; expected 3, as output_ids"),
    (change("completion_tokens", "3"), "meta_info.completion_tokens is '3'; expected an integer"),
    (change("completion_tokens", 3.5), "meta_info.completion_tokens is 3.5; expected an integer"),
    (spans(("default", 0, 3)), "weight version 'default'; the request is for versions 2..4"),
    (spans((None, 0, 3)), "no other token is used"),
    (spans(("5", 0, 3)), "meta_info.weight_versions[0].version: weight version '5'"),
    (spans(("3", 0, 2), ("5", 2, 3)), "meta_info.weight_versions[1].version: weight version '5'"),
    (spans(("-1", 0, 3)), "weight version '-1'"),
    (spans(("9" * 5000, 0, 3)), "weight version '999"),
    (spans((True, 0, 3)), "weight version True"),
    (spans((["3"], 0, 3)), "weight version ['3']"),
    (spans(("3", 0, 2)), "expected spans that cover the 3 tokens"),
    (spans(("3", 0, 1), ("4", 2, 3)), "meta_info.weight_versions[1].start is 2; expected 1"),
    (spans(("3", 0, 2), ("4", 1, 3)), "meta_info.weight_versions[1].start is 1; expected 2"),
    (spans(("3", 0, 4)), "meta_info.weight_versions[0].end is 4; expected a position in 0..3"),
    (spans(("3", 0, 10**12)), "meta_info.weight_versions[0].end is 1000000000000; expected"),
    (spans(("3", 0, 2), ("4", 2, 1)), "meta_info.weight_versions[1].end is 1; expected a position in 2..3"),
    (spans(("3", 0, "3")), "meta_info.weight_versions[0].end is '3'; expected an integer"),
    (spans(("3", None, 3)), "meta_info.weight_versions[0].start is None; expected an integer"),
    (change("weight_versions", [{"version": "3", "start": 0}]), "has no 'meta_info.weight_versions[0].end'"),
    (change("weight_versions", [{"version": "3"}]), "has no 'meta_info.weight_versions[0].start'"),
    (change("weight_versions", [{"start": 0, "end": 3}]), "weight_versions[0].version: weight version None"),
    (change("weight_versions", ["3"]), "meta_info.weight_versions[0] is '3'; expected an object"),
    (change("weight_versions", "3"), "meta_info.weight_versions is '3'; expected a list"),
    (change("weight_versions", {"3": 3}), "meta_info.weight_versions is {'3': 3}; expected a list"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_a_bad_response_is_refused_with_server_request_field_and_value(damage: Damage, message: str) -> None:
    response = copy.deepcopy(GOOD)
    damage(response)
    with pytest.raises(RolloutError) as caught:
        parse(response)
    assert str(caught.value).startswith("http://server/generate: request r: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000, "a long value is shortened"


@pytest.mark.parametrize("response", [None, [], "text", 3])
def test_a_response_that_is_no_object(response: Any) -> None:
    with pytest.raises(RolloutError, match=r"request r: the answer is .*; expected an object"):
        parse(response)


def test_an_abort_may_bring_more_than_was_asked_for() -> None:
    """All tokens of the step that was under way are reported, several with speculative decoding."""
    response = copy.deepcopy(GOOD)
    with_ids([5, 7, 6, 6, 6], finish_reason={"type": "abort", "message": "Aborted"})(response)
    assert parse(response).token_ids == [5, 7, 6, 6, 6]


@pytest.mark.parametrize("version", ["3", 3])
def test_a_version_is_a_text_or_a_number(version: Any) -> None:
    response = copy.deepcopy(GOOD)
    spans((version, 0, 0), (4, 0, 3))(response)
    assert parse(response).policy_versions == [4, 4, 4], "an empty span is of no token"


def test_a_missing_version_is_refused() -> None:
    response = copy.deepcopy(GOOD)
    del response["meta_info"]["weight_versions"], response["meta_info"]["weight_version"]
    with pytest.raises(RolloutError, match="no other token is used"):
        parse(response)
