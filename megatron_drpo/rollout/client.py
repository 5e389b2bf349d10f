"""An asynchronous client of one server that speaks SGLang's native HTTP API.

Endpoints: https://docs.sglang.io/basic_usage/native_api.html. The embedded server speaks the same subset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.answer import Answer, shorten
from megatron_drpo.rollout.http_errors import (
    RetryableError,
    ServerTimeoutError,
    UnavailableError,
    UnreachableError,
    refusal,
)

T = TypeVar("T")
_KEEPALIVE_S = 2.0
"""Below the 5 s after which uvicorn, under either server, closes an idle connection."""
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One response to ask for."""

    rid: str
    """Names the request in errors and to `abort`; a server refuses the id of a request that it still runs."""
    token_ids: Sequence[int]
    sampling_params: dict[str, Any]
    """SGLang's sampling_params."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """How busy a server is."""

    num_running: int
    """Requests that are decoded."""
    num_queued: int
    """Requests that wait for room."""
    tokens_per_s: float | None
    """Generated lately; None: not measured. SGLang measures it with --enable-metrics alone."""


class SGLangClient:
    """Requests to one server, each tried once. Every failure is an error that names the server and the
    endpoint; a RetryableError unless the request itself was wrong."""

    def __init__(self, endpoint: str, *, timeout_s: float, api_key: str | None = None) -> None:
        """
        Args:
            endpoint: base URL, such as http://127.0.0.1:30000.
            timeout_s: limit of a request, from connecting to the last byte of the answer.
            api_key: sent with every request, as a bearer token.
        """
        self.endpoint = endpoint.rstrip("/")
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=self.endpoint,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),  # the whole attempt has its own limit
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_S),
            trust_env=False,  # a proxy for the internet is no way to a rollout server
            verify=self.endpoint.startswith("https:"),  # loading the certificates takes 20 ms
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # ------------------------------------------------------------------------------- generation

    async def generate(
        self,
        requests: Sequence[SampleRequest],
        *,
        extra_key: str,
        vocab_size: int,
        num_topk: int = 0,
        return_routes: bool = False,
    ) -> list[dict[str, Any]]:
        """Sample one response per request, all in one batch; SGLang's response objects in the same order.

        Args:
            extra_key: separates prefix caches: give the policy version, or the server may continue from
                keys and values of older weights.
            vocab_size: input ids at or above it are refused here; some servers die of them.
            num_topk: most probable ids to report with each response token; 0: none.
            return_routes: report the experts of every token.

        Raises:
            RolloutError: names the server, the endpoint, the status and the first line of the answer.
        """
        for request in requests:
            outside = [i for i in request.token_ids if not 0 <= i < vocab_size]
            if outside:
                raise RolloutError(
                    f"request {request.rid}: input id {outside[0]} is not in 0..{vocab_size - 1}"
                )

        fields: dict[str, Any] = {
            "rid": [request.rid for request in requests],
            "input_ids": [list(request.token_ids) for request in requests],
            "sampling_params": [request.sampling_params for request in requests],
            "return_logprob": True,
            "extra_key": extra_key,
        }
        if num_topk:
            fields["top_logprobs_num"] = num_topk
        if return_routes:
            fields["return_routed_experts"] = True
        answer = await self._request("POST", "/generate", json=fields)
        if not isinstance(answer, list) or len(answer) != len(requests):
            raise RolloutError(
                f"{self.endpoint}/generate: the answer is {shorten(answer)}; expected a list of "
                f"{len(requests)} responses"
            )
        return answer

    # ------------------------------------------------------------------------------ information

    async def health_problem(self) -> RolloutError | None:
        """Why /health does not answer 200; None: it does."""
        try:
            await self._request("GET", "/health", parse=False)
        except RolloutError as error:
            return error
        return None

    async def generates(self, *, timeout_s: float) -> bool:
        """Whether /health_generate answers in time: a token was sampled, or requests in flight made
        progress."""
        try:
            await self._request("GET", "/health_generate", parse=False, timeout_s=timeout_s)
        except RolloutError:
            return False
        return True

    async def abort(self, rid: str) -> None:
        """End a request with what it has; its finish reason is then `abort`. Harmless if it has ended."""
        await self._request("POST", "/abort_request", parse=False, json={"rid": rid})

    async def weight_version(self) -> str:
        """The version of the weights the server has now."""
        info = Answer(await self._request("GET", "/model_info"), f"{self.endpoint}/model_info")
        return info.get("weight_version", str)

    async def server_info(self) -> dict[str, Any]:
        """The server's start-up arguments, `tp_size` among them."""
        return Answer(await self._request("GET", "/server_info"), f"{self.endpoint}/server_info").fields

    async def load(self) -> ServerLoad | None:
        """How busy the server is, over all its schedulers; None: it does not tell, as the embedded server.

        Source: sglang 0.5.23, srt/entrypoints/v1_loads.py and srt/managers/load_snapshot.py.
        """
        where = f"{self.endpoint}/v1/loads"
        try:
            answer = await self._request("GET", "/v1/loads", params={"include": "core"})
        except RetryableError:
            raise
        except RolloutError:  # 404
            return None
        loads = [*Answer(answer, where).objects("loads")]
        num_running = sum(load.get("num_running_reqs", int) for load in loads)
        num_queued = sum(load.get("num_waiting_reqs", int) for load in loads)
        tokens_per_s = sum(load.get("gen_throughput", float) for load in loads)
        return ServerLoad(
            num_running=num_running,
            num_queued=num_queued,
            tokens_per_s=tokens_per_s if tokens_per_s or not num_running else None,
        )

    # -------------------------------------------------------------------------------- transport

    async def _request(
        self, method: str, path: str, *, parse: bool = True, timeout_s: float | None = None, **kwargs: Any
    ) -> Any:
        where = f"{self.endpoint}{path}"
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        # A task of its own, which is cancelled once: cancelled by who asked and by the limit, it would be
        # interrupted while it closes its connection.
        request = asyncio.ensure_future(self._http.request(method, path, **kwargs))
        try:
            await asyncio.wait({request}, timeout=limit_s)
            if not request.done():
                raise ServerTimeoutError(f"{where}: no answer within {limit_s:g} s")
            response = request.result()
        except httpx.RequestError as error:
            raise UnreachableError(f"{where}: cannot be reached: {error or type(error).__name__}") from error
        finally:
            request.cancel()
            request.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it
        if not response.is_success:
            raise refusal(where, response)
        if not parse:
            return None
        try:
            return response.json()
        except (ValueError, RecursionError) as error:  # of something before the server, or of another server
            raise UnavailableError(f"{where}: the answer is not JSON: {shorten(response.text)}") from error


async def run_all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls at the same time; the first RolloutError cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except* RolloutError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
