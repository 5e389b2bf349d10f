"""The rollout engine over a real SGLang server, beside transformers with the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from megatron_drpo.batching.route_check import RouteCheck
from megatron_drpo.config.schema import OnBadRoutes, RolloutConfig, WeightSyncConfig, WeightSyncPath
from megatron_drpo.embedded_server.weights import hf_views
from megatron_drpo.rollout.completion import Completion, RouteShape
from megatron_drpo.rollout.conversation import Conversation
from megatron_drpo.rollout.engine import RolloutEngine, SamplingPlan
from megatron_drpo.rollout.sample import Sample
from megatron_drpo.types import FinishReason, Prompt, Rollout
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weights.hf_folder import HfFolder

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

MODEL = "moe_renormalised"
MAX_MISMATCH = 1e-5
MIN_MARGIN = 1e-5
"""Of a router's logits, from the last expert chosen to the first one not: below it, rounding may decide."""
NUM_EXPERTS_PER_TOKEN = 2
Expected = Callable[[Rollout, int], torch.Tensor | None]
NUM_RESPONSE_TOKENS = 100


@pytest.fixture(scope="module")
def weights(hf_model: Callable[[str], Path]) -> dict[int, dict[str, torch.Tensor]]:
    """Version -> HF-named tensors: those of the folder, and two others."""
    folder = HfFolder(hf_model(MODEL))
    first = {name: folder.get(name) for name in folder.keys()}  # noqa: SIM118  not a dict
    generator = torch.Generator().manual_seed(0)
    versions = {1: first}
    for version in (2, 3):
        versions[version] = {
            name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in first.items()
        }
    return versions


@pytest.fixture(scope="module")
def push(
    moe_server: str,
    hf_model: Callable[[str], Path],
    weights: dict[int, dict[str, torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[int], None]]:
    """`push(version)`: the server has these weights, by checksum."""
    pusher = WeightPusher(
        WeightSyncConfig(path=WeightSyncPath.tensor),
        model_path=hf_model(MODEL),
        run_dir=tmp_path_factory.mktemp("push"),
    )

    def run(version: int) -> None:
        report = pusher.push(iter(weights[version].items()), version, [moe_server])
        assert report.updated == [moe_server], report

    yield run
    pusher.close()


@pytest.fixture(scope="module")
def engine(hf_model: Callable[[str], Path]) -> Iterator[RolloutEngine]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_model(MODEL))
    config = RolloutConfig(num_samples_per_prompt=4, max_response_tokens=NUM_RESPONSE_TOKENS, num_retries=0)
    engine = RolloutEngine(config, tokenizer, stop_token_ids=[], vocab_size=101, seed=0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected_logprobs(
    hf_model: Callable[[str], Path], weights: dict[int, dict[str, torch.Tensor]]
) -> Expected:
    """`expected_logprobs(rollout, version)`: transformers' log-probability of each response token; None if
    a router is undecided at one of the tokens."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(hf_model(MODEL), dtype=torch.float32)
    loaded: dict[int, PreTrainedModel] = {}

    def of_version(version: int) -> PreTrainedModel:
        if version not in loaded:
            state = {name: tensor.float() for name, tensor in weights[version].items()}
            loaded.clear()
            loaded[version] = _with_weights(model, state)
        return loaded[version]

    @torch.no_grad()
    def compute(rollout: Rollout, version: int) -> torch.Tensor | None:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        output = of_version(version)(ids, output_router_logits=True)
        router_logits = torch.stack(output.router_logits).sort(-1, descending=True).values
        last, next_one = router_logits[..., NUM_EXPERTS_PER_TOKEN - 1 : NUM_EXPERTS_PER_TOKEN + 1].unbind(-1)
        if (last - next_one).min() < MIN_MARGIN:
            return None
        logits = output.logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        return logits.double().log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]

    return compute


def _with_weights(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """HF-named tensors into a model whose experts are fused."""
    with torch.no_grad():
        for name, view in hf_views(model).items():
            view.copy_(state[name])
    return model


def prompts(first: int, count: int) -> list[Prompt]:
    return [
        Prompt(id=i, text="", token_ids=tuple(3 + (7 * i + j) % 90 for j in range(9)))
        for i in range(first, first + count)
    ]


def is_whole(rollout: Rollout) -> bool:
    """It ended by itself or has all the tokens that it may have."""
    num_tokens = len(rollout.response_ids)
    assert len(rollout.policy_versions) == len(rollout.rollout_logprobs) == num_tokens
    return num_tokens == NUM_RESPONSE_TOKENS or rollout.finish_reason is FinishReason.stop


def test_after_a_sync_every_token_is_of_the_new_weights(
    moe_server: str,
    push: Callable[[int], None],
    engine: RolloutEngine,
    expected_logprobs: Expected,
) -> None:
    """The same prompts again: without versions kept apart the server would answer from its old cache."""
    for version in (1, 2):
        push(version)
        engine.set_servers([moe_server], version)
        groups = engine.generate(prompts(0, 6), SamplingPlan(step=version))
        differences = []
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            assert set(rollout.policy_versions) == {version}
            actual = torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)
            if (expected := expected_logprobs(rollout, version)) is not None:
                differences.append((actual - expected).abs())
        assert len(differences) > 12, "half of them: ties are rare"
        assert torch.cat(differences).mean() <= MAX_MISMATCH


def test_an_interrupted_response_goes_on_with_the_new_weights(
    moe_server: str,
    push: Callable[[int], None],
    engine: RolloutEngine,
    expected_logprobs: Expected,
) -> None:
    """Each part has the logprobs of the weights that its tokens say they are of."""
    push(2)
    engine.set_servers([moe_server], 2)
    pending = engine.submit(prompts(50, 4), SamplingPlan(step=0))
    time.sleep(0.4)
    engine.interrupt()
    push(3)
    assert not any(group.future.done() for group in pending)
    engine.set_servers([moe_server], 3)
    rollouts = [rollout for group in pending for rollout in group.future.result(120).rollouts]
    num_old = num_compared = 0
    for rollout in rollouts:
        assert is_whole(rollout)
        versions = torch.tensor(rollout.policy_versions)
        assert versions.tolist() == sorted(versions.tolist())
        num_old += int((versions == 2).sum())
        actual = torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)
        for version in (2, 3):
            part = versions == version
            expected = expected_logprobs(rollout, version)
            if part.any() and expected is not None:
                assert (actual - expected)[part].abs().mean() <= MAX_MISMATCH
                num_compared += int(part.sum())
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    assert 0 < num_old < num_tokens < 2 * num_compared


def test_a_response_that_is_paused_in_place_has_spans_of_versions(
    moe_server: str, push: Callable[[int], None], engine: RolloutEngine
) -> None:
    """What happens to a request in flight when sampling runs ahead of training."""
    push(1)
    engine.set_servers([moe_server], 1)
    pending = engine.submit(prompts(90, 4), SamplingPlan(step=0))
    time.sleep(0.4)
    push(2)
    engine.set_servers([moe_server], 2)
    rollouts = [rollout for group in pending for rollout in group.future.result(120).rollouts]
    versions = {version for rollout in rollouts for version in rollout.policy_versions}
    assert versions == {1, 2}
    assert all(rollout.policy_versions == sorted(rollout.policy_versions) for rollout in rollouts)
    assert all(is_whole(rollout) for rollout in rollouts)


STOPS = frozenset(range(1, 101, 4))
INSERTED = 6
NUM_COMPLETE_ABORTS = 20
ROUTES = RouteShape(moe_layers=(0, 1, 2, 3), num_layers=4, num_experts=8, num_experts_per_token=2)


async def two_turns(conversation: Conversation) -> None:
    await conversation.sample(max_tokens=8)
    conversation.insert([INSERTED])
    await conversation.sample(max_tokens=8)


def turns(rollout: Rollout) -> list[list[int]]:
    """What was sampled, turn by turn."""
    mask = rollout.response_mask or [True] * len(rollout.response_ids)
    tokens = zip(rollout.response_ids, mask, strict=True)
    return [[token for token, _ in turn] for sampled, turn in groupby(tokens, lambda t: t[1]) if sampled]


@pytest.mark.parametrize("function", [None, "tests.sglang.test_engine:two_turns"])
def test_no_turn_goes_on_after_its_end_however_often_it_is_interrupted(
    moe_server: str,
    push: Callable[[int], None],
    hf_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    function: str | None,
) -> None:
    """A request that is aborted takes one more token and reports `abort`, also where that is a stop id, as
    every fourth is here, or the last that was asked for."""
    num_stopped = num_full = 0
    add = Sample.add

    def count(sample: Sample, completion: Completion, server: str) -> None:
        nonlocal num_stopped, num_full
        if completion.finish_reason is FinishReason.abort:
            num_stopped += not STOPS.isdisjoint(completion.token_ids)
            num_full += sample.num_tokens + len(completion.token_ids) == sample.params["max_new_tokens"]
        add(sample, completion, server)

    monkeypatch.setattr(Sample, "add", count)
    push(1)
    engine = RolloutEngine(
        RolloutConfig(num_samples_per_prompt=4, max_response_tokens=17, num_retries=0, function=function),
        PreTrainedTokenizerFast.from_pretrained(hf_model(MODEL)),
        stop_token_ids=sorted(STOPS),
        vocab_size=101,
        seed=0,
        route_shape=ROUTES,
    )
    engine.set_servers([moe_server], 1)
    rollouts: list[Rollout] = []
    for number in range(40):
        pending = engine.submit(prompts(0, 8), SamplingPlan(step=number))
        for _ in range(2):
            time.sleep(0.02 + 0.01 * (number % 8))
            engine.interrupt()
            engine.set_servers([moe_server], 1)
        rollouts += [rollout for group in pending for rollout in group.future.result(120).rollouts]
        if num_stopped >= NUM_COMPLETE_ABORTS:
            break
    engine.close()
    print(f"{num_stopped} aborts with a stop id, {num_full} at the limit, {len(rollouts)} responses")
    assert num_stopped >= NUM_COMPLETE_ABORTS
    check = RouteCheck(num_experts=ROUTES.num_experts, on_bad=OnBadRoutes.error)
    for number, rollout in enumerate(rollouts):
        assert check.check(number, rollout) is not None
        for turn in turns(rollout):
            assert STOPS.isdisjoint(turn[:-1])
        if turn and function is None:
            assert rollout.finish_reason is (FinishReason.stop if turn[-1] in STOPS else FinishReason.length)
            assert len(turn) == 17 or turn[-1] in STOPS
