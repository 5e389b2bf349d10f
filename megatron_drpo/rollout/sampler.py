"""Samples to finished samples, whatever happens to the servers meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.rollout.completion import (
    Completion,
    RouteShape,
    WrongVersionError,
    parse_completion,
)
from megatron_drpo.rollout.failures import Failures
from megatron_drpo.rollout.http_errors import RetryableError, ServerTimeoutError, UnavailableError
from megatron_drpo.rollout.pool import NoServerError, PooledServer, ServerLostError, ServerPool
from megatron_drpo.rollout.sample import Sample

_ABORT_LIMIT_S = 10.0
"""For aborted requests to end; a server that takes longer is found out by the weight update that follows."""
_ABORT_POLL_S = 0.005


class AbortedError(RetryableError):
    """A server ended a request before its first token, and this program had not asked for it."""


class Sampler:
    """Sends requests; used in the engine's event loop alone.

    A request that fails goes to another server under a new id, if there is one, or waits a little; nothing is
    taken over from the failed attempt, so that no sample is lost or counted twice. A sample that a server
    aborted goes on from the tokens it has.
    """

    def __init__(
        self, config: RolloutConfig, pool: ServerPool, vocab_size: int, route_shape: RouteShape | None = None
    ) -> None:
        self._config = config
        self._route_shape = route_shape
        self._pool = pool
        self._vocab_size = vocab_size
        self.policy_version = 0
        """Of the weights that all servers of the pool have."""
        self._in_flight: defaultdict[str, set[str]] = defaultdict(set)
        """Ids of requests by endpoint."""
        self._interrupted: set[str] = set()
        """Ids of requests whose abort this program asked for."""
        self.num_retries = 0
        """Requests that were sent again since the run began."""

    async def complete(
        self, samples: Sequence[Sample], *, num_topk: int = 0, server: str | None = None
    ) -> None:
        """Bring all samples to their end, those in one request that are at the same point.

        Args:
            num_topk: most probable ids to report with each token.
            server: preferred endpoint for samples that have none yet.

        Raises:
            RolloutError: names the server and the request.
        """
        failures = Failures(self._config, self._pool)
        while waiting := [sample for sample in samples if not sample.is_finished]:
            preferred, num_tokens = waiting[0].server or server, _count_tokens(samples)
            try:
                async with self._pool.lease(
                    len(waiting), preferred=preferred, avoid=failures.avoid
                ) as leased:
                    begun = self._pool.clock()
                    failure = await self._try(leased, waiting, num_topk)
            except NoServerError as error:
                raise failures.ending(str(error)) from error
            if _count_tokens(samples) > num_tokens:
                failures = Failures(self._config, self._pool)
            if failure is not None:
                failures.add(failure, leased.endpoint, begun)
                self.num_retries += 1
                await failures.pause()

    async def _try(
        self, server: PooledServer, samples: list[Sample], num_topk: int
    ) -> RetryableError | WrongVersionError | None:
        """One attempt; how it failed if another one may succeed."""
        try:
            await self._attempt(server, samples, num_topk)
        except ServerLostError:
            self.num_retries += 1
        except (RetryableError, WrongVersionError) as error:
            if isinstance(error, WrongVersionError):
                self._pool.fence(server, str(error))
            elif isinstance(error, UnavailableError):
                self._pool.suspend(server, str(error), at_least_s=error.retry_after_s)
            elif isinstance(error, ServerTimeoutError):
                self._pool.suspend(server, str(error))
            return error
        return None

    async def interrupt(self) -> None:
        """End all requests in flight with the tokens they have; they go on after the next `set_servers`.

        It returns when they have ended: one that is aborted decodes once more, and a server that is given
        weights before that would do so with new weights over the old ones' cache.
        """
        self._pool.hold()
        busy = [server for server in self._pool.servers if server.num_in_flight and not server.suspended]
        await asyncio.gather(*(self._interrupt(server) for server in busy))

    async def _interrupt(self, server: PooledServer) -> None:
        in_flight = self._in_flight[server.endpoint]
        rids = {*in_flight}
        for rid in rids:
            self._interrupted.add(rid)
            try:
                await server.client.abort(rid)
            except RetryableError as error:
                self._pool.suspend(server, str(error))
                return
        end = time.monotonic() + _ABORT_LIMIT_S
        while in_flight & rids and time.monotonic() < end:
            await asyncio.sleep(_ABORT_POLL_S)

    async def _attempt(self, server: PooledServer, samples: list[Sample], num_topk: int) -> None:
        version = self.policy_version
        requests = [sample.next_request() for sample in samples]
        for sample in samples:
            sample.server = server.endpoint
        in_flight, rids = self._in_flight[server.endpoint], {request.rid for request in requests}
        in_flight |= rids
        try:
            responses = await server.run(
                server.client.generate(
                    requests,
                    extra_key=str(version),
                    vocab_size=self._vocab_size,
                    num_topk=num_topk,
                    return_routes=self._route_shape is not None,
                )
            )
        finally:
            in_flight -= rids
            interrupted = self._interrupted & rids
            self._interrupted -= rids
        completions: list[Completion] = []
        for request, response in zip(requests, responses, strict=True):
            completions.append(
                parse_completion(
                    response,
                    request=request,
                    oldest_version=version,
                    # A server has new weights a moment before this replica hears of it.
                    newest_version=self.policy_version + 1,
                    where=f"{server.endpoint}/generate: request {request.rid}",
                    vocab_size=self._vocab_size,
                    num_topk=num_topk,
                    route_shape=self._route_shape,
                )
            )
        for sample, completion in zip(samples, completions, strict=True):
            sample.add(completion, server.endpoint)
        for request, completion in zip(requests, completions, strict=True):
            if not completion.token_ids and request.rid not in interrupted:
                raise AbortedError(
                    f"{server.endpoint}/generate: request {request.rid}: aborted without a token: "
                    f"{completion.abort_message or '(no reason given)'}"
                )


def _count_tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.num_tokens for sample in samples)
