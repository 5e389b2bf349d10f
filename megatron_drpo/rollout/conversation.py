"""Rollouts of several turns: a function of the user's says what follows on what, on token ids alone.

    async def solve(conversation: Conversation) -> None:
        call = await conversation.sample(stop_token_ids=[TOOL_CALL_END])
        result = await run_tool(conversation.tokenizer.decode(call))
        conversation.insert(conversation.tokenizer.encode(result, add_special_tokens=False))
        await conversation.sample()

`rollout.function=module:solve`; `examples/second_try.py` is a whole one. What the policy sampled is trained;
what was inserted is context. Text never becomes tokens a second time, so that what is trained is what was
sampled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from megatron_drpo.config.user_code import load_function
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.completion import Completion
from megatron_drpo.rollout.sample import Decode, Sample, join_routes
from megatron_drpo.types import FinishReason, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Complete = Callable[[Sample], Awaitable[None]]
RolloutFunction = Callable[["Conversation"], Awaitable[None]]


def load_rollout_function(target: str) -> RolloutFunction:
    """The function behind `rollout.function=module:function`.

    Raises:
        ConfigError: there is no such function of one argument.
    """
    return load_function(
        target,
        setting=f"rollout.function={target}",
        known="nothing",
        argument="the Conversation",
        is_async=True,
    )


@dataclass(slots=True)
class Conversation:
    """One rollout in the making."""

    prompt: Prompt
    index: int
    """0 .. G-1 within the group."""
    max_tokens: int
    """Tokens that the response may have, inserted ones included."""
    policy_version: int
    """When it began; what inserted tokens carry."""
    tokenizer: PreTrainedTokenizerBase
    """The model's, to read what was sampled and to encode what is inserted."""
    _sample: Sample
    """What turns are made of; it knows the server of the latest one."""
    _complete: Complete
    token_ids: list[int] = field(default_factory=list)
    """The response so far, without the prompt."""
    finish_reason: FinishReason = FinishReason.stop
    """Of the latest turn; a function may set it."""
    _parts: list[tuple[Completion, bool]] = field(default_factory=list)
    """Turns, and whether they were sampled."""
    _response_mask: list[bool] = field(default_factory=list)
    _servers: list[tuple[str, int]] = field(default_factory=list)

    @property
    def num_tokens_left(self) -> int:
        """Tokens that may still be sampled or inserted."""
        return self.max_tokens - len(self.token_ids)

    async def sample(self, *, max_tokens: int | None = None, stop_token_ids: Sequence[int] = ()) -> list[int]:
        """Have the policy go on; the tokens it sampled. Without room for a token: none, and the finish reason
        is `length`.

        Args:
            max_tokens: of this turn; what is left if not given.
            stop_token_ids: end the turn as well; the model's own always do.

        Raises:
            RolloutError: no server could do it.
        """
        room = min(max_tokens or self.num_tokens_left, self.num_tokens_left)
        if room < 1:
            self.finish_reason = FinishReason.length
            return []
        turn = self._sample.next_turn(self.token_ids, room, stop_token_ids)
        await self._complete(turn)
        completion = turn.completion()
        self._sample.server = turn.server
        self._servers += turn.servers
        self._add(completion, True)
        self.finish_reason = completion.finish_reason
        return completion.token_ids

    def insert(self, token_ids: Sequence[int]) -> None:
        """Append what the policy did not say: a tool's answer, the next user turn. It is never trained; what
        does not fit is cut off."""
        ids = list(token_ids)[: self.num_tokens_left]
        self._servers.append(("rollout.function", len(ids)))
        self._add(
            Completion(ids, [0.0] * len(ids), [self.policy_version] * len(ids), FinishReason.stop), False
        )

    def _add(self, completion: Completion, sampled: bool) -> None:
        self._parts.append((completion, sampled))
        self.token_ids += completion.token_ids
        self._response_mask += [sampled] * len(completion.token_ids)

    def rollout(self, decode: Decode) -> Rollout:
        """What is scored and trained.

        Raises:
            RolloutError: the function sampled nothing.
        """
        if not any(self._response_mask):
            raise RolloutError(
                f"rollout.function: prompt {self.prompt.id}, sample {self.index}: it ended without a sampled "
                "token"
            )
        return Rollout(
            prompt=self.prompt,
            sample_index=self.index,
            response_ids=self.token_ids,
            rollout_logprobs=[*chain.from_iterable(part.logprobs for part, _ in self._parts)],
            policy_versions=[*chain.from_iterable(part.policy_versions for part, _ in self._parts)],
            finish_reason=self.finish_reason,
            text=decode(self.token_ids),
            response_mask=self._response_mask,
            routes=join_routes([part.routes for part, mask in self._parts if mask]),
            servers=self._servers,
        )
