"""What a request meets, and what becomes of its samples, with servers that follow a script."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SampleRequest, SGLangClient
from megatron_drpo.rollout.http_errors import (
    NotDoneError,
    ServerFailureError,
    ServerTimeoutError,
    UnavailableError,
    UnreachableError,
)
from megatron_drpo.rollout.pool import ServerPool
from megatron_drpo.rollout.sample import Sample
from megatron_drpo.rollout.sampler import Sampler
from megatron_drpo.types import FinishReason, Prompt

A, B = "http://a", "http://b"
Step = Callable[[Sequence[SampleRequest]], list[dict[str, Any]]]


def answer(ids: list[int], version: str = "7", kind: str = "stop", message: str = "") -> dict[str, Any]:
    """As SGLang's /generate."""
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": kind, **({"message": message} if message else {})},
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5, i, None] for i in ids],
        },
    }


class Client:
    """Its answers, or the errors it raises, in order; then each sample gets token 5."""

    def __init__(self, endpoint: str, script: list[Step | Exception]) -> None:
        self.endpoint = endpoint
        self.script = script
        self.requests: list[SampleRequest] = []
        self.keys: list[str] = []
        self.aborted: list[str] = []
        self.abort_event = asyncio.Event()
        self.held: list[int] = [4, 4]
        """What a request that is aborted has by then."""
        self.is_healthy = False
        self.times: list[float] = []
        """When requests came."""

    async def generate(
        self, requests: Sequence[SampleRequest], *, extra_key: str, **_: Any
    ) -> list[dict[str, Any]]:
        self.requests += requests
        self.times.append(time.monotonic())
        self.keys.append(extra_key)
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if step is None:
            return [answer([5], version=extra_key) for _ in requests]
        result = step(requests)
        if not result:  # held until it is aborted
            await self.abort_event.wait()
            self.abort_event.clear()
            await asyncio.sleep(0.1)  # an aborted request decodes once more
            return [answer(self.held, version=extra_key, kind="abort") for _ in requests]
        return result

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)
        self.abort_event.set()

    async def generates(self, *, timeout_s: float) -> bool:
        return self.is_healthy

    async def close(self) -> None:
        return


class Bench:
    """A sampler over A and B."""

    def __init__(self, scripts: dict[str, list[Step | Exception]], **fields: Any) -> None:
        self.clients: dict[str, Client] = {}
        config = replace(RolloutConfig(no_server_timeout_s=1.0), **fields)

        def build(endpoint: str) -> SGLangClient:
            self.clients[endpoint] = Client(endpoint, scripts.get(endpoint, []))
            return cast(SGLangClient, self.clients[endpoint])

        self.pool = ServerPool(config, build)
        self.sampler = Sampler(config, self.pool, vocab_size=50)
        self.sampler.policy_version = 7


def run(
    test: Callable[[Bench], Coroutine[Any, Any, None]],
    scripts: dict[str, list[Step | Exception]],
    **fields: Any,
) -> None:
    async def main() -> None:
        bench = Bench(scripts, **fields)
        await bench.pool.set_servers([A, B])
        try:
            await test(bench)
        finally:
            await bench.pool.close()

    asyncio.run(main())


def make_samples(count: int) -> list[Sample]:
    prompt = Prompt(id=3, text="", token_ids=(7, 8))
    params = {"max_new_tokens": 10, "stop_token_ids": [1]}
    return [
        Sample(prompt=prompt, index=i, name=f"sample{i}", seed_key=f"0/{i}", params=params)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "error",
    [
        UnreachableError("reset"),
        UnavailableError("HTTP 502"),
        NotDoneError("HTTP 503"),
        ServerTimeoutError("no answer"),
        ServerFailureError("HTTP 500"),
    ],
)
def test_a_failed_request_goes_elsewhere_under_another_id(error: Exception) -> None:
    async def test(bench: Bench) -> None:
        samples = make_samples(2)
        await bench.sampler.complete(samples)
        assert all(sample.is_finished for sample in samples)
        first, second = bench.clients[A].requests, bench.clients[B].requests
        assert [len(first), len(second)] == [2, 2]
        assert not {request.rid for request in first} & {request.rid for request in second}
        assert [r.sampling_params for r in first] == [r.sampling_params for r in second]
        assert bench.clients[B].keys == ["7"]
        assert bench.sampler.num_retries == 1
        # A 500 may be the request's own fault: it does not say that the server is ill.
        assert bool(bench.pool.servers[0].suspended) == (not isinstance(error, ServerFailureError))

    run(test, {A: [error]})


def test_too_many_failures_name_the_servers() -> None:
    async def test(bench: Bench) -> None:
        told = r"http 500 at b \(tried 2 times in 0\.\d s; rollout\.num_retries=1; before: http 500 at a\)"
        with pytest.raises(RolloutError, match=told):
            await bench.sampler.complete(make_samples(1))

    errors: dict[str, list[Step | Exception]] = {
        A: [ServerFailureError("http 500 at a")],
        B: [ServerFailureError("http 500 at b")],
    }
    run(test, errors, num_retries=1)


@pytest.mark.parametrize("version", ["6", "9"])
def test_tokens_of_other_weights_are_dropped_and_the_server_is_fenced(version: str) -> None:
    async def test(bench: Bench) -> None:
        (sample,) = make_samples(1)
        await bench.sampler.complete([sample])
        assert sample.completion().token_ids == [5]
        assert sample.server == B
        assert bench.pool.servers[0].suspended

    run(test, {A: [lambda requests: [answer([9, 9], version=version) for _ in requests]]})


def test_an_interrupted_sample_goes_on_from_its_tokens_with_the_new_weights() -> None:
    async def test(bench: Bench) -> None:
        samples = make_samples(2)
        work = asyncio.ensure_future(bench.sampler.complete(samples))
        await asyncio.sleep(0.05)
        await bench.sampler.interrupt()
        # Nothing decodes any more when the servers are given new weights.
        assert [sample.num_tokens for sample in samples] == [2, 2]
        assert not work.done()
        assert len(bench.clients[A].aborted) == 2
        bench.sampler.policy_version = 8
        await bench.pool.set_servers([A, B])
        await work
        for sample in samples:
            assert sample.completion().token_ids == [4, 4, 5]
            assert sample.completion().policy_versions == [7, 7, 8]
            assert sample.completion().finish_reason is FinishReason.stop
        assert [list(r.token_ids) for r in bench.clients[A].requests[2:]] == [[7, 8, 4, 4]] * 2, "same server"
        assert bench.clients[A].keys == ["7", "8"]
        assert bench.sampler.num_retries == 0, "no failure"

    run(test, {A: [lambda _: []]})


@pytest.mark.parametrize(("ids", "reason"), [([4, 1], FinishReason.stop), ([4] * 10, FinishReason.length)])
def test_a_sample_that_is_complete_when_it_is_aborted_is_not_asked_for_again(
    ids: list[int], reason: FinishReason
) -> None:
    async def test(bench: Bench) -> None:
        (sample,) = make_samples(1)
        await bench.sampler.complete([sample])
        assert (sample.completion().token_ids, sample.completion().finish_reason) == (ids, reason)
        assert len(bench.clients[A].requests + bench.clients[B].requests) == 1

    run(test, {A: [lambda _: [answer(ids, kind="abort")]]})


def abort(*messages: str) -> Step:
    """Every sample is aborted before its first token."""
    return lambda requests: [answer([], kind="abort", message=messages[0]) for _ in requests]


def test_aborts_without_a_token_are_bounded_and_the_servers_words_shown() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(RolloutError) as caught:
            await bench.sampler.complete(make_samples(2))
        assert [len(bench.clients[e].requests) for e in (A, B)] == [4, 2], "another server is tried between"
        assert "http://a/generate: request sample0-2-" in str(caught.value)
        assert "aborted without a token: the queue is full" in str(caught.value)
        assert bench.sampler.num_retries == 2

    full = abort("the queue is full")
    run(test, {A: [full] * 9, B: [full] * 9}, num_retries=2)


def test_an_abort_without_a_token_is_tried_elsewhere_and_nothing_is_lost() -> None:
    """Of two samples in one request one has ended: it is not asked for again."""

    async def test(bench: Bench) -> None:
        samples = make_samples(2)
        await bench.sampler.complete(samples)
        assert [sample.completion().token_ids for sample in samples] == [[9], [5]]
        assert [request.rid.split("-")[0] for request in bench.clients[B].requests] == ["sample1"]
        assert bench.sampler.num_retries == 1

    run(test, {A: [lambda _: [answer([9]), answer([], kind="abort")]]})


def test_aborts_that_were_asked_for_do_not_count() -> None:
    """Interrupted before the first token, again and again, as on a server whose queue is long."""

    async def test(bench: Bench) -> None:
        samples = make_samples(2)
        work = asyncio.ensure_future(bench.sampler.complete(samples))
        await asyncio.sleep(0)
        bench.clients[A].held = []
        for version in range(8, 12):
            await asyncio.sleep(0.05)
            await bench.sampler.interrupt()
            await asyncio.sleep(0.05)
            assert not work.done()
            bench.sampler.policy_version = version
            await bench.pool.set_servers([A])
        await work
        assert len(bench.clients[A].requests) == 10
        assert all(sample.completion().policy_versions == [11] for sample in samples)
        assert bench.sampler.num_retries == 0

    run(test, {A: [lambda _: []] * 4}, num_retries=0)


def unavailable(number: int = 1, retry_after_s: float = 0.0) -> list[Step | Exception]:
    return [NotDoneError("http://a: HTTP 503: busy", retry_after_s=retry_after_s)] * number


async def alone(bench: Bench) -> Client:
    """A healthy server A, and no other."""
    await bench.pool.set_servers([A])
    bench.clients[A].is_healthy = True
    return bench.clients[A]


def test_a_server_that_is_not_available_for_a_while_ends_nothing() -> None:
    """Three refusals, and no failure is allowed; the pauses double."""

    async def test(bench: Bench) -> None:
        client = await alone(bench)
        (sample,) = make_samples(1)
        await bench.sampler.complete([sample])
        assert sample.completion().token_ids == [5]
        assert bench.sampler.num_retries == 3
        pauses = [later - earlier for earlier, later in pairwise(client.times)]
        assert pauses[0] >= 0.1
        assert pauses[1] >= 0.2
        assert pauses[2] >= 0.4

    run(test, {A: unavailable(3)}, num_retries=0, no_server_timeout_s=30.0)


def test_it_is_given_up_in_the_end_and_the_error_says_how_often_it_was_tried() -> None:
    async def test(bench: Bench) -> None:
        client = await alone(bench)
        start = time.monotonic()
        told = r"^http://a: HTTP 503: busy \(tried (\d) times in (\d\.\d) s; rollout\.no_server_timeout_s=1\)"
        with pytest.raises(RolloutError, match=told) as caught:
            await bench.sampler.complete(make_samples(1))
        assert 1.0 <= time.monotonic() - start < 10
        match = re.match(told, str(caught.value))
        assert match is not None
        assert int(match[1]) == len(client.requests) <= 7
        assert float(match[2]) >= 1.0

    run(test, {A: unavailable(99)}, num_retries=0)


def test_without_a_server_that_generates_the_reason_is_the_servers() -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.set_servers([A])
        with pytest.raises(RolloutError) as caught:
            await bench.sampler.complete(make_samples(1))
        assert str(caught.value).startswith("http://a: HTTP 503: busy (tried once; no rollout server took re")
        assert "rollout.no_server_timeout_s=1: http://a: 0 samples in flight, suspended:" in str(caught.value)

    run(test, {A: unavailable(99)})


def test_a_pause_that_a_server_asks_for_is_kept_by_all_requests() -> None:
    """And through a weight update; another server is asked at once."""

    async def test(bench: Bench) -> None:
        client = await alone(bench)
        first = asyncio.ensure_future(bench.sampler.complete(make_samples(1)))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(bench.sampler.complete(make_samples(1)))
        await bench.pool.set_servers([A])
        await asyncio.gather(first, second)
        refused, *later = client.times
        assert len(later) == 2
        assert min(later) - refused >= 0.8
        client.script += unavailable(1, retry_after_s=60.0)
        await bench.pool.set_servers([A, B])
        start = time.monotonic()
        await bench.sampler.complete(make_samples(1))
        assert time.monotonic() - start < 5
        assert len(bench.clients[B].requests) == 1

    run(test, {A: unavailable(1, retry_after_s=0.8)}, no_server_timeout_s=30.0)


def test_only_what_may_be_the_requests_fault_is_counted() -> None:
    async def test(bench: Bench) -> None:
        await alone(bench)
        (sample,) = make_samples(1)
        await bench.sampler.complete([sample])
        assert sample.completion().token_ids == [5]

    failure = ServerFailureError("HTTP 500")
    run(test, {A: [*unavailable(1), failure, *unavailable(1)]}, num_retries=1, no_server_timeout_s=30.0)


def test_a_prompt_that_always_fails_does_not_block_the_run() -> None:
    async def test(bench: Bench) -> None:
        client = await alone(bench)
        told = r"HTTP 500 \(tried 3 times in \d\.\d s; rollout\.num_retries=2\)$"
        with pytest.raises(RolloutError, match=told):
            await bench.sampler.complete(make_samples(1))
        assert len(client.requests) == 3
        assert client.times[2] - client.times[0] >= 0.3, "with pauses"

    run(test, {A: [ServerFailureError("HTTP 500")] * 99}, num_retries=2, no_server_timeout_s=30.0)


def test_failures_are_counted_between_tokens() -> None:
    """A long response may meet more of them than a single request."""

    async def test(bench: Bench) -> None:
        await alone(bench)
        (sample,) = make_samples(1)
        await bench.sampler.complete([sample])
        assert sample.completion().token_ids == [4, 4, 5]

    failure, part = ServerFailureError("HTTP 500"), [answer([4], kind="abort")]
    run(test, {A: [failure, lambda _: part, failure, lambda _: part, failure]}, num_retries=1)


def test_a_refusal_is_final() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(RolloutError, match=r"^HTTP 413: too long$"):
            await bench.sampler.complete(make_samples(1))
        assert len(bench.clients[A].requests) == 1
        assert bench.clients[B].requests == []

    run(test, {A: [RolloutError("HTTP 413: too long")]}, num_retries=9)
