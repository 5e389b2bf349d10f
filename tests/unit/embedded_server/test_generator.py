"""The decode loop against transformers: greedy, logprobs, stops, versions, aborts, determinism."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from megatron_drpo.embedded_server.generator import Generator
from megatron_drpo.embedded_server.protocol import ModelLimits, SampleRequest, SampleResult, parse_generate
from megatron_drpo.embedded_server.runner import ModelRunner, load_model
from megatron_drpo.embedded_server.weights import WeightStore
from megatron_drpo.errors import RolloutError, WeightSyncError

LIMITS = ModelLimits(vocab_size=64, max_tokens=256, eos_token_ids=frozenset())
Make = Callable[..., tuple[Generator, WeightStore]]


@pytest.fixture
def make(tiny_moe: Path) -> Iterator[Make]:
    """`make(num_slots=4, deterministic=False)`: a running generator and its store."""
    with ExitStack() as stack:

        def make(*, num_slots: int = 4, deterministic: bool = False) -> tuple[Generator, WeightStore]:
            model = load_model(tiny_moe, torch.float32)
            store = WeightStore(model, load_file(tiny_moe / "model.safetensors"), "0")
            generator = Generator(
                ModelRunner(model, num_slots), store, num_slots=num_slots, deterministic=deterministic
            )
            stack.callback(generator.close)
            return generator, store

        yield make


@pytest.fixture(scope="module")
def reference(tiny_moe: Path) -> PreTrainedModel:
    return load_model(tiny_moe, torch.float32)


def requests(prompts: list[list[int]], **params: Any) -> list[SampleRequest]:
    """Sample i has seed i and id `s_i`."""
    per_sample = [{"max_new_tokens": 12, "sampling_seed": i, **params} for i in range(len(prompts))]
    return parse_generate({"input_ids": prompts, "sampling_params": per_sample, "rid": "s"}, LIMITS)[0]


def prompts(count: int) -> list[list[int]]:
    """Lengths 1 to 7, some prompts equal."""
    return [[(3 * i + j) % 60 + 2 for j in range(1 + i // 2 % 7)] for i in range(0, 2 * count, 2)]


def tokens(results: list[SampleResult]) -> list[list[int]]:
    return [result.token_ids for result in results]


def staged(store: WeightStore, shift: float, version: str) -> None:
    store.begin()
    store.stage([(name, tensor + shift) for name, tensor in store._served.items()], version)


def test_greedy_is_transformers_generate(make: Make, reference: PreTrainedModel) -> None:
    generator, _ = make(num_slots=3)
    results = generator.submit(requests(prompts(7), temperature=0)).result(10)
    generate = cast(Callable[..., torch.Tensor], reference.generate)
    for prompt, result in zip(prompts(7), results, strict=True):
        expected = generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=None
        )
        assert prompt + result.token_ids == expected[0].tolist()
        assert result.finish_reason == {"type": "length", "length": 12}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_fresh_forward(
    make: Make, reference: PreTrainedModel, temperature: float
) -> None:
    """More samples than slots, of different lengths: rows are refilled and moved on the way."""
    generator, _ = make(num_slots=3)
    params = [{"max_new_tokens": 3 + 5 * i % 17, "sampling_seed": i} for i in range(10)]
    body = {
        "input_ids": prompts(10),
        "sampling_params": [{**p, "temperature": temperature, "top_p": 0.9} for p in params],
    }
    results = generator.submit(parse_generate(body, LIMITS)[0]).result(10)
    for prompt, param, result in zip(prompts(10), params, results, strict=True):
        assert len(result.token_ids) == param["max_new_tokens"]
        logits = reference(torch.tensor([prompt + result.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits.double() / (temperature or 1.0)).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(result.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs).double(), expected, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_slots_or_neighbours(make: Make) -> None:
    many, few = make(num_slots=8)[0], make(num_slots=2)[0]
    together = many.submit(requests(prompts(8))).result(10)
    assert tokens(few.submit(requests(prompts(8))).result(10)) == tokens(together)
    alone = [few.submit([request]).result(10)[0] for request in requests(prompts(8))]
    assert tokens(alone) == tokens(together)


def test_stop_tokens_end_a_sample_and_are_part_of_it(make: Make) -> None:
    generator, _ = make()
    [free] = generator.submit(requests([[5, 6, 7]], max_new_tokens=30)).result(10)
    stop = free.token_ids[20]
    first = free.token_ids.index(stop)
    [stopped] = generator.submit(requests([[5, 6, 7]], max_new_tokens=30, stop_token_ids=[stop])).result(10)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": stop}
    [ignored] = generator.submit(
        requests([[5, 6, 7]], max_new_tokens=30, stop_token_ids=[stop], ignore_eos=True)
    ).result(10)
    assert ignored.token_ids == free.token_ids


def at_step(generator: Generator, step: int, action: Callable[[], None]) -> None:
    """Run `action` in the generator's thread after `step` decoded tokens."""
    decode = generator._runner.decode
    count = 0

    def counting(token_ids: list[int], positions: list[int]) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == step:
            generator._post(action)
        return decode(token_ids, positions)

    generator._runner.decode = counting  # pyrefly: ignore


def test_an_update_while_generating_is_seen_from_the_next_token(
    make: Make, reference: PreTrainedModel
) -> None:
    generator, store = make(num_slots=2)
    staged(store, 0.01, "1")
    at_step(generator, 5, generator._update_weights)
    before, after = [3, 4, 5], [8, 9]
    results = generator.submit(requests([before, before, after])).result(10)
    assert [result.version_spans for result in results] == [
        [("0", 0, 5), ("1", 5, 12)],
        [("0", 0, 5), ("1", 5, 12)],
        [("1", 0, 12)],
    ]
    # The late sample knows nothing of the old weights.
    late = results[2]
    new_model = generator._runner.model
    logits = new_model(torch.tensor([after + late.token_ids])).logits[0, 1:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(late.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(late.logprobs), expected, atol=1e-5, rtol=0)
    # The first tokens are those of the old weights.
    old = reference(torch.tensor([before + results[0].token_ids[:5]])).logits[0, 2:-1].log_softmax(-1)
    expected = old.gather(-1, torch.tensor(results[0].token_ids[:5])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(results[0].logprobs[:5]), expected, atol=1e-5, rtol=0)


def test_an_incomplete_update_is_refused_while_generation_goes_on(make: Make) -> None:
    generator, store = make()
    plain = generator.submit(requests(prompts(3))).result(10)
    store.begin()
    running = generator.submit(requests(prompts(3)))
    with pytest.raises(WeightSyncError, match="missing"):
        generator.update_weights().result(10)
    assert tokens(running.result(10)) == tokens(plain)
    assert store.version == "0"


def test_abort_of_one_and_of_all(make: Make) -> None:
    generator, _ = make(num_slots=2)
    at_step(generator, 3, lambda: generator._abort("s_1"))
    results = generator.submit(requests([[3], [4], [5]])).result(10)
    assert [len(result.token_ids) for result in results] == [12, 4, 12]
    assert results[1].finish_reason == {"type": "abort", "message": "Aborted"}
    at_step(generator, 2, lambda: generator._abort(None))
    results = generator.submit(requests([[3], [4], [5]])).result(10)
    assert [len(result.token_ids) for result in results] == [3, 3, 0]


@pytest.mark.parametrize("is_stop", [True, False])
def test_an_aborted_sample_takes_one_more_token_and_reports_abort_whatever_it_is(
    make: Make, is_stop: bool
) -> None:
    """As SGLang: before it looks at the stop ids and at the limit."""
    generator, _ = make()
    [free] = generator.submit(requests([[5, 6, 7]])).result(10)
    token = free.token_ids[5]
    index = free.token_ids.index(token)
    params = {"stop_token_ids": [token]} if is_stop else {"max_new_tokens": index + 1}
    [ended] = generator.submit(requests([[5, 6, 7]], **params)).result(10)
    at_step(generator, index, lambda: generator._abort(None))
    [aborted] = generator.submit(requests([[5, 6, 7]], **params)).result(10)
    assert aborted.token_ids == ended.token_ids == free.token_ids[: index + 1]
    assert ended.finish_reason is not None
    assert ended.finish_reason["type"] == ("stop" if is_stop else "length")
    assert aborted.finish_reason == {"type": "abort", "message": "Aborted"}


def test_deterministic_batches_are_bit_equal_under_any_traffic(make: Make) -> None:
    """Bit-equal logprobs, alone and between two other requests."""
    generator, _ = make(num_slots=4, deterministic=True)
    quiet = generator.submit(requests(prompts(9))).result(10)
    first = generator.submit(requests([[9] * 40, [8] * 3], max_new_tokens=20))
    busy = generator.submit(requests(prompts(9)))
    last = generator.submit(requests([[7] * 90] * 5))
    assert tokens(busy.result(10)) == tokens(quiet)
    assert [r.logprobs for r in busy.result(10)] == [r.logprobs for r in quiet]
    assert len(first.result(10)) == 2
    assert len(last.result(10)) == 5


def test_non_finite_logits_are_an_error_of_that_request_only(make: Make) -> None:
    generator, store = make()
    staged(store, float("nan"), "1")
    generator.update_weights().result(10)
    with pytest.raises(RolloutError, match="non-finite logits: request s_0, weights 1"):
        generator.submit(requests([[3, 4]])).result(10)
    assert generator.is_alive()


def test_a_failure_in_the_loop_reaches_every_caller(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []

    def record(args: threading.ExceptHookArgs) -> None:
        reported.append(str(args.exc_value))

    monkeypatch.setattr(threading, "excepthook", record)
    generator, _ = make(num_slots=1)

    def fail(token_ids: list[int], positions: list[int]) -> torch.Tensor:
        raise MemoryError("no room")

    generator._runner.decode = fail  # pyrefly: ignore
    pending: list[Future[list[SampleResult]]] = [generator.submit(requests([[3], [4]]))]
    with pytest.raises(RolloutError, match="stopped while generating"):
        pending[0].result(10)
    generator._thread.join(10)
    assert reported == ["no room"]
    with pytest.raises(RuntimeError, match="has ended"):
        generator.submit(requests([[3]]))
    generator.close()
