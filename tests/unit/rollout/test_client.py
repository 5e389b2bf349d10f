"""The client against a server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.client import SampleRequest, ServerLoad, SGLangClient
from megatron_drpo.rollout.http_errors import (
    RetryableError,
    ServerFailureError,
    ServerTimeoutError,
    UnavailableError,
    UnreachableError,
)

Handler = Callable[[dict[str, Any]], Response]


class FakeServer:
    """Answers each path from a list of responses, the last one again and again; keeps the bodies."""

    def __init__(self, serve_app: Callable[[Any], str]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answers: list[Response] = []
        self.delay_s = 0.0
        routes = [Route("/{path:path}", self._answer, methods=["GET", "POST"])]
        self.endpoint = serve_app(Starlette(routes=routes))

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(await request.json() if await request.body() else {})
        self.keys.append(request.headers.get("Authorization"))
        await asyncio.sleep(self.delay_s)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(scope="module")
def shared_server(serve_app: Callable[[Any], str]) -> FakeServer:
    return FakeServer(serve_app)


@pytest.fixture
def server(shared_server: FakeServer) -> FakeServer:
    shared_server.bodies = []
    shared_server.delay_s = 0.0
    return shared_server


def call(
    endpoint: str,
    method: Callable[[SGLangClient], Awaitable[Any]],
    *,
    timeout_s: float = 5.0,
    api_key: str | None = None,
) -> Any:
    async def run() -> Any:
        async with SGLangClient(endpoint, timeout_s=timeout_s, api_key=api_key) as client:
            return await method(client)

    return asyncio.run(run())


def generate(client: SGLangClient) -> Awaitable[list[dict[str, Any]]]:
    requests = [
        SampleRequest(rid="r", token_ids=(1, 2), sampling_params={"max_new_tokens": 3, "sampling_seed": 9}),
        SampleRequest(rid="s", token_ids=(4,), sampling_params={"max_new_tokens": 3, "sampling_seed": 8}),
    ]
    return client.generate(requests, extra_key="7", vocab_size=10)


OK = [{"output_ids": [1]}, {"output_ids": [2]}]


def test_the_request_has_sglangs_shape(server: FakeServer) -> None:
    server.answers = [JSONResponse(OK)]
    assert call(server.endpoint, generate) == OK
    [body] = server.bodies
    assert body["input_ids"] == [[1, 2], [4]]
    assert [params["sampling_seed"] for params in body["sampling_params"]] == [9, 8]
    assert body["rid"] == ["r", "s"]
    assert "return_routed_experts" not in body
    assert body["extra_key"] == "7"
    assert body["return_logprob"] is True
    assert "top_logprobs_num" not in body


def test_most_probable_ids_are_asked_for_once_for_all_samples(server: FakeServer) -> None:
    """`top_logprobs_num` beside sampling_params, where SGLang reads it."""
    server.answers = [JSONResponse([{}])]
    request = SampleRequest(rid="r", token_ids=(1,), sampling_params={"temperature": 0.5})

    def ask(client: SGLangClient) -> Awaitable[Any]:
        return client.generate([request], extra_key="0", vocab_size=10, num_topk=20)

    call(server.endpoint, ask)
    assert server.bodies[0]["top_logprobs_num"] == 20
    assert server.bodies[0]["sampling_params"] == [{"temperature": 0.5}]


@pytest.mark.parametrize("status", [500, 501, 505])
def test_an_internal_error_may_be_the_requests_fault(server: FakeServer, status: int) -> None:
    server.answers = [PlainTextResponse("first line\nsecond line", status)]
    with pytest.raises(
        ServerFailureError, match=f"^{server.endpoint}/generate: HTTP {status}: first line$"
    ) as caught:
        call(server.endpoint, generate)
    assert not isinstance(caught.value, UnavailableError)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504])
def test_answers_that_speak_of_the_servers_state(server: FakeServer, status: int) -> None:
    server.answers = [PlainTextResponse("", status, headers={"Retry-After": "7"})]
    with pytest.raises(
        UnavailableError, match=rf"^{server.endpoint}/generate: HTTP {status}: \(no reason given\)$"
    ) as caught:
        call(server.endpoint, generate)
    assert caught.value.retry_after_s == 7
    assert len(server.bodies) == 1


@pytest.mark.parametrize("text", ["<html>", "", "[" * 100_000, "9" * 5000])
def test_an_answer_that_is_no_json_is_not_the_servers(server: FakeServer, text: str) -> None:
    """But of something before it, which has no server at present."""
    server.answers = [PlainTextResponse(text)]
    with pytest.raises(UnavailableError, match="/generate: the answer is not JSON: '") as caught:
        call(server.endpoint, generate)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n[{", b"garbage", b""])
def test_a_connection_that_is_cut(content: bytes) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(content)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UnreachableError, match="/generate: cannot be reached: "):
            call(f"http://127.0.0.1:{listener.getsockname()[1]}", generate)
        thread.join()


def test_an_answer_that_cannot_be_unpacked(server: FakeServer) -> None:
    server.answers = [Response(b"no gzip", headers={"Content-Encoding": "gzip"})]
    with pytest.raises(UnavailableError, match="/generate: cannot be reached: "):
        call(server.endpoint, generate)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "input too long\ntraceback"}},
        {"message": "input too long"},
        {"error": "input too long"},
        {"detail": "input too long"},
    ],
)
def test_other_4xx_are_the_requests_own_fault(server: FakeServer, body: dict[str, Any], status: int) -> None:
    server.answers = [JSONResponse(body, status, headers={"Retry-After": "7"})]
    with pytest.raises(RolloutError, match=rf"/generate: HTTP {status}: input too long$") as caught:
        call(server.endpoint, generate)
    assert not isinstance(caught.value, RetryableError)


def test_a_slow_answer_is_given_up_at_the_limit(server: FakeServer) -> None:
    server.answers = [JSONResponse(OK)]
    server.delay_s = 3.0
    start = time.monotonic()
    with pytest.raises(ServerTimeoutError, match=r"/generate: no answer within 0.2 s"):
        call(server.endpoint, generate, timeout_s=0.2)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("answer", [JSONResponse({}), JSONResponse([{}])])
def test_answers_of_another_kind(server: FakeServer, answer: Response) -> None:
    server.answers = [answer]
    with pytest.raises(RolloutError, match=r"expected a list of 2 responses") as caught:
        call(server.endpoint, generate)
    assert not isinstance(caught.value, RetryableError)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_an_absent_server_is_named() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UnreachableError, match=rf"{endpoint}/generate: cannot be reached: .*connect"):
        call(endpoint, generate)
    assert isinstance(call(endpoint, SGLangClient.health_problem), UnreachableError)
    assert call(endpoint, lambda client: client.generates(timeout_s=1.0)) is False


def test_proxies_of_the_environment_are_ignored(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    server.answers = [JSONResponse(OK)]
    assert call(server.endpoint, generate) == OK


def test_input_ids_outside_the_vocabulary_are_never_sent(server: FakeServer) -> None:
    request = SampleRequest(rid="r", token_ids=(1, 10), sampling_params={})
    with pytest.raises(RolloutError, match=r"request r: input id 10 is not in 0\.\.9"):
        call(server.endpoint, lambda client: client.generate([request], extra_key="0", vocab_size=10))
    assert server.bodies == []


def test_information_that_is_missing_is_an_error(server: FakeServer) -> None:
    server.answers = [JSONResponse({"weight_version": "5"})]
    assert call(server.endpoint, lambda client: client.weight_version()) == "5"
    server.answers = [JSONResponse({})]
    with pytest.raises(RolloutError, match=r"/model_info: the answer has no 'weight_version'"):
        call(server.endpoint, lambda client: client.weight_version())


@pytest.mark.parametrize(
    ("answer", "ask", "problem"),
    [
        ([], SGLangClient.weight_version, "/model_info: the answer is []; expected an object"),
        (
            {"weight_version": 5},
            SGLangClient.weight_version,
            "/model_info: weight_version is 5; expected a string",
        ),
        ([1], SGLangClient.server_info, "/server_info: the answer is [1]; expected an object"),
        ({"loads": 3}, SGLangClient.load, "/v1/loads: loads is 3; expected a list"),
        ({"loads": [3]}, SGLangClient.load, "/v1/loads: loads[0] is 3; expected an object"),
        (
            {"loads": [{"num_running_reqs": "1"}]},
            SGLangClient.load,
            "/v1/loads: loads[0].num_running_reqs is '1'; expected an integer",
        ),
        ({"no": "list"}, generate, "/generate: the answer is {'no': 'list'}; expected a list of 2 responses"),
    ],
)
def test_information_of_another_kind_is_an_error(
    server: FakeServer, answer: Any, ask: Callable[[SGLangClient], Awaitable[Any]], problem: str
) -> None:
    server.answers = [JSONResponse(answer)]
    with pytest.raises(RolloutError) as caught:
        call(server.endpoint, ask)
    assert str(caught.value) == f"{server.endpoint}{problem}"


@pytest.mark.parametrize("body", [{"error": ""}, {"message": "\n"}, {"error": {"message": None}}, ""])
def test_a_refusal_without_words(server: FakeServer, body: Any) -> None:
    server.answers = [JSONResponse(body, 400)]
    with pytest.raises(RolloutError, match=r"/generate: HTTP 400: \(no reason given\)$"):
        call(server.endpoint, generate)


def test_the_key_goes_with_every_request(server: FakeServer) -> None:
    server.answers = [JSONResponse({"weight_version": "5"})]
    call(server.endpoint, lambda client: client.weight_version(), api_key="secret")
    call(server.endpoint, lambda client: client.weight_version())
    assert server.keys[-2:] == ["Bearer secret", None]


def load_answer(*loads: tuple[int, int, float]) -> Response:
    keys = ("num_running_reqs", "num_waiting_reqs", "gen_throughput")
    return JSONResponse({"loads": [dict(zip(keys, load, strict=True)) for load in loads]})


@pytest.mark.parametrize(
    ("answer", "load"),
    [
        (load_answer((3, 1, 10.5), (4, 0, 2.0)), ServerLoad(num_running=7, num_queued=1, tokens_per_s=12.5)),
        (load_answer((64, 2, 0.0)), ServerLoad(num_running=64, num_queued=2, tokens_per_s=None)),
        (load_answer((0, 0, 0.0)), ServerLoad(num_running=0, num_queued=0, tokens_per_s=0.0)),
        (JSONResponse({"detail": "Not Found"}, status_code=404), None),
    ],
)
def test_load(server: FakeServer, answer: Response, load: ServerLoad | None) -> None:
    """Over all schedulers. SGLang 0.5.23 without --enable-metrics says 0 tokens per second all the time."""
    server.answers = [answer]
    assert call(server.endpoint, SGLangClient.load) == load


def test_load_of_a_server_that_fails(server: FakeServer) -> None:
    server.answers = [JSONResponse({"error": "busy"}, status_code=500)]
    with pytest.raises(ServerFailureError):
        call(server.endpoint, SGLangClient.load)
