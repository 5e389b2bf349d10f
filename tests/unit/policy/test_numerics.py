"""A NaN is put somewhere; the error must name that place, and no weight may have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import Config, LogprobMode, Recompute
from megatron_drpo.errors import NumericsError
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.numerics import find_non_finite
from megatron_drpo.policy.policy import Policy
from megatron_drpo.types import MicroBatch, TrainSequence
from tools.memory_meter import MemoryMeter

BuildPolicy = Callable[[Config], Policy]
MakeSequences = Callable[..., list[TrainSequence]]
PackAll = Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]

LENGTHS = [9, 14, 4, 11]
TOKENS_PER_MICRO_BATCH = 24
"""Two micro-batches: one of the sequences 0 and 3, one of 1 and 2."""


@pytest.fixture(params=[LogprobMode.one_pass, LogprobMode.recompute])
def policy(
    request: pytest.FixtureRequest, build_policy: BuildPolicy, policy_config: Callable[..., Config]
) -> Policy:
    fields = {"max_tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH, "logprob_mode": request.param}
    return build_policy(policy_config("moe", recompute=Recompute.full, **fields))


@pytest.fixture
def fail(pack_all: PackAll) -> Callable[[Policy, list[TrainSequence]], str]:
    """The message of an update that must fail; that it changed nothing is checked here."""

    def run(policy: Policy, sequences: list[TrainSequence]) -> str:
        before = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
        with pytest.raises(NumericsError) as caught:
            policy.train_step(pack_all(policy, sequences), StepTimer())
        for name, tensor in policy.hf_tensors():
            assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
        assert (policy.num_updates, policy.optimizer_step) == (0, 0)
        return str(caught.value)

    return run


def layer(policy: Policy, number: int) -> Any:
    return unwrap(policy.chunks[0]).decoder.layers[number - 1]


def test_a_weight(policy: Policy, make_sequences: MakeSequences, fail: Callable[..., str]) -> None:
    with torch.no_grad():
        layer(policy, 3).self_attention.linear_proj.weight[0, 0] = torch.nan
    message = fail(policy, make_sequences(LENGTHS))
    assert "update 1: loss nan" in message
    assert "not finite first: the output of layer 3, on rank 0, sequence 0, 1, 2, 3" in message


def test_a_token_of_one_sequence(
    policy: Policy, make_sequences: MakeSequences, fail: Callable[..., str]
) -> None:
    sequences = make_sequences(LENGTHS)
    for sequence in sequences:
        sequence.token_ids[sequence.token_ids == 77] = 76
    sequences[3].token_ids[2] = 77
    with torch.no_grad():
        unwrap(policy.chunks[0]).embedding.word_embeddings.weight[77, 5] = torch.inf
    message = fail(policy, sequences)
    assert message.endswith("not finite first: the output of the embedding, on rank 0, sequence 3")


def test_an_advantage(policy: Policy, make_sequences: MakeSequences, fail: Callable[..., str]) -> None:
    sequences = make_sequences(LENGTHS)
    sequences[1].advantages[2] = torch.nan
    message = fail(policy, sequences)
    assert message.endswith("not finite first: the loss, on rank 0, sequence 1")


def test_the_head(policy: Policy, make_sequences: MakeSequences, fail: Callable[..., str]) -> None:
    with torch.no_grad():
        unwrap(policy.chunks[0]).output_weight()[3, 3] = torch.nan
    message = fail(policy, make_sequences([9, 14]))
    assert message.endswith("not finite first: the LM head's logprobs, on rank 0, sequence 0, 1")


def test_a_gradient(policy: Policy, make_sequences: MakeSequences, fail: Callable[..., str]) -> None:
    """Finite forward, but the backward pass of layer 2 spoils the rows of the second sequence."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt[9:] = torch.inf
        return spoilt

    def hook(_: torch.nn.Module, __: object, output: tuple[torch.Tensor, object]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(spoil)

    layer(policy, 2).register_forward_hook(hook)
    message = fail(policy, make_sequences([9, 14]))
    assert "gradient norm nan" in message or "gradient norm inf" in message
    assert message.endswith("the gradient of layer 2's output, on rank 0, sequence 1")


def test_an_accumulated_gradient(
    policy: Policy,
    make_sequences: MakeSequences,
    fail: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy.chunks[0], "zero_grad_buffer", lambda: None)  # stays as some kernel spoilt it
    vars(layer(policy, 4).self_attention.linear_qkv.weight)["main_grad"][0, 0] = torch.inf
    message = fail(policy, make_sequences(LENGTHS))
    assert "the gradient of decoder.layers.4.self_attention.linear_qkv.weight, on rank 0" in message


def test_a_failure_that_does_not_come_back(
    policy: Policy,
    make_sequences: MakeSequences,
    fail: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reduce = policy.reduce
    calls: list[Any] = []

    def spoil_once(results: Any) -> Any:
        calls.append(results)
        loss, diagnostics, agreement = reduce(results)
        return (torch.nan if len(calls) == 1 else loss), diagnostics, agreement

    monkeypatch.setattr(policy, "reduce", spoil_once)
    assert "both are finite: suspect the machine" in fail(policy, make_sequences(LENGTHS))


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.none])
def test_the_diagnosis_needs_no_more_memory_than_the_update(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
    recompute: Recompute,
) -> None:
    policy = build_policy(policy_config("moe", recompute=recompute, max_tokens_per_micro_batch=256))
    micro_batches = pack_all(policy, make_sequences([200, 180, 220]))
    policy.forward_backward(micro_batches)  # what a first pass makes for good
    with MemoryMeter() as update:
        policy.forward_backward(micro_batches)
    with MemoryMeter() as diagnosis:
        find_non_finite(policy, micro_batches, torch.nan, torch.nan)
    assert diagnosis.peak_bytes <= update.peak_bytes + 8192, "some numbers per token"


def test_recomputation_stays_on(
    policy: Policy, make_sequences: MakeSequences, fail: Callable[..., str]
) -> None:
    sequences = make_sequences(LENGTHS)
    sequences[0].advantages[:] = torch.inf
    fail(policy, sequences)
    assert policy.transformer_config.recompute_granularity == "full"
