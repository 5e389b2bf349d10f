"""Rollouts of several turns, with turns whose tokens are written out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.rollout.completion import Completion
from megatron_drpo.rollout.conversation import Conversation, load_rollout_function
from megatron_drpo.rollout.sample import Sample
from megatron_drpo.types import FinishReason, Prompt


class Server:
    """Answers turns in order."""

    def __init__(self, *turns: Completion) -> None:
        self.turns = list(turns)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def complete(self, turn: Sample) -> None:
        request = turn.next_request()
        self.asked.append((list(request.token_ids), dict(request.sampling_params)))
        turn.add(self.turns.pop(0), "http://a")


def turn(ids: list[int], version: int = 0, reason: FinishReason = FinishReason.stop) -> Completion:
    return Completion(ids, [-0.5 * i for i in ids], [version] * len(ids), reason)


def begin(server: Server, max_tokens: int = 10) -> Conversation:
    prompt = Prompt(id=3, text="", token_ids=(7, 8))
    params = {"max_new_tokens": max_tokens, "stop_token_ids": [1]}
    return Conversation(
        prompt=prompt,
        index=2,
        max_tokens=max_tokens,
        policy_version=4,
        tokenizer=cast(PreTrainedTokenizerBase, None),
        _sample=Sample(prompt=prompt, index=2, name="s", seed_key="0/0/3/2", params=params),
        _complete=server.complete,
    )


def test_what_was_sampled_is_trained_and_what_was_inserted_is_context() -> None:
    server = Server(turn([5, 9], version=4), turn([6, 1], version=5))
    conversation = begin(server)

    async def solve() -> None:
        assert await conversation.sample(stop_token_ids=[9]) == [5, 9]
        conversation.insert([20, 21, 22])
        assert conversation.num_tokens_left == 5
        assert await conversation.sample() == [6, 1]

    asyncio.run(solve())
    rollout = conversation.rollout(lambda ids: str(len(ids)))
    assert rollout.response_ids == [5, 9, 20, 21, 22, 6, 1]
    assert rollout.response_mask == [True, True, False, False, False, True, True]
    assert rollout.rollout_logprobs == [-2.5, -4.5, 0.0, 0.0, 0.0, -3.0, -0.5]
    assert rollout.policy_versions == [4, 4, 4, 4, 4, 5, 5]
    assert rollout.servers == [("http://a", 2), ("rollout.function", 3), ("http://a", 2)]
    assert rollout.finish_reason is FinishReason.stop
    assert rollout.text == "7"
    contexts = [context for context, _ in server.asked]
    assert contexts == [[7, 8], [7, 8, 5, 9, 20, 21, 22]]
    assert [params["stop_token_ids"] for _, params in server.asked] == [[1, 9], [1]]
    assert [params["max_new_tokens"] for _, params in server.asked] == [10, 5]
    assert len({params["sampling_seed"] for _, params in server.asked}) == 2


@pytest.mark.parametrize(
    ("ids", "max_tokens", "reason"), [([5, 9], None, FinishReason.stop), ([5, 6, 6], 3, FinishReason.length)]
)
def test_a_turn_that_was_complete_when_it_was_aborted_is_over(
    ids: list[int], max_tokens: int | None, reason: FinishReason
) -> None:
    """By a stop token of the turn's own, and at its limit."""
    aborted = turn(ids, reason=FinishReason.abort)

    async def complete(sample: Sample) -> None:
        while not sample.is_finished:
            await server.complete(sample)

    server = Server(aborted)
    conversation = begin(server)
    conversation._complete = complete
    assert asyncio.run(conversation.sample(max_tokens=max_tokens, stop_token_ids=[9])) == ids
    assert conversation.finish_reason is reason


def test_without_room_nothing_is_asked() -> None:
    server = Server(turn([5, 6, 4], reason=FinishReason.length))
    conversation = begin(server, max_tokens=5)

    async def solve() -> None:
        await conversation.sample(max_tokens=3)
        conversation.insert([20, 21, 22])
        assert await conversation.sample() == []

    asyncio.run(solve())
    assert conversation.token_ids == [5, 6, 4, 20, 21], "what does not fit is cut off"
    assert conversation.finish_reason is FinishReason.length
    assert len(server.asked) == 1


def test_routes_of_all_turns() -> None:
    """[L-1, M, K]: a turn tells those of what was before it as well; the first word counts."""

    def routes(first: int, length: int) -> torch.Tensor:
        return torch.arange(first, first + length, dtype=torch.uint8).reshape(length, 1, 1)

    one = replace(turn([5, 9]), routes=routes(0, 3))
    two = replace(turn([6, 1]), routes=routes(100, 6))
    conversation = begin(Server(one, two))

    async def solve() -> None:
        await conversation.sample()
        conversation.insert([20])
        await conversation.sample()

    asyncio.run(solve())
    joined = conversation.rollout(str).routes
    assert joined is not None
    assert joined.flatten().tolist() == [0, 1, 2, 103, 104, 105]


def test_a_function_that_samples_nothing() -> None:
    conversation = begin(Server())
    conversation.insert([20])
    with pytest.raises(RolloutError, match="prompt 3, sample 2: it ended without a sampled token"):
        conversation.rollout(str)


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.function=nowhere:solve"):
        load_rollout_function("nowhere:solve")
