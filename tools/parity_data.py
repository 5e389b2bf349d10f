"""Models and a global batch for the parity matrix, and what float64 says of them.

The batch is off-policy with mu from 1e-8 to almost 1, so that every bucket of mu and both sides of every
mask are there. A mask that a rounding error of fp32 could flip would hide what is to be measured, so every
token and every router's choice keeps away from each threshold; that is asserted, not hoped for. Nor may one
token be most of a tensor's gradient: the relative rounding error of its ratio would then be the tensor's.

    R  response tokens of a sequence      N  loss tokens of the batch      K  most probable ids
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_drpo.config.schema import AlgorithmConfig, Anchor, TokenCorrection
from megatron_drpo.types import TrainSequence
from tools.parity_cases import ROWS
from tools.reference_metrics import BUCKET_EDGES, W_EDGES, compute_metrics, gradient_weight
from tools.reference_model import ReferenceModel
from tools.reference_objective import (
    EXCESS,
    Tokens,
    aggregate,
    drift,
    factor,
    geometric_rho,
    has_corrections,
    rho,
    token_values,
)
from tools.tiny_model import write_tokenizer

NUM_SEQUENCES = 28
NUM_TOPK = 5
MARGIN = 1e-4
"""Least distance from every threshold: probabilities, ratios and w absolute, a router's logits likewise."""
VOCAB_SIZE = 450
"""Padded to 512: at TP4 the last shard is padding in part."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "moe": (
        "qwen3_moe",
        {
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


def write_models(kind: str, folder: Path) -> None:
    """`policy`, and `reference`: the same weights, each multiplied by 1 + 3 % noise. In fp32.

    Some rows of the output matrix are large, so that the policy is sure at some positions and gives some
    tokens almost no probability; the embedding is, so that layers do not amplify rounding errors.
    """
    model_type, fields = _MODELS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(_SHAPE | fields))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        if not model.config.tie_word_embeddings:
            model.get_input_embeddings().weight.mul_(8.0)
        head = model.get_output_embeddings().weight.mul_(1.8)
        head[::7] *= 2.6
        head[-1] *= 6.0
        for name in ("policy", "reference"):
            model.save_pretrained(folder / name)
            write_tokenizer(folder / name)
            for parameter in model.parameters():
                parameter.mul_(1 + 0.03 * torch.randn_like(parameter))


# ------------------------------------------------------------------------------------------ sequences


def make_sequences(policy: ReferenceModel, reference: ReferenceModel) -> list[TrainSequence]:
    """The global batch; a sequence at which a router of either model is undecided is drawn again."""
    generator = torch.Generator().manual_seed(7)  # one of those that cover all, see check_coverage
    sequences: list[TrainSequence] = []
    while len(sequences) < NUM_SEQUENCES:
        sequence = _draw_sequence(len(sequences), policy, generator)
        for model in (policy, reference):
            model.router_margin = math.inf
            with torch.no_grad():
                model.logits(sequence.token_ids)
        if min(policy.router_margin, reference.router_margin) > MARGIN:
            sequences.append(sequence)
    sequences[3].loss_mask[:] = False  # a sequence without loss tokens
    _keep_away_from_thresholds(sequences, policy, reference, generator)
    return sequences


@torch.no_grad()
def _draw_sequence(id_: int, policy: ReferenceModel, generator: torch.Generator) -> TrainSequence:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    prompt_length, num_response = int(uniform(1, 8)), int(uniform(1, 30) if id_ else 1)
    token_ids = torch.randint(0, VOCAB_SIZE, (prompt_length,), generator=generator).tolist()
    rollout_logprobs: list[float] = []
    topk_ids: list[torch.Tensor] = []
    topk_logprobs: list[torch.Tensor] = []
    for _ in range(num_response):
        logits = policy.logits(torch.tensor(token_ids))[-1]
        token, logmu = _draw_token(logits.log_softmax(0), uniform, generator)
        noise = (0.02 if uniform(0, 1) < 0.5 else 0.7) * torch.randn(VOCAB_SIZE, generator=generator)
        top = (logits + noise).log_softmax(0).topk(NUM_TOPK)
        token_ids.append(token)
        rollout_logprobs.append(logmu)
        topk_ids.append(top.indices)
        topk_logprobs.append(top.values)
    advantage = (1 if id_ % 3 else -1) * uniform(0.4, 2.0)
    return TrainSequence(
        id=id_,
        token_ids=torch.tensor(token_ids),
        prompt_length=prompt_length,
        advantages=torch.full((num_response,), advantage),
        rollout_logprobs=torch.tensor(rollout_logprobs),
        loss_mask=torch.rand(num_response, generator=generator) > 0.1,
        topk_ids=torch.stack(topk_ids),
        topk_logprobs=torch.stack(topk_logprobs).float(),
    )


def _draw_token(
    logprobs: Tensor, uniform: Callable[[float, float], float], generator: torch.Generator
) -> tuple[int, float]:
    """(token, log mu): any token, a sampled one or the most probable one, with mu near pi, far from it or
    almost 1; or one with a tiny probability, and mu near 1e-8 but r at most 1.35: its logprob, a small
    difference of large numbers, has the largest rounding error.
    """
    kind = uniform(0, 1)
    if kind < 0.05:
        tiny = math.log(1e-8)
        token = int((logprobs - tiny - uniform(-2, 2)).abs().argmin())
        return token, max(tiny + uniform(-0.1, 0.1), float(logprobs[token]) - 0.3)
    if kind < 0.2:
        token = int(torch.randint(0, VOCAB_SIZE, (), generator=generator))
    elif kind < 0.6:
        token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
    else:
        token = int(logprobs.argmax())
        if kind > 0.9 and logprobs[token] > math.log(0.2):
            return token, -uniform(0.002, 0.1)
    if uniform(0, 1) < 0.06:
        return token, float(logprobs[token]) - 0.75  # r = 2.1: outside every trust region
    spread = 0.1 if uniform(0, 1) < 0.5 else 0.3
    noise = spread * float(torch.randn((), generator=generator))
    return token, min(float(logprobs[token]) + noise, -uniform(0.001, 0.2))


def _keep_away_from_thresholds(
    sequences: list[TrainSequence],
    policy: ReferenceModel,
    reference: ReferenceModel,
    generator: torch.Generator,
) -> None:
    """Nudge mu of the tokens that are too near to a threshold of any row, until none is. Where mu is not the
    anchor that may not help: a token that stays near loses its loss."""
    for attempt in range(60):
        with torch.no_grad():
            batch = ReferenceBatch(policy, reference, sequences)
        near_N = torch.stack([batch.margins(algorithm) for algorithm in ROWS.values()]).amin(0) < MARGIN
        if not near_N.any():
            return
        near = near_N.split([int(s.loss_mask.sum()) for s in sequences])
        for sequence, near_R in zip(sequences, near, strict=True):
            chosen = sequence.loss_mask.nonzero()[:, 0][near_R]
            assert sequence.topk_logprobs is not None
            noise = torch.randn(len(chosen), 1 + NUM_TOPK, generator=generator)
            sequence.rollout_logprobs[chosen] -= 0.01 * noise[:, 0].abs()
            sequence.topk_logprobs[chosen] -= 0.01 * noise[:, 1:].abs()
            if attempt >= 10:
                sequence.loss_mask[chosen] = False
    raise AssertionError("some token stays near a threshold")


# ------------------------------------------------------------------------------------------ reference


class ReferenceBatch:
    """A global batch under the float64 models; the graph of the policy's logprobs is kept."""

    def __init__(
        self, policy: ReferenceModel, reference: ReferenceModel, sequences: list[TrainSequence]
    ) -> None:
        self._policy = policy
        sequences = [sequence for sequence in sequences if sequence.loss_mask.any()]
        scores = [_score(policy, sequence) for sequence in sequences]
        self.logpi, self.entropy, self.topk_logpi = (torch.cat(x) for x in zip(*scores, strict=True))
        with torch.no_grad():
            self.logref = torch.cat([_score(reference, sequence)[0] for sequence in sequences])

        def cut(name: str) -> Tensor:
            return torch.cat([getattr(s, name)[s.loss_mask].double() for s in sequences])

        self.rollout, self.advantage, self.topk_logmu = map(
            cut, ("rollout_logprobs", "advantages", "topk_logprobs")
        )
        counts = torch.tensor([int(s.loss_mask.sum()) for s in sequences])
        self.sequence = torch.arange(len(sequences)).repeat_interleave(counts)

    def tokens(self, algorithm: AlgorithmConfig) -> Tokens:
        """What the objective sees. The policy before the update is the reference policy."""
        return Tokens(
            logpi=self.logpi,
            entropy=self.entropy,
            logmu=self.logref if algorithm.anchor is Anchor.recomputed else self.rollout,
            rollout=self.rollout,
            advantage=self.advantage,
            logref=self.logref,
            topk_logpi=self.topk_logpi,
            topk_logmu=self.topk_logmu,
            sequence=self.sequence,
        )

    def results(self, algorithm: AlgorithmConfig) -> dict[str, Any]:
        """Loss, its scale (the aggregate of |term|), gradients by HF name, metrics."""
        t = self.tokens(algorithm)
        values = token_values(t, algorithm)
        loss = aggregate(values, t, algorithm)
        parameters = self._policy.parameters
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        return {
            "loss": loss.item(),
            "scale": aggregate(values.detach().abs(), t, algorithm).item(),
            "gradients": dict(zip(parameters, gradients, strict=True)),
            "metrics": compute_metrics(t, gradient_weight(t, algorithm), algorithm),
        }

    def margins(self, algorithm: AlgorithmConfig) -> Tensor:
        """[N]: distance from the nearest threshold of the loss, the corrections and the metrics."""
        t = self.tokens(algorithm)
        config, correction = algorithm.loss, algorithm.correction
        with torch.no_grad():
            distances = [
                EXCESS[config.name](t, config).abs(),
                t.r.log().abs(),
                (t.pi / t.rollout.exp()).log().abs(),
                *(1 - logprobs.exp().sum(1) for logprobs in (t.topk_logpi, t.topk_logmu)),
                _distance_from_edges(gradient_weight(t, algorithm), config.name),
                *((t.r - bound).abs() for bound in (config.ratio_cap, config.dual_clip) if bound),
            ]
            if correction.token is not TokenCorrection.none:
                of_rho = rho(t, algorithm.anchor)
                distances += [(of_rho - b).abs() for b in (correction.token_low, correction.token_high)]
            for bound in (correction.sequence_low, correction.sequence_high):
                if bound is not None:
                    distances.append((geometric_rho(t, algorithm.anchor) - bound).abs())
            if correction.opsm_delta is not None:
                distances.append((drift(t) - correction.opsm_delta).abs())
            return torch.stack(distances).amin(0)


def _distance_from_edges(weight: Tensor, loss: str) -> Tensor:
    """Of w from the edges of its histogram; infinite where w is exactly 0 or 1, as it then is in fp32 too.

    On which side of 1 a token lies is decided by the sign of r - 1, whose margin is another one, and not by
    the distance: a token with mu = 1e-8 may have w = 1 + 1e-7. Not so for GSPO, whose w is s / r.
    """
    edges = torch.tensor(W_EDGES[1:-1], dtype=torch.float64)
    distances = (weight[:, None] - edges).abs()
    if loss != "gspo":
        distances[:, edges == 1] *= 1e5
    return torch.where(distances == 0, math.inf, distances).amin(1)


def _score(model: ReferenceModel, sequence: TrainSequence) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropies, logprobs of the top-k ids without a gradient) of a sequence's loss tokens."""
    logprobs_LV = model.logits(sequence.token_ids).log_softmax(-1)
    mask = sequence.loss_mask
    logprobs_NV = logprobs_LV[sequence.prompt_length - 1 : -1][mask]
    labels_N = sequence.token_ids[sequence.prompt_length :][mask]
    assert sequence.topk_ids is not None
    return (
        logprobs_NV.gather(1, labels_N[:, None])[:, 0],
        -(logprobs_NV.exp() * logprobs_NV).sum(1),
        logprobs_NV.detach().gather(1, sequence.topk_ids[mask]),
    )


def check_coverage(batch: ReferenceBatch) -> None:
    """Every branch has tokens on both sides, and none is near a threshold."""
    mu = batch.rollout.exp()
    for low, high in itertools.pairwise(BUCKET_EDGES):
        chosen = (mu > low) & (mu <= high)
        assert chosen.sum() >= 4, f"{int(chosen.sum())} tokens with mu in ({low}, {high}]"
    assert mu.min() < 3e-8, f"the smallest mu is {mu.min():.1e}"
    for name, algorithm in ROWS.items():
        t = batch.tokens(algorithm)
        assert batch.margins(algorithm).min() >= MARGIN, f"{name}: a token near a threshold"
        moves = (t.advantage * (t.r - 1)).detach()
        sides = {"diverging": moves > 0, "pi above mu": t.r > 1}
        if algorithm.loss.name != "surrogate":
            sides["outside"] = EXCESS[algorithm.loss.name](t, algorithm.loss) > 0
            sides["outside and diverging"] = sides["outside"] & sides["diverging"]
            sides["outside and converging"] = sides["outside"] & ~sides["diverging"]
        if algorithm.loss.name.startswith(("drpo", "spo")):
            sides["corrective"] = gradient_weight(t, algorithm) < 0
        if has_corrections(algorithm.correction):
            factors = factor(t, algorithm.correction, algorithm.anchor)
            is_tis = algorithm.correction.token is TokenCorrection.tis
            sides["corrected"] = factors == (algorithm.correction.token_high if is_tis else 0)
        for side, chosen in sides.items():
            assert 0 < chosen.sum() < len(mu), f"{name}: {side} for {int(chosen.sum())} of {len(mu)} tokens"


# ---------------------------------------------------------------------------------------------- files


def write_reference(kind: str, folder: Path, rows: list[str]) -> None:
    """Models, batch and float64 results of one kind of model, under `folder`/`kind`; in a process of its own,
    before Megatron changes torch."""
    path = folder / kind
    write_models(kind, path)
    policy, reference = ReferenceModel(path / "policy"), ReferenceModel(path / "reference")
    sequences = make_sequences(policy, reference)
    batch = ReferenceBatch(policy, reference, sequences)
    check_coverage(batch)
    fields = TrainSequence.__dataclass_fields__
    torch.save([{name: getattr(s, name) for name in fields} for s in sequences], path / "sequences.pt")
    torch.save({row: batch.results(ROWS[row]) for row in rows}, path / "results.pt")


def load_sequences(path: Path) -> list[TrainSequence]:
    """What `write_reference` wrote."""
    return [TrainSequence(**values) for values in torch.load(path / "sequences.pt", weights_only=True)]
