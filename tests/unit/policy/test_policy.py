"""Losses, gradients and logprobs of the whole policy on one rank against transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing

from megatron_drpo.batching.packing import dummy_micro_batch, unpack
from megatron_drpo.config.schema import Anchor, Config, KlConfig, OptimizerConfig, ParallelConfig, Recompute
from megatron_drpo.losses.aggregation import count_loss
from megatron_drpo.metrics.diagnostics import summarise
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform.base import Platform
from megatron_drpo.policy.model import unwrap
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.types import MicroBatch, TrainSequence
from megatron_drpo.weights.hf_folder import HfFolder

BuildPolicy = Callable[[Config], Policy]
MakeSequences = Callable[..., list[TrainSequence]]
PackAll = Callable[[Policy, Sequence[TrainSequence]], list[MicroBatch]]
Update = Callable[[Policy, Sequence[TrainSequence]], UpdateResult]

LENGTHS = [5, 17, 2, 9, 31, 3, 12]
UNCLIPPED = OptimizerConfig(lr=1e-3, clip_grad=None)


@pytest.fixture
def load_reference(hf_model: Callable[[str], Path]) -> Callable[[str], transformers.PreTrainedModel]:
    """The same model in transformers, fp32, its experts as plain loops."""

    def load(name: str) -> transformers.PreTrainedModel:
        config = transformers.AutoConfig.from_pretrained(hf_model(name))
        if not name.startswith("dense"):
            config._experts_implementation = "eager"
        return transformers.AutoModelForCausalLM.from_pretrained(hf_model(name), config=config)

    return load


def reference_logprobs(
    model: transformers.PreTrainedModel, sequence: TrainSequence, temperature: float
) -> torch.Tensor:
    """[R] float64 log pi of the response tokens."""
    logits = model(sequence.token_ids[None]).logits[0].double() / temperature
    labels = sequence.token_ids[sequence.prompt_length :]
    predicting = logits[sequence.prompt_length - 1 : -1]
    return predicting.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def reference_loss(
    model: transformers.PreTrainedModel, sequences: list[TrainSequence], config: Config
) -> torch.Tensor:
    """The global batch's drpo loss (Eq. 8 of arXiv 2606.09821, token mean), written out."""
    total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        logpi = reference_logprobs(model, sequence, config.rollout.temperature)
        mu = sequence.rollout_logprobs.double().exp()
        ratio = logpi.exp() / mu
        advantage = sequence.advantages.double()
        loss = -advantage * ratio + advantage.abs() * mu * (ratio - 1) ** 2 / (2 * 0.5)
        total = total + loss[sequence.loss_mask].sum()
    return total / sum(int(sequence.loss_mask.sum()) for sequence in sequences)


def gradients_by_hf_name(policy: Policy) -> dict[str, torch.Tensor]:
    """The gradients of the last update, brought into HF's names and shapes by the export of weights."""
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.copy_(vars(parameter)["main_grad"])
    return {name: tensor.clone() for name, tensor in policy.hf_tensors()}


def relative_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - tensor.double()).norm() / tensor.double().norm()).item()
        for name, tensor in expected.items()
    }


def unfuse_experts(gradients: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """transformers 5 holds a layer's experts in one tensor; HF folders hold one tensor per expert."""
    result = {}
    for name, gradient in gradients.items():
        if name in names:
            result[name] = gradient
            continue
        prefix, _, kind = name.rpartition(".")
        for expert, matrix in enumerate(gradient):
            if kind == "gate_up_proj":
                gate, up = matrix.chunk(2)
                result[f"{prefix}.{expert}.gate_proj.weight"] = gate
                result[f"{prefix}.{expert}.up_proj.weight"] = up
            else:
                result[f"{prefix}.{expert}.{kind}.weight"] = matrix
    return result


@pytest.mark.parametrize("model", ["dense", "dense_tied", "moe", "moe_mixed"])
def test_loss_and_gradients_of_a_global_batch(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    update: Update,
    load_reference: Callable[[str], transformers.PreTrainedModel],
    model: str,
) -> None:
    """Several micro-batches against one plain sum over sequences, differentiated by autograd."""
    sequences = make_sequences(LENGTHS)
    config = policy_config(model, UNCLIPPED, max_tokens_per_micro_batch=32, logprob_buffer_bytes=7 * 101 * 4)
    policy = build_policy(config)
    result = update(policy, sequences)

    reference = load_reference(model)
    expected = reference_loss(reference, sequences, config)
    expected.backward()
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    found = gradients_by_hf_name(policy)
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    distances = relative_distance(found, unfuse_experts(gradients, set(found)))
    assert max(distances.values()) < 1e-5, max(distances.items(), key=lambda item: item[1])
    norm = torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("model", ["dense", "moe_mixed"])
def test_the_update_does_not_depend_on_how_it_is_computed(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
    model: str,
) -> None:
    """Size of micro-batches, padding, dummies, order, recompute, chunks of the logprob op."""
    sequences = make_sequences(LENGTHS)
    num_tokens, num_sequences = count_loss(sequences)
    assert (num_tokens, num_sequences) == (sum(int(s.loss_mask.sum()) for s in sequences), len(LENGTHS))

    def run(
        fields: dict[str, object], batch: list[TrainSequence], num_dummies: int = 0
    ) -> tuple[UpdateResult, dict[str, torch.Tensor]]:
        policy = build_policy(policy_config(model, UNCLIPPED, **fields))
        micro_batches = pack_all(policy, batch) + [dummy_micro_batch(8) for _ in range(num_dummies)]
        result = policy.train_step(micro_batches, StepTimer())
        return result, gradients_by_hf_name(policy)

    expected, gradients = run({"max_tokens_per_micro_batch": 1000}, sequences)
    ways: list[tuple[dict[str, object], list[TrainSequence], int]] = [
        ({"max_tokens_per_micro_batch": 1}, sequences, 0),
        ({"max_tokens_per_micro_batch": 40}, sequences[::-1], 2),
        ({"recompute": Recompute.full, "max_tokens_per_micro_batch": 40}, sequences, 0),
        ({"recompute": Recompute.selective, "logprob_buffer_bytes": 3 * 101 * 4}, sequences, 1),
    ]
    for way in ways:
        result, found = run(*way)
        assert result.loss == pytest.approx(expected.loss, rel=1e-6), way[0]
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6), way[0]
        assert max(relative_distance(found, gradients).values()) < 1e-5, way[0]
        summary, other = summarise(expected.diagnostics), summarise(result.diagnostics)
        for name in ("policy/entropy", "policy/ratio_max", "mismatch/logprob_abs_mean", "policy/ess"):
            assert other[name] == pytest.approx(summary[name], rel=1e-5), name


@pytest.mark.parametrize("model", ["dense", "moe_mixed"])
def test_padding_to_a_multiple_that_suits_the_platform(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
    cpu_platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    """As on GPUs: micro-batches have few sizes, and nothing else is different."""
    results = []
    for multiple, sizes in ((1, {24, 31}), (16, {32})):
        monkeypatch.setattr(cpu_platform, "token_multiple", multiple)
        policy = build_policy(policy_config(model, UNCLIPPED, max_tokens_per_micro_batch=32))
        micro_batches = pack_all(policy, make_sequences(LENGTHS))
        assert {m.num_tokens for m in micro_batches} == sizes
        result = policy.train_step(micro_batches, StepTimer())
        results.append((result, gradients_by_hf_name(policy)))
    (expected, gradients), (padded, found) = results
    assert padded.loss == pytest.approx(expected.loss, rel=1e-6)
    assert padded.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    assert padded.diagnostics.num_tokens == expected.diagnostics.num_tokens
    assert max(relative_distance(found, gradients).values()) < 1e-5


def test_dummies_alone_change_nothing(
    build_policy: BuildPolicy, policy_config: Callable[..., Config]
) -> None:
    """A replica whose share has no loss at all still takes part in the update."""
    policy = build_policy(policy_config("moe", OptimizerConfig(lr=1e-3, weight_decay=0.0)))
    before = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    result = policy.train_step([dummy_micro_batch(4), dummy_micro_batch(4)], StepTimer())
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    for name, tensor in policy.hf_tensors():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("model", ["dense_tied", "moe_renormalised"])
def test_logprobs(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
    load_reference: Callable[[str], transformers.PreTrainedModel],
    model: str,
) -> None:
    """At the sampling temperature, where there is a loss; and the model is left as it was."""
    sequences = make_sequences(LENGTHS)
    config = policy_config(model, max_tokens_per_micro_batch=30)
    policy = build_policy(config)
    micro_batches = pack_all(policy, sequences)
    assert len(micro_batches) > 2
    reference = load_reference(model)
    found: dict[int, torch.Tensor] = {}
    for micro_batch, logprobs in zip(micro_batches, policy.compute_logprobs(micro_batches), strict=True):
        assert logprobs.shape == (micro_batch.num_tokens,)
        found |= unpack(logprobs, micro_batch)
    with torch.no_grad():
        for sequence in sequences:
            expected = reference_logprobs(reference, sequence, config.rollout.temperature)
            expected = torch.where(sequence.loss_mask, expected, 0.0)
            torch.testing.assert_close(found[sequence.id].double(), expected, rtol=0, atol=1e-5)
    again = policy.compute_logprobs(micro_batches)
    assert all(torch.equal(a, b) for a, b in zip(again, policy.compute_logprobs(micro_batches), strict=True))


def test_weights_path(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    hf_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The policy and its reference start from the checkpoint, not from model_path; a reference_path wins."""
    other = build_policy(policy_config("moe_perturbed"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    dist_checkpointing.save(unwrap(other.chunks[0]).sharded_state_dict(), str(checkpoint))
    config = policy_config("moe", weights_path=str(checkpoint))
    config.algorithm.kl = KlConfig(coef=0.1)
    policy = build_policy(config)
    expected = HfFolder(hf_model("moe_perturbed"))
    for name, tensor in policy.hf_tensors():
        assert torch.equal(tensor, expected.get(name)), name
    (own,), (reference,) = policy.chunks, policy.reference_chunks
    for parameter, frozen in zip(own.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter, frozen)
        assert not frozen.requires_grad
    config.algorithm.kl = KlConfig(coef=0.1, reference_path=str(hf_model("moe")))
    (reference,) = build_policy(config).reference_chunks
    assert not torch.equal(next(own.parameters()), next(reference.parameters()))


@pytest.mark.parametrize("anchor", Anchor)
def test_what_the_objective_compares_with(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    pack_all: PackAll,
    load_reference: Callable[[str], transformers.PreTrainedModel],
    hf_model: Callable[[str], Path],
    anchor: Anchor,
) -> None:
    """Old logprobs are the policy's own, the reference's are another model's of the same architecture."""
    config = policy_config("moe", max_tokens_per_micro_batch=30)
    config.algorithm.anchor = anchor
    config.algorithm.kl = KlConfig(coef=0.1, reference_path=str(hf_model("moe_perturbed")))
    policy = build_policy(config)
    sequences = make_sequences(LENGTHS)
    batches = [pack_all(policy, sequences[:4]), pack_all(policy, sequences[4:])]
    annotated = policy.add_logprobs(batches)
    assert [len(batch) for batch in annotated] == [len(batch) for batch in batches]
    own, other = load_reference("moe"), load_reference("moe_perturbed")
    by_id = {sequence.id: sequence for sequence in sequences}
    for micro_batch in itertools.chain.from_iterable(annotated):
        found = {"ref": (other, micro_batch.ref_logprobs_T)}
        if anchor is Anchor.recomputed:
            found["old"] = (own, micro_batch.old_logprobs_T)
        else:
            assert micro_batch.old_logprobs_T is None
        for model, values_T in found.values():
            assert values_T is not None
            for id_, values in unpack(values_T, micro_batch).items():
                with torch.no_grad():
                    expected = reference_logprobs(model, by_id[id_], config.rollout.temperature)
                expected = torch.where(by_id[id_].loss_mask, expected, 0.0)
                torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-5)


def test_learning_rate_follows_the_updates(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: MakeSequences,
    update: Update,
) -> None:
    config = policy_config("dense", OptimizerConfig(lr=1e-3, num_warmup_updates=4))
    policy = build_policy(config)
    rates = [update(policy, make_sequences([6])).lr for _ in range(5)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert policy.num_updates == 5


def test_micro_batch_counts_of_the_interleaved_schedule(
    build_policy: BuildPolicy, policy_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only with virtual stages must the number of micro-batches be a multiple of the pipeline size."""
    policy = build_policy(policy_config("dense"))
    monkeypatch.setattr(policy.parallel, "pipeline_size", 4)
    assert [policy.round_up_micro_batches(count) for count in (1, 4, 5)] == [1, 4, 5]
    interleaved = ParallelConfig(pipeline_parallel_size=4, virtual_pipeline_parallel_size=2)
    policy.config = replace(policy.config, parallel=interleaved)
    assert [policy.round_up_micro_batches(count) for count in (1, 4, 5)] == [4, 4, 8]
