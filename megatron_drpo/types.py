"""The vocabulary of the training loop: what flows from a prompt file to an optimizer step.

Dimensions used in names and comments:
    P  prompts of one step         G  samples of one prompt (a group)
    R  sampled response tokens     L  tokens of one sequence (prompt + response)
    K  most probable ids per response token, where the loss asks for them; or experts per token
    M  mixture-of-experts layers
    T  packed tokens of one micro-batch, padding included
    S  packed sequences of one micro-batch, the padding sequence included
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reward workers import this module: it must stay light
    import torch
    from jaxtyping import Bool, Float, Int

    Routes = Int[torch.Tensor, "_ M K"]
    """uint8 for up to 256 experts, else int16: for long responses of deep models they are gigabytes."""


class FinishReason(StrEnum):
    """Why a response ended."""

    stop = "stop"
    """The policy sampled a stop token."""
    length = "length"
    """The token limit was reached: the response is truncated."""
    abort = "abort"
    """The request was aborted; the response is incomplete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line of a prompt file, rendered and tokenised."""

    id: int
    """Line number in the file, from 0: stable under shuffling, filtering and resume."""
    text: str
    """The rendered prompt, chat template applied."""
    token_ids: tuple[int, ...]
    answer: str | None = None
    """Ground truth for the reward."""
    response: str | None = None
    """Demonstration for `train.mode=sft`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """All other fields of the line, as read."""


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One sampled response to one prompt, as the engine reported it."""

    prompt: Prompt
    sample_index: int
    """0 .. G-1 within the group."""
    response_ids: list[int]
    """[R] sampled token ids, the stop token included."""
    rollout_logprobs: list[float]
    """[R] log mu of each sampled token at the sampling temperature (natural log)."""
    policy_versions: list[int]
    """[R] version of the weights that sampled each token."""
    finish_reason: FinishReason
    text: str
    """The response decoded; special tokens skipped unless `reward.keep_special_tokens`."""
    topk_ids: list[list[int]] | None = None
    """[R][K] the engine's K most probable ids at each response token, if the loss asks for them."""
    topk_logprobs: list[list[float]] | None = None
    """[R][K] their log mu at the sampling temperature."""
    routes: Routes | None = None
    """[L-1][M][K] the experts that the server chose, if they were asked for; the last token was never fed."""
    response_mask: list[bool] | None = None
    """[R] False where a token was inserted by `rollout.function`, not sampled; None: all were sampled."""
    servers: list[tuple[str, int]] = field(default_factory=list)
    """(endpoint, tokens) runs in order: who sampled the response; empty if that is not known."""


@dataclass(slots=True, kw_only=True)
class RolloutGroup:
    """All G samples of one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a training sequence comes from, for messages."""

    where: str
    """Prompt, its line and the sample."""
    servers: tuple[tuple[str, int], ...]
    """See `Rollout`."""

    def server_of(self, position: int) -> str:
        """The endpoint that sampled a response token."""
        for endpoint, num_tokens in self.servers:
            if position < num_tokens:
                return endpoint
            position -= num_tokens
        return "an unknown server"


@dataclass(slots=True, kw_only=True)
class TrainSequence:
    """One sequence ready to be packed: what the loss needs of one rollout (or of one demonstration)."""

    id: int
    """Unique within a step; names the sequence in errors."""
    token_ids: Int[torch.Tensor, " L"]
    """int64, prompt then response."""
    prompt_length: int
    """Tokens of the prompt; L - prompt_length = R >= 1."""
    advantages: Float[torch.Tensor, " R"]
    """float32 per response token."""
    rollout_logprobs: Float[torch.Tensor, " R"]
    """float32 log mu per response token; zeros in sft mode."""
    loss_mask: Bool[torch.Tensor, " R"]
    """Response tokens that contribute to the loss."""
    topk_ids: Int[torch.Tensor, "R K"] | None = None
    """int64, see `Rollout`; on all sequences of a step or on none."""
    topk_logprobs: Float[torch.Tensor, "R K"] | None = None
    """float32."""
    routes: Routes | None = None
    """[L-1, M, K] checked, see `Rollout`; None: the router chooses."""
    origin: Origin | None = None
    """Of a rollout."""

    def __len__(self) -> int:
        return int(self.token_ids.numel())


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """Sequences packed end to end (THD), padded by one dummy sequence without loss; under context
    parallelism, one rank's tokens of them.

    Position t predicts token t+1 of its own sequence: labels_T, rollout_logprobs_T, advantages_T and
    token_weights_T are aligned with the position that predicts, never with the token predicted.
    The loss of a global batch is the plain sum of token_weights_T * loss_T over all its micro-batches on
    all data-parallel ranks; token_weights_T carries the whole normalisation, and is 0 where there is no loss.
    """

    token_ids_T: Int[torch.Tensor, " T"]
    position_ids_T: Int[torch.Tensor, " T"]
    labels_T: Int[torch.Tensor, " T"]
    """int64; 0 at positions that predict nothing."""
    loss_mask_T: Bool[torch.Tensor, " T"]
    rollout_logprobs_T: Float[torch.Tensor, " T"]
    advantages_T: Float[torch.Tensor, " T"]
    token_weights_T: Float[torch.Tensor, " T"]
    sequence_index_T: Int[torch.Tensor, " T"]
    """int64, 0 .. S-1: which packed sequence a position belongs to."""
    cu_seqlens: Int[torch.Tensor, " S+1"]
    """int32, first 0, last T (of the whole sequences, also where context parallelism has split them)."""
    max_seqlen: int
    sequence_ids: list[int]
    """Ids of the real sequences, in packed order (the padding sequence has none)."""
    prompt_lengths: list[int]
    """Prompt tokens of each real sequence: what tells its response from its prompt when unpacking."""
    response_lengths: list[int]
    """Response tokens of each real sequence: what tells them from the padding behind them."""
    topk_ids_TK: Int[torch.Tensor, "T K"] | None = None
    """int64; 0 where nothing was sampled."""
    topk_logprobs_TK: Float[torch.Tensor, "T K"] | None = None
    routes_TMK: Int[torch.Tensor, "T M K"] | None = None
    """uint8 or int16: experts to take instead of the router's choice (policy.routing_replay=rollout)."""
    has_routes_T: Bool[torch.Tensor, " T"] | None = None
    """Where to: not for padding, a sequence's last token, and sequences without routes."""
    old_logprobs_T: Float[torch.Tensor, " T"] | None = None
    """The trainer's own logprobs before the step's first update (anchor=recomputed), on the last stage."""
    ref_logprobs_T: Float[torch.Tensor, " T"] | None = None
    """The reference policy's logprobs (kl.coef > 0), on the last stage."""
    loss_rows_N: Int[torch.Tensor, " N"] | None = None
    """int64, the positions where loss_mask_T is True, ascending; set by `packing.to_device`."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.numel())
