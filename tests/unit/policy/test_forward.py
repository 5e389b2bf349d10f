"""One micro-batch through the model: what Megatron is told, and what the loss function returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from megatron_drpo.batching.packing import to_device
from megatron_drpo.config.schema import (
    AlgorithmConfig,
    Anchor,
    Config,
    CorrectionConfig,
    KlConfig,
    LogprobBackend,
    LogprobMode,
    LossConfig,
    RoutingReplay,
    TokenCorrection,
)
from megatron_drpo.errors import DataError
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.objective import Objective, build_objective
from megatron_drpo.losses.tokens import LossTokens
from megatron_drpo.metrics.diagnostics import summarise
from megatron_drpo.policy.forward import (
    ForwardSettings,
    LogprobForward,
    LossRows,
    TrainForward,
    packed_seq_params,
    run_model,
)
from megatron_drpo.policy.kernels import build_row_kernels
from megatron_drpo.policy.logprobs import LogprobSettings
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.types import MicroBatch, TrainSequence
from tests.host_syncs import count_host_syncs

BuildPolicy = Callable[[Config], Policy]
MakeSequences = Callable[..., list[TrainSequence]]
PackAll = Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]
Update = Callable[[Policy, Sequence[TrainSequence]], UpdateResult]

SETTINGS = ForwardSettings(
    logprobs=LogprobSettings(
        vocab_size=101,
        group=None,
        buffer_bytes=16 * 101 * 4,
        kernels=build_row_kernels(LogprobBackend.torch, torch.device("cpu")),
    ),
    temperature=0.9,
    sequence_parallel=False,
    one_pass=False,
)


@pytest.fixture
def policy(build_policy: BuildPolicy, policy_config: Callable[..., Config]) -> Policy:
    return build_policy(policy_config("dense"))


@pytest.fixture
def micro_batch(policy: Policy, pack_all: PackAll, make_sequences: MakeSequences) -> MicroBatch:
    (packed,) = pack_all(policy, make_sequences([9, 14, 4]))
    return to_device(packed, policy.parallel.device)


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


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_loss_function_gives_sum_and_diagnostics(
    policy: Policy, micro_batch: MicroBatch, one_pass: bool
) -> None:
    """The plain weighted sum, no token count for Megatron to divide by, and sums over loss tokens."""
    loss = DrpoLoss.from_config(LossConfig(delta=0.5))
    chunk = policy.chunks[0]
    settings = replace(SETTINGS, one_pass=one_pass)
    forward = TrainForward(Objective(loss=loss), settings, policy.parallel)
    hidden, loss_function = forward(iter([micro_batch]), chunk)
    total, num_tokens, result = loss_function(hidden)
    assert num_tokens.item() == 0

    with torch.no_grad():
        output, collect = LogprobForward(SETTINGS)(iter([micro_batch]), chunk)
        logprobs = collect(output)
    mask = micro_batch.loss_mask_T
    assert (logprobs[~mask] == 0).all()
    logpi, logmu = logprobs[mask].double(), micro_batch.rollout_logprobs_T[mask].double()
    tokens = LossTokens(
        logprobs_N=logpi,
        anchor_logprobs_N=logmu,
        rollout_logprobs_N=logmu,
        advantages_N=micro_batch.advantages_T[mask].double(),
    )
    expected = (loss.value(tokens) * micro_batch.token_weights_T[mask]).sum()
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


RICH = AlgorithmConfig(
    loss=LossConfig(name="drpo", delta=0.3),
    anchor=Anchor.recomputed,
    correction=CorrectionConfig(token=TokenCorrection.tis, token_high=1.5),
    kl=KlConfig(coef=0.1),
    entropy_coef=0.05,
)


def test_one_pass_and_recompute_give_the_same_gradients(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
) -> None:
    """With a correction, a KL penalty, an entropy bonus, and a chunk of rows at a time."""
    results = []
    for mode in (LogprobMode.one_pass, LogprobMode.recompute):
        config = policy_config("dense_tied", logprob_mode=mode, logprob_buffer_bytes=7 * 101 * 4)
        config.algorithm = RICH
        policy = build_policy(config)
        assert policy.forward_settings.one_pass is (mode is LogprobMode.one_pass)
        (micro_batches,) = policy.add_logprobs([pack_all(policy, make_sequences([9, 14, 4, 30]))])
        loss, _, _ = policy.reduce(policy.forward_backward(micro_batches))
        gradients = {name: vars(p)["main_grad"].clone() for name, p in policy.chunks[0].named_parameters()}
        results.append((loss, gradients))
    (loss, gradients), (other_loss, others) = results
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 1e-5 * others[name].norm(), name


def test_sequence_losses_are_recomputed(
    build_policy: BuildPolicy, policy_config: Callable[..., Config]
) -> None:
    policy = build_policy(policy_config("dense"))
    assert policy.forward_settings.one_pass
    policy.objective = build_objective(AlgorithmConfig(loss=LossConfig(name="gspo")))
    assert not policy.forward_settings.one_pass


def test_loss_rows_are_cut_out_of_the_packed_fields(micro_batch: MicroBatch) -> None:
    old = replace(micro_batch, old_logprobs_T=-torch.arange(27.0), ref_logprobs_T=-2 * torch.arange(27.0))
    rows = LossRows.of(old, 0.9)
    positions = micro_batch.loss_mask_T.nonzero()[:, 0]
    assert torch.equal(rows.logprobs.rows_N, positions)
    assert torch.equal(rows.anchor_logprobs_N, -positions.float())
    assert rows.ref_logprobs_N is not None
    assert torch.equal(rows.ref_logprobs_N, -2.0 * positions)
    assert torch.equal(rows.rollout_logprobs_N, micro_batch.rollout_logprobs_T[positions])
    expected = [sum(int(p) >= bound for bound in (9, 23)) for p in positions]
    assert rows.sequences.index_N.tolist() == expected
    assert torch.equal(LossRows.of(micro_batch, 0.9).anchor_logprobs_N, rows.rollout_logprobs_N)


ON_THE_HOST = {
    "megatron_drpo/policy/schedule.py:<genexpr>",
    "megatron_drpo/batching/packing.py:to_device",
    "megatron_drpo/policy/forward.py:check_micro_batch_ids",
    "megatron_drpo/policy/logprobs.py:check_ids",
    "megatron_drpo/policy/logprobs.py:_check_is_one",
}
"""They look at micro-batches before these go to the device; the last one waits on a CPU alone."""


@pytest.mark.parametrize("mode", [LogprobMode.one_pass, LogprobMode.recompute])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_host_waits_once_per_update(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
    mode: LogprobMode,
    num_micro_batches: int,
) -> None:
    """For loss and diagnostics. Megatron waits once per mixture of experts, for the rows of each; replayed
    routes and what the last stage computes add nothing. (Backward operators of torch itself, which have no
    place in Python, are not looked at: the kernels that they come from are the stand-in's.)"""
    config = policy_config(
        "moe",
        routing_replay=RoutingReplay.rollout,
        logprob_mode=mode,
        max_tokens_per_micro_batch=80 // num_micro_batches,
    )
    policy = build_policy(config)
    assert policy.architecture.moe is not None
    experts = torch.arange(policy.architecture.moe.num_experts_per_token, dtype=torch.uint8)
    sequences = make_sequences([9, 14, 4, 30, 10])
    for sequence in sequences:
        sequence.routes = experts.expand(len(sequence) - 1, policy.architecture.num_layers, -1)
    micro_batches = pack_all(policy, sequences)
    assert len(micro_batches) == num_micro_batches
    policy.reduce(policy.forward_backward(micro_batches))  # bucket edges are copied once
    with count_host_syncs() as syncs:
        policy.reduce(policy.forward_backward(micro_batches))
    own = {place: count for place, count in syncs.of("megatron_drpo/").items() if place not in ON_THE_HOST}
    assert own == {"megatron_drpo/policy/policy.py:reduce": 1}
    megatrons = syncs.of("megatron/core/transformer/")
    assert megatrons == {
        "megatron/core/transformer/moe/experts.py:forward": num_micro_batches * policy.architecture.num_layers
    }


def test_ids_are_checked_before_they_go_to_the_device(
    policy: Policy, pack_all: PackAll, make_sequences: MakeSequences
) -> None:
    (micro_batch,) = pack_all(policy, make_sequences([9, 14, 4]))
    position = int(micro_batch.loss_mask_T.nonzero()[3])
    micro_batch.labels_T[position] = 101
    for run in (policy.forward_backward, policy.compute_logprobs):
        with pytest.raises(
            DataError, match=f"the label 101 of token {position} of the micro-batch is outside"
        ):
            run([micro_batch])


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
