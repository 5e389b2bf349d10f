"""Prompts to groups over real embedded servers."""

from __future__ import annotations

import copy
import dataclasses
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from megatron_drpo.batching.sequences import build_sequences
from megatron_drpo.config.schema import RolloutConfig
from megatron_drpo.embedded_server.runner import load_model
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.completion import Completion
from megatron_drpo.rollout.engine import RolloutEngine, SamplingPlan, wait_until_ready
from megatron_drpo.rollout.sample import Sample
from megatron_drpo.types import FinishReason, Prompt, Rollout, RolloutGroup

Serve = Callable[..., str]
MakeEngine = Callable[..., RolloutEngine]


@pytest.fixture(scope="module")
def endpoints(serve: Serve) -> list[str]:
    return [serve(num_slots=4), serve(num_slots=4)]


@pytest.fixture(scope="module")
def closed_endpoint(serve: Serve) -> str:
    return serve(num_slots=4, deterministic=True)


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(id=10 + i, text="", token_ids=tuple(range(2, 4 + i % 5))) for i in range(count)]


def values(groups: list[RolloutGroup]) -> list[tuple[list[int], list[float]]]:
    return [
        (rollout.response_ids, rollout.rollout_logprobs) for group in groups for rollout in group.rollouts
    ]


def test_groups_come_in_order_with_true_logprobs(
    endpoints: list[str], make_engine: MakeEngine, tiny_moe: Path
) -> None:
    engine = make_engine(endpoints, temperature=0.8)
    prompts = make_prompts(6)
    finished: list[int] = []
    groups = engine.generate(prompts, SamplingPlan(step=0), finished.append)
    assert finished == [3, 6, 9, 12, 15, 18]
    assert [group.prompt for group in groups] == prompts
    model: PreTrainedModel = load_model(tiny_moe, torch.float32)
    for group in groups:
        assert [rollout.sample_index for rollout in group.rollouts] == [0, 1, 2]
        for rollout in group.rollouts:
            ids = rollout.response_ids
            assert rollout.policy_versions == [0] * len(ids)
            assert rollout.finish_reason is (FinishReason.stop if 1 in ids else FinishReason.length)
            assert 1 not in ids[:-1]
            assert len(ids) == 20 or ids[-1] == 1
            assert rollout.text.split() == [f"t{i}" for i in ids if i > 1]
            sequence = torch.tensor([[*group.prompt.token_ids, *ids]])
            logits = model(sequence).logits[0, len(group.prompt.token_ids) - 1 : -1]
            expected = (logits.double() / 0.8).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            actual = torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_most_probable_ids_against_a_float64_softmax(
    endpoints: list[str],
    closed_endpoint: str,
    make_engine: MakeEngine,
    tiny_moe: Path,
    deterministic: bool,
) -> None:
    """Of the tempered distribution over the whole vocabulary, though top-p truncates what is sampled."""
    servers = [closed_endpoint] if deterministic else endpoints
    engine = make_engine(servers, temperature=0.8, top_p=0.9, deterministic=deterministic)
    groups = engine.generate(make_prompts(4), SamplingPlan(step=0, num_topk=5))
    model: PreTrainedModel = load_model(tiny_moe, torch.float32)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        prompt, ids = rollout.prompt.token_ids, rollout.response_ids
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected, order = (logits.double() / 0.8).log_softmax(-1).sort(descending=True)
        actual = torch.tensor(rollout.topk_logprobs, dtype=torch.float64)
        assert actual.shape == (len(ids), 5)
        torch.testing.assert_close(actual, expected[:, :5], atol=1e-5, rtol=0)
        at_ids = expected.gather(1, order.argsort()).gather(1, torch.tensor(rollout.topk_ids))
        torch.testing.assert_close(at_ids, actual, atol=1e-5, rtol=0)
        for token, logprob, row_ids, row in zip(
            ids, rollout.rollout_logprobs, rollout.topk_ids or [], rollout.topk_logprobs or [], strict=True
        ):
            assert token not in row_ids or row[row_ids.index(token)] == logprob
    [plain, *_] = engine.generate(make_prompts(1), SamplingPlan(step=0))
    assert plain.rollouts[0].topk_ids is None


def test_special_tokens_are_kept_on_demand(endpoints: list[str], make_engine: MakeEngine) -> None:
    """t0 and t1 are special; responses end with t1."""
    engine = make_engine(endpoints, keep_special_tokens=True, max_response_tokens=100)
    groups = engine.generate(make_prompts(6), SamplingPlan(step=0))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert any(rollout.text.endswith(" t1") for rollout in rollouts)
    for rollout in rollouts:
        assert rollout.text.split() == [f"t{i}" for i in rollout.response_ids]


SGLANG_ANSWER: dict[str, Any] = {
    "text": "t7 t1",
    "output_ids": [7, 1],
    "meta_info": {
        "id": "step3-prompt10-sample0-c0ffee00",
        "finish_reason": {"type": "stop", "matched": 1},
        "prompt_tokens": 2,
        "weight_version": "2",
        "total_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[-0.6931471824645996, 7, None], [-0.10536054521799088, 1, None]],
        "input_top_logprobs": [],
        "output_top_logprobs": [
            [[-0.6931471824645996, 7, None], [-1.2039728164672852, 4, None], [-2.3025851249694824, 9, None]],
            [
                [-0.10536054521799088, 1, None],
                [-2.995732307434082, 7, None],
                [-3.4028234663852886e38, 0, None],
            ],
        ],
        "completion_tokens": 2,
        "cached_tokens": 0,
        "e2e_latency": 0.0124,
    },
}
"""As SGLang 0.5 answers: triples of logprob, id and text, floored at the smallest float where a probability
underflows."""


def test_an_answer_of_sglang(serve_app: Callable[[Any], str], make_engine: MakeEngine) -> None:
    bodies: list[dict[str, Any]] = []

    async def answer(request: Request) -> Response:
        bodies.append(await request.json())
        answers = copy.deepcopy([SGLANG_ANSWER] * len(bodies[-1]["input_ids"]))
        for answer, rid in zip(answers, bodies[-1]["rid"], strict=True):
            answer["meta_info"]["id"] = rid
        return JSONResponse(answers)

    endpoint = serve_app(Starlette(routes=[Route("/generate", answer, methods=["POST"])]))
    engine = make_engine([endpoint], policy_version=2, num_samples_per_prompt=1)
    [group] = engine.generate(make_prompts(1), SamplingPlan(step=3, round_index=1, num_topk=3))
    assert bodies[0]["top_logprobs_num"] == 3
    assert bodies[0]["rid"][0].startswith("step3-round1-prompt10-sample0-")
    [rollout] = group.rollouts
    assert rollout.response_ids == [7, 1]
    assert rollout.policy_versions == [2, 2]
    assert rollout.topk_ids == [[7, 4, 9], [1, 7, 0]]
    [sequence] = build_sequences([rollout], torch.ones(1), [False], vocab_size=64, num_topk=3)
    assert sequence.topk_logprobs is not None
    torch.testing.assert_close(
        sequence.topk_logprobs.exp(), torch.tensor([[0.5, 0.3, 0.1], [0.9, 0.05, 0.0]]), atol=1e-7, rtol=0
    )
    with pytest.raises(
        RolloutError,
        match=r"request step3-prompt10-sample0-.*: meta_info\.output_top_logprobs\[0\] is .*; expected 4 en",
    ):
        engine.generate(make_prompts(1), SamplingPlan(step=3, num_topk=4))


def test_seeds_decide_the_samples_wherever_they_run(endpoints: list[str], make_engine: MakeEngine) -> None:
    """Two servers or one, all prompts or some: the same tokens; another step or run seed: others."""
    prompts = make_prompts(4)
    tokens = [ids for ids, _ in values(make_engine(endpoints).generate(prompts, SamplingPlan(step=5)))]
    engine = make_engine(endpoints[:1], max_concurrent_requests=1)
    again = [ids for ids, _ in values(engine.generate(prompts[2:], SamplingPlan(step=5)))]
    assert again == tokens[6:]
    assert len({tuple(ids) for ids in tokens}) == len(tokens)
    other_step = [ids for ids, _ in values(engine.generate(prompts, SamplingPlan(step=6)))]
    other_run = [
        ids for ids, _ in values(make_engine(endpoints, seed=1).generate(prompts, SamplingPlan(step=5)))
    ]
    assert other_step != tokens
    assert other_run != tokens


def test_arguments_replace_the_configuration(endpoints: list[str], make_engine: MakeEngine) -> None:
    engine = make_engine(endpoints, stop_token_ids=())
    [group] = engine.generate(
        make_prompts(1), SamplingPlan(step=0, num_samples_per_prompt=5, temperature=0.0, top_p=0.5)
    )
    assert len(group.rollouts) == 5
    assert len({tuple(rollout.response_ids) for rollout in group.rollouts}) == 1


def test_configured_stop_tokens_are_added(endpoints: list[str], make_engine: MakeEngine) -> None:
    greedy = {"temperature": 0.0, "num_samples_per_prompt": 1}
    [group] = make_engine(endpoints).generate(make_prompts(1), SamplingPlan(step=0, **greedy))
    free = group.rollouts[0].response_ids
    engine = make_engine(endpoints, stop_token_ids=[free[3]])
    [group] = engine.generate(make_prompts(1), SamplingPlan(step=0, **greedy))
    assert group.rollouts[0].response_ids == free[: free.index(free[3]) + 1]


def test_what_sglang_stops_at_is_asked_for(tiny_moe: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_moe)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    config = RolloutConfig(stop_token_ids=[5])
    engine = RolloutEngine(config, tokenizer, [1], vocab_size=65, seed=0)
    [sample] = engine._group(make_prompts(1)[0], SamplingPlan(step=0, num_samples_per_prompt=1))
    engine.close()
    assert sample.next_request().sampling_params["stop_token_ids"] == [1, 5, 64]


def test_deterministic_rollouts_are_bit_equal_under_other_traffic(
    closed_endpoint: str, make_engine: MakeEngine
) -> None:
    prompts = make_prompts(5)
    engine = make_engine([closed_endpoint], deterministic=True)
    finished: list[int] = []
    quiet = engine.generate(prompts, SamplingPlan(step=1), finished.append)
    assert finished == [15]
    stop = threading.Event()

    def disturb() -> None:
        with_noise = dataclasses.replace(noise._config, deterministic=False)
        noise._config = with_noise
        while not stop.is_set():
            noise.generate(make_prompts(3), SamplingPlan(step=0))

    noise = make_engine([closed_endpoint], seed=9, max_response_tokens=7)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(3):
            assert values(engine.generate(prompts, SamplingPlan(step=1))) == values(quiet)
    finally:
        stop.set()
        thread.join()


def test_deterministic_needs_servers_started_for_it(endpoints: list[str], make_engine: MakeEngine) -> None:
    with pytest.raises(RolloutError, match=r"http://.*: rollout.deterministic=true needs"):
        make_engine(endpoints, deterministic=True)


def test_no_prompts_no_requests(closed_endpoint: str, make_engine: MakeEngine) -> None:
    for deterministic in (False, True):
        engine = make_engine([closed_endpoint], deterministic=deterministic)
        assert engine.generate([], SamplingPlan(step=0)) == []


def test_a_refusal_names_server_and_request(endpoints: list[str], make_engine: MakeEngine) -> None:
    engine = make_engine(endpoints[:1], max_response_tokens=255)
    with pytest.raises(
        RolloutError, match=rf"{endpoints[0]}/generate: HTTP 400: request step3-prompt1\d-.*255"
    ):
        engine.generate(make_prompts(3), SamplingPlan(step=3))
    engine = make_engine(endpoints, num_samples_per_prompt=1)
    outside = Prompt(id=7, text="", token_ids=(64,))
    with pytest.raises(RolloutError, match=r"step3-prompt7-sample0-.*: input id 64"):
        engine.generate([outside], SamplingPlan(step=3))


def test_a_server_that_is_not_there(make_engine: MakeEngine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"http://127.0.0.1:{sock.getsockname()[1]}"
    start = time.monotonic()
    told = rf"{endpoint}: /health did not answer within 0.3 s: {endpoint}/health: cannot be reached: "
    with pytest.raises(RolloutError, match=told):
        wait_until_ready(RolloutConfig(startup_timeout_s=0.3), [endpoint])
    assert time.monotonic() - start < 2
    waits = make_engine([endpoint], num_retries=0, no_server_timeout_s=0.5)
    told = (
        rf"^{endpoint}/generate: cannot be reached: .* \(tried once; no rollout server took requests for "
        rf"rollout.no_server_timeout_s=0.5: {endpoint}: 0 .*suspended: "
    )
    with pytest.raises(RolloutError, match=told):
        waits.generate(make_prompts(2), SamplingPlan(step=0))


def test_no_response_goes_on_after_its_end_however_often_it_is_interrupted(
    endpoints: list[str], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth token is a stop id: many a response is complete when it is aborted."""
    stops = set(range(1, 64, 4))
    num_complete = 0
    add = Sample.add

    def count(sample: Sample, completion: Completion, server: str) -> None:
        nonlocal num_complete
        is_abort = completion.finish_reason is FinishReason.abort
        is_whole = not stops.isdisjoint(completion.token_ids) or len(completion.token_ids) == 20
        num_complete += is_abort and is_whole
        add(sample, completion, server)

    monkeypatch.setattr(Sample, "add", count)
    engine = make_engine(endpoints, stop_token_ids=tuple(stops))
    rollouts: list[Rollout] = []
    for step in range(100):  # how often it takes depends on how fast the machine is
        if num_complete >= 5:
            break
        pending = engine.submit(make_prompts(8), SamplingPlan(step=step))
        time.sleep(0.005 * (1 + step % 8))
        engine.interrupt()
        engine.set_servers(endpoints, 0)
        rollouts += [rollout for group in pending for rollout in group.future.result(60).rollouts]
    assert num_complete >= 5
    for rollout in rollouts:
        ids = rollout.response_ids
        assert stops.isdisjoint(ids[:-1])
        assert len(ids) == 20 or ids[-1] in stops
        assert rollout.finish_reason is (FinishReason.stop if ids[-1] in stops else FinishReason.length)


def test_requests_of_a_server_that_leaves_go_elsewhere(endpoints: list[str], make_engine: MakeEngine) -> None:
    """The samples are the same: seeds do not depend on the server or on the attempt."""
    plan = SamplingPlan(step=4)
    expected = values(make_engine(endpoints).generate(make_prompts(6), plan))
    engine = make_engine(endpoints[:1])
    pending = engine.submit(make_prompts(6), plan)
    engine.set_servers(endpoints[1:], 0)
    assert [ids for ids, _ in values([group.future.result(30) for group in pending])] == [
        ids for ids, _ in expected
    ]
    assert endpoints[1] in engine.describe()
    assert endpoints[0] not in engine.describe()
