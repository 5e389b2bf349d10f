"""Every step of a weight update: what is sent, and what a refusal becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.weight_sync.client import WeightClient

OK = {"success": True, "message": ""}


class Recorder:
    """Answers each path from a list of responses, the last one again and again; keeps what was asked."""

    def __init__(self, serve_app: Callable[[Any], str]) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers: list[Response] = []
        routes = [Route("/{path:path}", self._answer, methods=["GET", "POST"])]
        self.endpoint = serve_app(Starlette(routes=routes))

    async def _answer(self, request: Request) -> Response:
        self.asked.append((request.url.path, await request.json() if await request.body() else None))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def call(self, method: Callable[[WeightClient], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            async with WeightClient(self.endpoint, timeout_s=5.0) as client:
                return await method(client)

        return asyncio.run(run())


@pytest.fixture(scope="module")
def shared(serve_app: Callable[[Any], str]) -> Recorder:
    return Recorder(serve_app)


@pytest.fixture
def server(shared: Recorder) -> Recorder:
    shared.asked = []
    shared.answers = [JSONResponse(OK)]
    return shared


def test_an_update_never_flushes_the_cache_and_names_its_version(server: Recorder) -> None:
    server.call(lambda client: client.update_weights_from_tensor([b"QUJD", b"REVG"], weight_version="12"))
    server.call(lambda client: client.update_weights_from_tensor([b"QUJD"], weight_version=None))
    server.call(
        lambda client: client.update_weights_from_disk("/w/version_3", weight_version="3", timeout_s=9.0)
    )
    server.call(
        lambda client: client.update_weights_from_distributed(
            names=["w"], dtypes=["float32"], shapes=[[2, 3]], group_name="g", weight_version="4"
        )
    )
    assert server.asked == [
        (
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": ["QUJD", "REVG"],
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": "12",
            },
        ),
        (
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": ["QUJD"],
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": None,
            },
        ),
        (
            "/update_weights_from_disk",
            {"model_path": "/w/version_3", "flush_cache": False, "weight_version": "3"},
        ),
        (
            "/update_weights_from_distributed",
            {
                "names": ["w"],
                "dtypes": ["float32"],
                "shapes": [[2, 3]],
                "group_name": "g",
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": "4",
            },
        ),
    ]


def test_requests_stay_in_place_during_a_pause(server: Recorder) -> None:
    server.call(lambda client: client.pause_generation())
    server.call(lambda client: client.continue_generation())
    assert server.asked == [("/pause_generation", {"mode": "in_place"}), ("/continue_generation", {})]


def test_a_group_is_joined_and_left_by_name(server: Recorder) -> None:
    server.call(
        lambda client: client.init_weights_update_group(
            address="10.0.0.1", port=5, rank_offset=3, world_size=5, group_name="g", backend="gloo"
        )
    )
    server.call(lambda client: client.destroy_weights_update_group("g"))
    fields = {"master_address": "10.0.0.1", "master_port": 5, "rank_offset": 3, "world_size": 5}
    assert server.asked == [
        ("/init_weights_update_group", {**fields, "group_name": "g", "backend": "gloo"}),
        ("/destroy_weights_update_group", {"group_name": "g"}),
    ]


@pytest.mark.parametrize("status", [400, 408, 500, 502, 504])
def test_a_step_that_may_have_begun_is_not_repeated_and_fails_as_a_weight_sync_error(
    server: Recorder, status: int
) -> None:
    server.answers = [PlainTextResponse("out of memory", status)]
    with pytest.raises(WeightSyncError, match=rf"/begin_weight_update: HTTP {status}: out of memory"):
        server.call(lambda client: client.begin_weight_update())
    assert len(server.asked) == 1
    server.answers = [JSONResponse({"success": False, "message": "no"})]
    with pytest.raises(WeightSyncError, match=r"/end_weight_update: refused: .*no"):
        server.call(lambda client: client.end_weight_update())


@pytest.mark.parametrize("status", [425, 429, 503])
def test_a_step_is_asked_for_again_while_the_server_has_not_begun_with_it(
    server: Recorder, status: int
) -> None:
    """A pause of a second fences no server."""
    busy = PlainTextResponse("busy", status)
    server.answers = [busy, busy, JSONResponse(OK)]
    server.call(lambda client: client.end_weight_update())
    assert [path for path, _ in server.asked] == ["/end_weight_update"] * 3
    server.answers = [busy, JSONResponse({"tp_size": 2})]
    assert server.call(lambda client: client.read_info()).tp_size == 2
    server.answers = [busy, JSONResponse({"weight_version": "4"})]
    assert server.call(lambda client: client.weight_version()) == "4"


def test_it_is_not_asked_for_ever(server: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_drpo.weight_sync.client._MAX_WAIT_S", 0.5)
    server.answers = [PlainTextResponse("busy", 503)]
    told = r"/end_weight_update: HTTP 503: busy \(tried [23] times in 0\.\d s\)$"
    with pytest.raises(WeightSyncError, match=told):
        server.call(lambda client: client.end_weight_update())


def test_an_update_that_was_left_open_is_closed_first(server: Recorder) -> None:
    """SGLang's words for it."""
    message = "a weight-update session is already open; call end_weight_update() first"
    refusal = JSONResponse({"success": False, "message": message}, 400)
    server.answers = [refusal, JSONResponse(OK)]
    server.call(lambda client: client.begin_weight_update())
    paths = [path for path, _ in server.asked]
    assert paths == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


def test_what_a_server_says_of_itself(server: Recorder) -> None:
    server.answers = [JSONResponse({"tp_size": 2, "version": "0.5.23", "device": "cpu", "dtype": "float32"})]
    info = server.call(lambda client: client.read_info())
    assert (info.tp_size, info.version, info.device, info.dtype) == (2, "0.5.23", "cpu", "float32")
    assert not info.is_embedded
    server.answers = [JSONResponse({"tp_size": 1, "frontend": "embedded"})]
    assert server.call(lambda client: client.read_info()).is_embedded
    server.answers = [JSONResponse({})]
    with pytest.raises(RolloutError, match="/server_info: the answer has no 'tp_size'"):
        server.call(lambda client: client.read_info())
    server.answers = [JSONResponse({"tp_size": "two"})]
    with pytest.raises(RolloutError, match="/server_info: tp_size is 'two'; expected an integer"):
        server.call(lambda client: client.read_info())


def test_checksums_are_per_rank(server: Recorder) -> None:
    ranks = [{"checksums": {"w": "0a"}}, {"checksums": {"w": "0b"}}]
    server.answers = [JSONResponse({"success": True, "message": "", "ranks": ranks})]
    assert server.call(lambda client: client.weights_checksums()) == [{"w": "0a"}, {"w": "0b"}]
    server.answers = [JSONResponse(OK)]
    with pytest.raises(RolloutError, match="/weights_checker: the answer has no 'ranks'"):
        server.call(lambda client: client.weights_checksums())
    server.answers = [JSONResponse({**OK, "ranks": [{"checksums": ["w"]}]})]
    with pytest.raises(RolloutError, match=r"ranks\[0\]\.checksums is \['w'\]; expected an object"):
        server.call(lambda client: client.weights_checksums())
