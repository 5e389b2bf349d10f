"""What an endpoint may do without ending the run, over HTTP; `test_sampler` has the pauses and the limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.engine import RolloutEngine, SamplingPlan, wait_until_ready
from megatron_drpo.types import Prompt

MakeEngine = Callable[..., RolloutEngine]
PROMPT = Prompt(id=10, text="", token_ids=(2, 3))
GOOD: dict[str, Any] = {
    "output_ids": [7, 1],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 1},
        "weight_version": "2",
        "output_token_logprobs": [[-0.5, 7, None], [-0.25, 1, None]],
        "completion_tokens": 2,
    },
}


def serve_answers(serve_app: Callable[[Any], str], answer: Callable[[str], Response | None]) -> str:
    """A server of one good answer; `answer(path)` comes first, if it has one."""

    async def respond(request: Request) -> Response:
        if (response := answer(request.url.path)) is not None:
            return response
        if request.url.path == "/generate":
            return JSONResponse([GOOD])
        return JSONResponse({"enable_deterministic_inference": True})

    return serve_app(Starlette(routes=[Route("/{path:path}", respond, methods=["GET", "POST"])]))


@pytest.mark.parametrize(
    "make_response",
    [
        lambda: PlainTextResponse("no healthy upstream", 503),
        lambda: PlainTextResponse("slow down", 429, headers={"Retry-After": "1"}),
        lambda: PlainTextResponse("<html>Welcome to nginx!</html>"),
        lambda: PlainTextResponse(""),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pause_of_the_only_endpoint_ends_nothing(
    serve_app: Callable[[Any], str],
    make_engine: MakeEngine,
    make_response: Callable[[], Response],
    deterministic: bool,
) -> None:
    """For a second everything behind a router is away, from the first question on."""
    start = time.monotonic()
    num_refused = 0

    def answer(path: str) -> Response | None:
        nonlocal num_refused
        if time.monotonic() > start + 1.0:
            return None
        num_refused += 1
        return make_response()

    endpoint = serve_answers(serve_app, answer)
    config = {"num_samples_per_prompt": 1, "deterministic": deterministic}
    engine = make_engine([endpoint], policy_version=2, **config)
    [group] = engine.generate([PROMPT], SamplingPlan(step=0))
    assert group.rollouts[0].response_ids == [7, 1]
    assert 1 <= num_refused <= 12


def test_a_server_that_refuses_is_not_waited_for(
    serve_app: Callable[[Any], str], make_engine: MakeEngine
) -> None:
    endpoint = serve_answers(serve_app, lambda _: JSONResponse({"error": "wrong key"}, 401))
    start = time.monotonic()
    with pytest.raises(RolloutError, match=rf"^{endpoint}/health: HTTP 401: wrong key$"):
        wait_until_ready(RolloutConfig(), [endpoint])
    with pytest.raises(RolloutError, match=rf"^{endpoint}/generate: HTTP 401: wrong key$"):
        make_engine([endpoint], num_retries=9).generate([PROMPT], SamplingPlan(step=0))
    assert time.monotonic() - start < 10
