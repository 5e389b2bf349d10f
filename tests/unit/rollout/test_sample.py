"""Segments and turns of a sample, and its seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_drpo.rollout.completion import Completion
from megatron_drpo.rollout.sample import Sample, join_routes, sample_seed_key, seed_of
from megatron_drpo.types import FinishReason, Prompt

PARAMS: dict[str, Any] = {"max_new_tokens": 10, "stop_token_ids": [1]}


@pytest.fixture
def sample() -> Sample:
    prompt = Prompt(id=3, text="", token_ids=(7, 8))
    return Sample(prompt=prompt, index=2, name="step0-prompt3-sample2", seed_key="0/0/3/2", params=PARAMS)


def completion(ids: list[int], version: int, reason: FinishReason) -> Completion:
    return Completion(ids, [-0.5 * i for i in ids], [version] * len(ids), reason)


def test_an_aborted_response_goes_on_from_its_tokens(sample: Sample) -> None:
    first = sample.next_request()
    assert first.token_ids == [7, 8]
    assert first.sampling_params["sampling_seed"] == seed_of("0/0/3/2")
    sample.add(completion([4, 5, 6], 1, FinishReason.abort), "http://a")
    sample.add(completion([], 1, FinishReason.abort), "http://a")
    assert not sample.is_finished
    second = sample.next_request()
    assert second.token_ids == [7, 8, 4, 5, 6]
    assert second.sampling_params["max_new_tokens"] == 7
    assert second.sampling_params["sampling_seed"] != first.sampling_params["sampling_seed"]
    assert second.rid != first.rid
    sample.add(completion([9, 1], 2, FinishReason.stop), "http://b")
    assert sample.is_finished
    rollout = sample.rollout(lambda ids: str(ids))
    assert rollout.response_ids == [4, 5, 6, 9, 1]
    assert rollout.rollout_logprobs == [-2.0, -2.5, -3.0, -4.5, -0.5]
    assert rollout.policy_versions == [1, 1, 1, 2, 2]
    assert rollout.servers == [("http://a", 3), ("http://b", 2)]
    assert rollout.finish_reason is FinishReason.stop
    assert rollout.text == "[4, 5, 6, 9, 1]"


ABORT, STOP, LENGTH = FinishReason.abort, FinishReason.stop, FinishReason.length


@pytest.mark.parametrize(
    ("ids", "reported", "kept", "reason"),
    [
        ([4, 1], ABORT, [4, 1], STOP),
        ([1], ABORT, [1], STOP),
        ([4, 1, 5, 6], ABORT, [4, 1], STOP),
        ([4, 1, 5, 1], ABORT, [4, 1], STOP),
        ([4] * 7, ABORT, [4] * 7, LENGTH),
        ([4] * 9, ABORT, [4] * 7, LENGTH),
        ([4] * 6 + [1], ABORT, [4] * 6 + [1], STOP),
        ([4] * 7 + [1], ABORT, [4] * 7, LENGTH),
        ([4] * 6 + [1], LENGTH, [4] * 6 + [1], STOP),
        ([4] * 6 + [9], STOP, [4] * 6 + [9], STOP),
        ([4, 9], STOP, [4, 9], STOP),
        ([4, 9], LENGTH, [4, 9], LENGTH),
    ],
)
def test_the_tokens_decide_whether_a_response_is_finished(
    sample: Sample, ids: list[int], reported: FinishReason, kept: list[int], reason: FinishReason
) -> None:
    """After 3 of 10 tokens; 1 is the stop id that was asked for, 9 one that the server has of its own."""
    sample.add(completion([5, 6, 7], 1, ABORT), "http://a")
    assert not sample.is_finished
    sample.add(completion(ids, 2, reported), "http://a")
    assert sample.is_finished
    whole = sample.completion()
    assert whole.token_ids == [5, 6, 7, *kept]
    assert whole.logprobs == [-2.5, -3.0, -3.5, *(-0.5 * i for i in kept)]
    assert whole.policy_versions == [1] * 3 + [2] * len(kept)
    assert whole.finish_reason is reason


def test_what_comes_with_a_token_is_cut_off_with_it(sample: Sample) -> None:
    routes = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1)
    """Of 2 tokens of the prompt and 3 of the response."""
    topk_ids, topk_logprobs = [[4], [1], [5], [6]], [[-0.1], [-0.2], [-0.3], [-0.4]]
    whole = completion([4, 1, 5, 6], 1, FinishReason.abort)
    sample.add(replace(whole, topk_ids=topk_ids, topk_logprobs=topk_logprobs, routes=routes), "http://a")
    rollout = sample.rollout(str)
    assert rollout.response_ids == [4, 1]
    assert rollout.topk_ids == [[4], [1]]
    assert rollout.topk_logprobs == [[-0.1], [-0.2]]
    assert rollout.routes is not None
    assert rollout.routes.flatten().tolist() == [0, 1, 2]


def test_an_attempt_that_failed_leaves_nothing_behind(sample: Sample) -> None:
    """The next one asks for the same with the same randomness, under another id."""
    first, second = sample.next_request(), sample.next_request()
    assert first.rid != second.rid
    assert (first.token_ids, first.sampling_params) == (second.token_ids, second.sampling_params)


def test_a_further_turn(sample: Sample) -> None:
    turn = sample.next_turn([4, 5], 6, [3])
    request = turn.next_request()
    assert request.token_ids == [7, 8, 4, 5]
    assert request.sampling_params["max_new_tokens"] == 6
    assert request.sampling_params["stop_token_ids"] == [1, 3]
    assert request.sampling_params["sampling_seed"] != seed_of("0/0/3/2")
    assert sample.params["stop_token_ids"] == [1], "a turn's own stop tokens end with it"
    assert sample.next_turn([4, 5, 6], 5, []).next_request().rid != request.rid


def test_a_token_keeps_the_routes_of_the_request_that_sampled_it() -> None:
    """The second request tells all earlier tokens too, perhaps computed again with other weights."""
    first = torch.zeros(4, 2, 1, dtype=torch.uint8)
    second = torch.ones(7, 2, 1, dtype=torch.uint8)
    joined = join_routes([first, second])
    assert joined is not None
    assert joined[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert join_routes([first, None]) is None
    assert join_routes([]) is None


def sample_seed(*key: int) -> int:
    return seed_of(sample_seed_key(*key))


def test_sample_seeds_are_stable_across_releases() -> None:
    """Golden values: a change here changes every run."""
    assert sample_seed(0, 0, 0, 0) == 8662518681111019217
    assert sample_seed(1, 22, 333, 4444) == 3342449704403661612
    seeds = {sample_seed(0, s, p, i) for s in range(10) for p in range(10) for i in range(10)}
    assert len(seeds) == 1000
    assert sample_seed(5, 4, 3, 2, 0) == sample_seed(5, 4, 3, 2)
    seeds |= {
        sample_seed(0, s, p, i, r) for s in range(10) for p in range(10) for i in (0, 1) for r in (1, 2)
    }
    assert len(seeds) == 1400, "another round of the same step draws other samples"
    assert all(0 <= seed < 2**63 for seed in seeds)
