"""From prompts to groups of rollouts, over any number of servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import DrpoError, RolloutError
from megatron_drpo.rollout.client import SGLangClient, run_all
from megatron_drpo.rollout.completion import RouteShape
from megatron_drpo.rollout.conversation import Conversation, RolloutFunction, load_rollout_function
from megatron_drpo.rollout.event_loop import EventLoopThread
from megatron_drpo.rollout.http_errors import RetryableError
from megatron_drpo.rollout.pool import ServerPool
from megatron_drpo.rollout.retry import retry_while_unavailable
from megatron_drpo.rollout.sample import Sample, sample_seed_key
from megatron_drpo.rollout.sampler import Sampler
from megatron_drpo.rollout.time_limits import startup_limit_s
from megatron_drpo.types import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POLL_S = 0.1
SGLANG_STOPS = frozenset({"<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>"})
"""Added tokens at which SGLang ends every response (sglang 0.5.23, srt/utils/hf_transformers/common.py). They
are asked for: a response that is aborted just then does not say that it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How prompts are sampled; what is not given is the configuration's."""

    step: int
    """With the round it enters the seeds, so that a prompt gets new samples when it comes again."""
    round_index: int = 0
    num_topk: int = 0
    """Most probable ids to report with each response token, as `Rollout.topk_ids`; 0: none."""
    num_samples_per_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(slots=True, kw_only=True)
class PendingGroup:
    """A group that is being sampled."""

    prompt: Prompt
    policy_version: int
    """When it was submitted: no token of it is older."""
    future: Future[RolloutGroup]


class RolloutEngine:
    """Asks the servers for rollouts, in a thread of its own; call it from one thread."""

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        seed: int,
        route_shape: RouteShape | None = None,
        *,
        keep_special_tokens: bool = False,
    ) -> None:
        """
        Args:
            stop_token_ids: the model's end-of-sequence ids; `config.stop_token_ids` are added.
            vocab_size: rows of the model's embedding; larger input ids are refused.
            seed: of the run; with step, round, prompt id and sample index it determines each sample's seed.
            route_shape: of the experts that are to be reported with each token; None: none are.
            keep_special_tokens: in the text of a rollout.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._skip_special_tokens = not keep_special_tokens
        own_stops = {i for token, i in tokenizer.get_added_vocab().items() if token in SGLANG_STOPS}
        self._stop_token_ids = sorted({*stop_token_ids, *config.stop_token_ids, *own_stops})
        self._seed = seed
        self._function = None if config.function is None else load_rollout_function(config.function)
        self._loop = EventLoopThread("rollout")
        self._pool = ServerPool(config, self._build_client)
        self._sampler = Sampler(config, self._pool, vocab_size, route_shape)
        self._slots: asyncio.Semaphore | None = None
        self._num_unfinished = 0

    # ------------------------------------------------------------------------------------ servers

    def set_servers(self, endpoints: Sequence[str], policy_version: int) -> None:
        """These servers have the weights of this version; from now on requests go to them and to no other.
        What is in flight elsewhere is sent again.

        Raises:
            RolloutError: with `config.deterministic`, a server that was not started for it.
        """

        async def set_servers() -> None:
            known = {server.endpoint for server in self._pool.servers}
            self._sampler.policy_version = policy_version
            await self._pool.set_servers(endpoints)
            if self._config.deterministic:
                new = [server.client for server in self._pool.servers if server.endpoint not in known]
                limit_s = self._config.no_server_timeout_s
                await run_all(_check_deterministic(client, limit_s) for client in new)

        self._loop.run(set_servers())

    def expect_update(self) -> None:
        """The servers are given weights, and may generate nothing until `set_servers`."""

        async def expect_update() -> None:
            self._pool.expect_update()

        self._loop.run(expect_update())

    def interrupt(self) -> None:
        """End all requests with the tokens they have; they go on from there after the next `set_servers`."""
        self._loop.run(self._sampler.interrupt())

    def describe(self) -> str:
        """What the engine waits for, in words."""
        return f"{self._num_unfinished} groups unfinished; {self._pool.describe()}"

    @property
    def num_retries(self) -> int:
        """Requests that were sent again since the run began."""
        return self._sampler.num_retries

    # ----------------------------------------------------------------------------------- sampling

    def submit(
        self,
        prompts: Sequence[Prompt],
        plan: SamplingPlan,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[PendingGroup]:
        """Start to sample responses to every prompt.

        Args:
            on_progress: called, in the engine's thread, with the number of samples finished so far.

        Returns:
            One pending group per prompt, in order. A future that is cancelled ends its requests.
        """
        groups = [self._group(prompt, plan) for prompt in prompts]
        report = _Progress(on_progress)
        version = self._sampler.policy_version
        if self._config.deterministic:
            futures = self._submit_closed_batch(groups, plan.num_topk, report)
        else:
            futures = [
                self._loop.submit(self._sample_group(group, plan.num_topk, report)) for group in groups
            ]
        return [
            PendingGroup(prompt=prompt, policy_version=version, future=future)
            for prompt, future in zip(prompts, futures, strict=True)
        ]

    def generate(
        self,
        prompts: Sequence[Prompt],
        plan: SamplingPlan,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[RolloutGroup]:
        """Sample responses to every prompt and wait: one group per prompt, in order, samples by index.

        Raises:
            RolloutError: names the server and the request.
        """
        pending = self.submit(prompts, plan, on_progress)
        try:
            return [group.future.result() for group in pending]
        except BaseException:
            for group in pending:
                group.future.cancel()
            raise

    def close(self) -> None:
        """End all requests and close all connections."""
        self._loop.run(self._pool.close())
        self._loop.close()

    # -------------------------------------------------------------------------------- in the loop

    def _group(self, prompt: Prompt, plan: SamplingPlan) -> list[Sample]:
        config = self._config
        params = {
            "max_new_tokens": config.max_response_tokens,
            "temperature": config.temperature if plan.temperature is None else plan.temperature,
            "top_p": config.top_p if plan.top_p is None else plan.top_p,
            "top_k": -1 if config.top_k is None else config.top_k,
            "stop_token_ids": self._stop_token_ids,
            "no_stop_trim": True,
        }
        round_name = f"-round{plan.round_index}" if plan.round_index else ""
        return [
            Sample(
                prompt=prompt,
                index=index,
                name=f"step{plan.step}{round_name}-prompt{prompt.id}-sample{index}",
                seed_key=sample_seed_key(self._seed, plan.step, prompt.id, index, plan.round_index),
                params=params,
            )
            for index in range(plan.num_samples_per_prompt or config.num_samples_per_prompt)
        ]

    async def _sample_group(
        self, group: list[Sample], num_topk: int, report: Callable[[int], None]
    ) -> RolloutGroup:
        """One request for the whole group: the server computes its prompt once, and HTTP costs
        milliseconds."""
        if self._slots is None:
            self._slots = asyncio.Semaphore(self._config.max_concurrent_requests)
        self._num_unfinished += 1
        try:
            async with self._slots:
                if self._function is None:
                    await self._sampler.complete(group, num_topk=num_topk)
                    rollouts = [sample.rollout(self._decode) for sample in group]
                else:
                    rollouts = await run_all(self._converse(sample, self._function) for sample in group)
        finally:
            self._num_unfinished -= 1
        report(len(group))
        return RolloutGroup(prompt=group[0].prompt, rollouts=rollouts)

    async def _converse(self, sample: Sample, function: RolloutFunction) -> Rollout:
        """One rollout by the user's function."""
        conversation = Conversation(
            prompt=sample.prompt,
            index=sample.index,
            max_tokens=self._config.max_response_tokens,
            policy_version=self._sampler.policy_version,
            tokenizer=self._tokenizer,
            _sample=sample,
            _complete=lambda turn: self._sampler.complete([turn]),
        )
        try:
            await function(conversation)
        except DrpoError:
            raise
        except Exception as error:
            where = f"prompt {sample.prompt.id}, sample {sample.index}"
            raise RolloutError(
                f"rollout.function={self._config.function}: {where}: {type(error).__name__}: {error}"
            ) from error
        return conversation.rollout(self._decode)

    def _submit_closed_batch(
        self, groups: list[list[Sample]], num_topk: int, report: Callable[[int], None]
    ) -> list[Future[RolloutGroup]]:
        """All samples in one request, in order, so that the server's batches depend on nothing else."""
        samples = [sample for group in groups for sample in group]
        futures: list[Future[RolloutGroup]] = [Future() for _ in groups]
        if not samples:
            return futures
        for future in futures:
            future.set_running_or_notify_cancel()  # one alone cannot be cancelled

        async def complete() -> None:
            servers = self._pool.servers
            server = servers[samples[0].prompt.id % len(servers)].endpoint if servers else None
            await self._sampler.complete(samples, num_topk=num_topk, server=server)
            report(len(samples))
            for group, future in zip(groups, futures, strict=True):
                rollouts = [sample.rollout(self._decode) for sample in group]
                future.set_result(RolloutGroup(prompt=group[0].prompt, rollouts=rollouts))

        def fail(done: Future[None]) -> None:
            for future in futures:
                if not future.done():
                    error = None if done.cancelled() else done.exception()
                    future.set_exception(error or RolloutError("the engine was closed"))

        self._loop.submit(complete()).add_done_callback(fail)
        return futures

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.batch_decode([token_ids], skip_special_tokens=self._skip_special_tokens)[0]

    def _build_client(self, endpoint: str) -> SGLangClient:
        return SGLangClient(endpoint, timeout_s=self._config.request_timeout_s, api_key=self._config.api_key)


class _Progress:
    """Adds up finished samples."""

    def __init__(self, report: Callable[[int], None] | None) -> None:
        self._report = report
        self._num_finished = 0

    def __call__(self, num_samples: int) -> None:
        self._num_finished += num_samples
        if self._report is not None:
            self._report(self._num_finished)


async def _check_deterministic(client: SGLangClient, limit_s: float) -> None:
    info = await retry_while_unavailable(client.server_info, limit_s)
    if not info.get("enable_deterministic_inference"):
        raise RolloutError(
            f"{client.endpoint}: rollout.deterministic=true needs a server started with --deterministic "
            "(SGLang: --enable-deterministic-inference)"
        )


def wait_until_ready(config: RolloutConfig, endpoints: Sequence[str]) -> None:
    """Return when every server answers /health.

    Raises:
        RolloutError: names the servers that do not within rollout.startup_timeout_s, with what they say; at
            once if one refuses, for want of the right key for example.
    """

    async def wait() -> None:
        async with AsyncExitStack() as stack:
            waiting = [
                await stack.enter_async_context(
                    SGLangClient(url, timeout_s=config.request_timeout_s, api_key=config.api_key)
                )
                for url in endpoints
            ]
            limit_s = startup_limit_s(config)
            deadline = time.monotonic() + limit_s
            while True:
                found = {client: await client.health_problem() for client in waiting}
                problems = {client: error for client, error in found.items() if error is not None}
                for error in problems.values():
                    if not isinstance(error, RetryableError):
                        raise error
                waiting = [*problems]
                if not waiting:
                    return
                if time.monotonic() > deadline:
                    names = ", ".join(client.endpoint for client in waiting)
                    raise RolloutError(
                        f"rollout server {names}: /health did not answer within "
                        f"{limit_s:g} s: {'; '.join(map(str, problems.values()))}"
                    )
                await asyncio.sleep(_POLL_S)

    asyncio.run(wait())
