"""One response in the making: segments, each sampled by one request, that become one rollout."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from megatron_drpo.rollout.client import SampleRequest
from megatron_drpo.rollout.completion import Completion
from megatron_drpo.types import FinishReason, Prompt, Rollout

if TYPE_CHECKING:
    from megatron_drpo.types import Routes

T = TypeVar("T")
Decode = Callable[[list[int]], str]
_PROCESS_KEY = uuid.uuid4().hex[:8]
"""Replicas, and other runs at the same servers, have samples of the same names."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """A response has more than one segment if it was aborted, or lost its server, and went on."""

    prompt: Prompt
    index: int
    """0 .. G-1 within the group."""
    name: str
    """Unique among all requests of a replica; names it in errors."""
    seed_key: str
    """What the sample's randomness depends on."""
    params: dict[str, Any]
    """SGLang's sampling_params of the whole response."""
    context: Sequence[int] | None = None
    """Tokens to go on from; the prompt's if not given."""
    segments: list[Completion] = field(default_factory=list)
    servers: list[tuple[str, int]] = field(default_factory=list)
    """(endpoint, tokens) of each segment."""
    num_attempts: int = 0
    server: str | None = None
    """Endpoint of the latest segment: it has the prefix in its cache."""
    rid: str = ""
    """Of the request in flight."""

    @property
    def num_tokens(self) -> int:
        """Response tokens so far."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to sample; `add` decides it."""
        return bool(self.segments) and self.segments[-1].finish_reason is not FinishReason.abort

    def next_request(self) -> SampleRequest:
        """What is still missing, under an id of its own."""
        self.rid = f"{self.name}-{self.num_attempts}-{_PROCESS_KEY}"
        self.num_attempts += 1
        seed_key = self.seed_key + (f"/segment{len(self.segments)}" if self.segments else "")
        return SampleRequest(
            rid=self.rid,
            token_ids=[
                *(self.prompt.token_ids if self.context is None else self.context),
                *_joined(s.token_ids for s in self.segments),
            ],
            sampling_params={
                **self.params,
                "max_new_tokens": self.params["max_new_tokens"] - self.num_tokens,
                "sampling_seed": seed_of(seed_key),
            },
        )

    def add(self, completion: Completion, server: str) -> None:
        """Take in what the latest request brought; an abort without a token leaves things as they were."""
        self.server = server
        if completion.finish_reason is FinishReason.abort and not completion.token_ids:
            return
        kept = self._until_its_end(completion)
        self.segments.append(kept)
        self.servers.append((server, len(kept.token_ids)))

    def _until_its_end(self, completion: Completion) -> Completion:
        """Tokens up to the end of the response, with the reason that they give: the one place where it is
        decided whether a response is finished.

        The server's word counts where the tokens leave it open, as it may have stop ids of its own. An abort
        says nothing: SGLang lets an aborted request take one more step and reports `abort` before it looks at
        stop ids and at the limit (sglang 0.5.23, srt/managers/schedule_batch.py, Req.update_finish_state).
        """
        room = self.params["max_new_tokens"] - self.num_tokens
        token_ids, stops = completion.token_ids[:room], self.params["stop_token_ids"]
        end = next((i + 1 for i, token_id in enumerate(token_ids) if token_id in stops), None)
        if end is not None:
            return completion.first(end, FinishReason.stop)
        if len(token_ids) == room and completion.finish_reason is FinishReason.abort:
            return completion.first(room, FinishReason.length)
        return completion

    def next_turn(
        self, response_ids: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int]
    ) -> Sample:
        """A further turn of the same response, after the tokens that it has so far."""
        turn = f"-turn{len(response_ids)}"
        return Sample(
            prompt=self.prompt,
            index=self.index,
            name=f"{self.name}{turn}",
            seed_key=f"{self.seed_key}{turn}",
            params={
                **self.params,
                "max_new_tokens": max_tokens,
                "stop_token_ids": [*self.params["stop_token_ids"], *stop_token_ids],
            },
            context=[*self.prompt.token_ids, *response_ids],
            server=self.server,
        )

    def completion(self) -> Completion:
        """All that was sampled, as if by one request."""
        topk_ids = [s.topk_ids for s in self.segments if s.topk_ids is not None]
        topk_logprobs = [s.topk_logprobs for s in self.segments if s.topk_logprobs is not None]
        return Completion(
            _joined(s.token_ids for s in self.segments),
            _joined(s.logprobs for s in self.segments),
            _joined(s.policy_versions for s in self.segments),
            self.segments[-1].finish_reason,
            _joined(topk_ids) if topk_ids else None,
            _joined(topk_logprobs) if topk_logprobs else None,
            join_routes([s.routes for s in self.segments]),
        )

    def rollout(self, decode: Decode) -> Rollout:
        """The finished response."""
        completion = self.completion()
        return Rollout(
            prompt=self.prompt,
            sample_index=self.index,
            response_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            policy_versions=completion.policy_versions,
            finish_reason=completion.finish_reason,
            text=decode(completion.token_ids),
            topk_ids=completion.topk_ids,
            topk_logprobs=completion.topk_logprobs,
            routes=completion.routes,
            servers=self.servers,
        )


def _joined(parts: Iterable[list[T]]) -> list[T]:
    return [*chain.from_iterable(parts)]


def join_routes(parts: Sequence[Routes | None]) -> Routes | None:
    """Routes of a response sampled by several requests, each of which tells those of all tokens before it as
    well.

    A token keeps what the first request says of it: later ones may have computed it again with other weights,
    while its logprob is of the first.
    """
    joined: Routes | None = None
    for part in parts:
        if part is None:
            return None
        joined = part if joined is None else torch.cat([joined, part[len(joined) :]])
    return joined


def seed_of(key: str) -> int:
    """A seed in [0, 2^63): stable across machines, layouts and Python versions."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def sample_seed_key(run_seed: int, step: int, prompt_id: int, sample_index: int, round_index: int = 0) -> str:
    """What the randomness of one sample of a run depends on."""
    return f"{run_seed}/{step}/{prompt_id}/{sample_index}" + (f"/{round_index}" if round_index else "")
