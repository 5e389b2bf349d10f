"""From prompts to groups of rollouts, over any number of servers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megatron_drpo.config import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SampleRequest, SGLangClient, run_all
from megatron_drpo.rollout.completion import parse_completion
from megatron_drpo.types import Prompt, Rollout, RolloutGroup

T = TypeVar("T")
_POLL_S = 0.1


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that is used here."""

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class _Sample:
    """One rollout to ask for."""

    prompt: Prompt
    index: int
    request: SampleRequest


@dataclass(frozen=True, slots=True)
class _Batch:
    """What holds for all samples of one `generate`."""

    policy_version: int
    num_topk: int


class RolloutEngine:
    """Asks the servers for rollouts. Synchronous outside; an interrupt cancels the requests in flight."""

    def __init__(
        self,
        config: RolloutConfig,
        endpoints: Sequence[str],
        tokenizer: Tokenizer,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        seed: int,
    ) -> None:
        """
        Args:
            endpoints: base URLs of the servers.
            stop_token_ids: the model's end-of-sequence ids; `config.stop_token_ids` are added.
            vocab_size: rows of the model's embedding; larger input ids are refused.
            seed: of the run; with step, round, prompt id and sample index it determines each sample's seed.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._stop_token_ids = sorted({*stop_token_ids, *config.stop_token_ids})
        self._vocab_size = vocab_size
        self._seed = seed
        self._clients = [
            SGLangClient(url, timeout_s=config.request_timeout_s, num_retries=config.num_retries)
            for url in endpoints
        ]
        self._runner = asyncio.Runner()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when every server answers /health.

        Raises:
            RolloutError: names the servers that do not in time, or, with `config.deterministic`, a server
                that was not started for it.
        """
        self._run(self._wait_until_ready(timeout_s))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        policy_version: int,
        step: int,
        round_index: int = 0,
        num_topk: int = 0,
        num_samples_per_prompt: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[RolloutGroup]:
        """Sample responses to every prompt.

        Args:
            policy_version: the trainer's; an older token is accepted and says so, a newer one is an error.
            step, round_index: enter the seeds, so that a prompt gets new samples when it comes again, in
                another step or in another round of the same step.
            num_topk: most probable ids to report with each response token, as `Rollout.topk_ids`; 0: none.
            num_samples_per_prompt, temperature, top_p: the configuration's unless given.
            on_progress: called with the number of samples finished so far.

        Returns:
            One group per prompt, in order, with its samples by index.

        Raises:
            RolloutError: names the server and the request.
        """
        num_samples = num_samples_per_prompt or self._config.num_samples_per_prompt
        params: dict[str, Any] = {
            "max_new_tokens": self._config.max_response_tokens,
            "temperature": self._config.temperature if temperature is None else temperature,
            "top_p": self._config.top_p if top_p is None else top_p,
            "top_k": self._config.top_k,
            "stop_token_ids": self._stop_token_ids,
            "no_stop_trim": True,
        }
        groups = [
            [self._sample(prompt, index, (step, round_index), params) for index in range(num_samples)]
            for prompt in prompts
        ]
        report = on_progress or (lambda num_finished: None)
        collect = self._closed_batch if self._config.deterministic else self._concurrently
        return self._run(collect(groups, _Batch(policy_version, num_topk), report))

    def close(self) -> None:
        """Close all connections."""

        async def close() -> None:
            for client in self._clients:
                await client.close()

        self._run(close())
        self._runner.close()

    # ---------------------------------------------------------------------------------- requests

    def _sample(self, prompt: Prompt, index: int, time: tuple[int, int], params: dict[str, Any]) -> _Sample:
        step, round_index = time
        seed = sample_seed(self._seed, step, prompt.id, index, round_index)
        round_name = f"-round{round_index}" if round_index else ""
        request = SampleRequest(
            rid=f"step{step}{round_name}-prompt{prompt.id}-sample{index}",
            token_ids=prompt.token_ids,
            sampling_params={**params, "sampling_seed": seed},
        )
        return _Sample(prompt, index, request)

    async def _closed_batch(
        self, groups: list[list[_Sample]], batch: _Batch, report: Callable[[int], None]
    ) -> list[RolloutGroup]:
        """All samples in one request, in order, so that the server's batches depend on nothing else."""
        samples = [sample for group in groups for sample in group]
        if not samples:
            return []
        client = self._clients[samples[0].prompt.id % len(self._clients)]
        rollouts = iter(await self._request(client, samples, batch))
        report(len(samples))
        return [
            RolloutGroup(prompt=group[0].prompt, rollouts=[next(rollouts) for _ in group]) for group in groups
        ]

    async def _concurrently(
        self, groups: list[list[_Sample]], batch: _Batch, report: Callable[[int], None]
    ) -> list[RolloutGroup]:
        """One request per group, each to the server with the fewest in flight.

        Not one per sample: the server computes a group's prompt once, and HTTP costs milliseconds a request.
        """
        in_flight = dict.fromkeys(self._clients, 0)
        free = asyncio.Semaphore(self._config.max_concurrent_requests)
        num_finished = 0

        async def run(group: list[_Sample]) -> RolloutGroup:
            nonlocal num_finished
            async with free:
                client = min(self._clients, key=lambda client: in_flight[client])
                in_flight[client] += 1
                try:
                    rollouts = await self._request(client, group, batch)
                finally:
                    in_flight[client] -= 1
            num_finished += len(rollouts)
            report(num_finished)
            return RolloutGroup(prompt=group[0].prompt, rollouts=rollouts)

        return await run_all(run(group) for group in groups)

    async def _request(self, client: SGLangClient, samples: list[_Sample], batch: _Batch) -> list[Rollout]:
        responses = await client.generate(
            [sample.request for sample in samples],
            extra_key=str(batch.policy_version),
            vocab_size=self._vocab_size,
            num_topk=batch.num_topk,
        )
        completions = [
            parse_completion(
                response,
                newest_version=batch.policy_version,
                where=f"{client.endpoint}/generate: request {sample.request.rid}",
                vocab_size=self._vocab_size,
                num_topk=batch.num_topk,
            )
            for sample, response in zip(samples, responses, strict=True)
        ]
        texts = self._tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        return [
            Rollout(
                prompt=sample.prompt,
                sample_index=sample.index,
                response_ids=completion.token_ids,
                rollout_logprobs=completion.logprobs,
                policy_versions=completion.policy_versions,
                finish_reason=completion.finish_reason,
                text=text,
                topk_ids=completion.topk_ids,
                topk_logprobs=completion.topk_logprobs,
            )
            for sample, completion, text in zip(samples, completions, texts, strict=True)
        ]

    async def _wait_until_ready(self, timeout_s: float) -> None:
        waiting = list(self._clients)
        try:
            async with asyncio.timeout(timeout_s):
                while waiting := [client for client in waiting if not await client.is_healthy()]:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            names = ", ".join(client.endpoint for client in waiting)
            raise RolloutError(
                f"rollout server {names}: /health did not answer within {timeout_s:g} s"
            ) from None
        if self._config.deterministic:
            await self._check_deterministic()

    async def _check_deterministic(self) -> None:
        for client in self._clients:
            info = await client.server_info()
            if not info.get("enable_deterministic_inference"):
                raise RolloutError(
                    f"{client.endpoint}: rollout.deterministic=true needs a server started with "
                    "--deterministic (SGLang: --enable-deterministic-inference)"
                )

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)


def sample_seed(run_seed: int, step: int, prompt_id: int, sample_index: int, round_index: int = 0) -> int:
    """The seed of one sample, in [0, 2^63): stable across machines, layouts and Python versions."""
    key = f"{run_seed}/{step}/{prompt_id}/{sample_index}" + (f"/{round_index}" if round_index else "")
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
