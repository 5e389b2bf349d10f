"""One micro-batch through the model: what Megatron is told, and what the loss function returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_drpo.config import Config, LossConfig
from megatron_drpo.errors import NumericsError
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.metrics.diagnostics import summarise
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.policy import forward
from megatron_drpo.policy.forward import (
    LogprobForward,
    LogprobSettings,
    TrainForward,
    finalize_gradients,
    packed_seq_params,
    run_model,
)
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.types import MicroBatch, TrainSequence

BuildPolicy = Callable[[Config], Policy]
MakeSequences = Callable[..., list[TrainSequence]]
PackAll = Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]
Update = Callable[[Policy, Sequence[TrainSequence]], UpdateResult]

SETTINGS = LogprobSettings(vocab_size=101, temperature=0.9, chunk_tokens=16, sequence_parallel=False)


@pytest.fixture
def policy(build_policy: BuildPolicy, policy_config: Callable[..., Config]) -> Policy:
    return build_policy(policy_config("dense"))


@pytest.fixture
def micro_batch(policy: Policy, pack_all: PackAll, make_sequences: MakeSequences) -> MicroBatch:
    (packed,) = pack_all(policy, make_sequences([9, 14, 4]))
    return packed


def test_megatron_is_told_where_sequences_begin(micro_batch: MicroBatch) -> None:
    packed = packed_seq_params(micro_batch)
    assert packed.qkv_format == "thd"
    for bounds in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert bounds is not None
        assert bounds.tolist() == [0, 9, 23, 27]
        assert bounds.dtype is torch.int32
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (14, 14)


def test_the_ddp_wrapped_model_gives_the_same_hidden_states(policy: Policy, micro_batch: MicroBatch) -> None:
    with torch.no_grad():
        wrapped = run_model(micro_batch, policy.chunks[0])
        bare = run_model(micro_batch, unwrap(policy.chunks[0]))
    assert torch.equal(wrapped, bare)
    assert wrapped.shape == (27, 1, 64)


def test_megatrons_division_by_tokens_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one place where its scaling is cancelled; groups are passed on."""
    calls: list[tuple[object, dict[str, Any]]] = []

    def finalize(model: object, **kwargs: Any) -> None:
        calls.append((model, kwargs))

    monkeypatch.setattr(forward, "finalize_model_grads", finalize)
    chunks: list[torch.nn.Module] = []
    finalize_gradients(chunks, torch.tensor(1234), pg_collection="groups")
    assert calls == [(chunks, {"num_tokens": None, "pg_collection": "groups"})]


def test_the_loss_function_gives_sum_and_diagnostics(policy: Policy, micro_batch: MicroBatch) -> None:
    """The plain weighted sum, no token count for Megatron to divide by, and sums over loss tokens."""
    loss = DrpoLoss.from_config(LossConfig(delta=0.5))
    chunk = policy.chunks[0]
    hidden, loss_function = TrainForward(loss, SETTINGS, policy.parallel)(iter([micro_batch]), chunk)
    total, num_tokens, result = loss_function(hidden)
    assert num_tokens.item() == 0

    output, collect = LogprobForward(SETTINGS, policy.parallel)(iter([micro_batch]), chunk)
    logprobs = collect(output)
    mask = micro_batch.loss_mask_T
    logpi, logmu = logprobs[mask].double(), micro_batch.rollout_logprobs_T[mask].double()
    values = loss.value(logpi, logmu, micro_batch.advantages_T[mask].double())
    expected = (values * micro_batch.token_weights_T[mask]).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert total.requires_grad
    assert not result.loss.requires_grad
    assert result.loss.dtype is torch.float64
    assert result.loss.item() == total.item()
    summary = summarise(result.diagnostics)
    assert summary["mismatch/logprob_abs_mean"] == pytest.approx(
        (logpi - logmu).abs().mean().item(), rel=1e-5
    )
    assert summary["policy/kl_k1"] == pytest.approx((logmu - logpi).mean().item(), rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_sequences(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
) -> None:
    sequences = make_sequences([6, 7, 8])
    sequences[1].advantages[2] = torch.nan
    policy = build_policy(policy_config("dense", max_tokens_per_micro_batch=8))
    micro_batches = pack_all(policy, sequences)
    with pytest.raises(NumericsError, match=r"rank 0: the loss is nan in the micro-batch of sequences \[1\]"):
        policy.train_step(micro_batches, StepTimer())


def test_a_masked_token_contributes_nothing_whatever_its_value(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    update: Update,
) -> None:
    clean, dirty = make_sequences([12, 20]), make_sequences([12, 20])
    for sequence in dirty:
        assert not sequence.loss_mask.all()
        sequence.advantages[~sequence.loss_mask] = torch.nan
        sequence.rollout_logprobs[~sequence.loss_mask] = -torch.inf
    results = [update(build_policy(policy_config("dense")), batch) for batch in (clean, dirty)]
    assert (results[0].loss, results[0].grad_norm) == (results[1].loss, results[1].grad_norm)
