"""Every knob of a run, in the order data flows through it.

Defaults live here and nowhere else. This module imports nothing heavy, so that a configuration can be
checked in a second on any machine. How files and command lines become a `Config`: `config_io.py`.

Each section's `problems()` yields one sentence per broken rule; `Config` gathers them all. Rules that
need the model (heads, layers, experts) live in `policy/parallel.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from megatron_drpo.errors import ConfigError

Problems = Iterator[str]


def _at_least(section: object, prefix: str, minimum: float, *names: str) -> Problems:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < minimum:
            yield f"{prefix}.{name}={value}: must be at least {minimum}"


def _positive(section: object, prefix: str, *names: str) -> Problems:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            yield f"{prefix}.{name}={value}: must be greater than 0"


# --------------------------------------------------------------------------------------- what to do


class Mode(StrEnum):
    rl = "rl"
    sft = "sft"


class PlatformName(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True)
class TrainConfig:
    mode: Mode = Mode.rl
    """`rl`: sample, score, update. `sft`: maximise the likelihood of each line's `response`."""
    num_steps: int = 100
    """Steps of the whole run; a resumed run continues up to this number."""
    num_updates_per_step: int = 1
    """Optimizer steps (global batches) per step; each takes an equal share of the step's sequences."""

    def problems(self) -> Problems:
        yield from _at_least(self, "train", 1, "num_steps", "num_updates_per_step")


# ---------------------------------------------------------------------------------------------- data


class OnBadLine(StrEnum):
    error = "error"
    skip = "skip"


class OnLongPrompt(StrEnum):
    error = "error"
    drop = "drop"


@dataclass(kw_only=True)
class DataConfig:
    train_path: str = ""
    """JSONL; a line has `prompt` (text) or `messages` (chat), `answer`, `response` (sft), free metadata."""
    eval_path: str | None = None
    """Held-out JSONL of the same form."""
    on_bad_line: OnBadLine = OnBadLine.error
    """A line that is not valid: stop and name it, or skip and count it."""
    apply_chat_template: bool = False
    """Wrap a `prompt` as one user message. `messages` always go through the chat template."""
    max_prompt_tokens: int = 1024
    on_long_prompt: OnLongPrompt = OnLongPrompt.drop
    """A prompt over max_prompt_tokens: drop and count it, or stop and name it."""
    shuffle: bool = True
    """Reshuffle every epoch, seeded by `seed` and the epoch."""

    def problems(self) -> Problems:
        if not self.train_path:
            yield "data.train_path is missing: give a JSONL file of prompts"
        yield from _at_least(self, "data", 1, "max_prompt_tokens")


# ------------------------------------------------------------------------------------------- rollout


class RolloutEngineName(StrEnum):
    embedded = "embedded"
    sglang = "sglang"


@dataclass(kw_only=True)
class EmbeddedServerConfig:
    """The server this project starts itself, backed by transformers (`rollout/embedded/`)."""

    host: str = "127.0.0.1"
    num_slots: int = 64
    """Sequences decoded together."""
    num_threads: int = 2
    """CPU threads of the server process."""

    def problems(self) -> Problems:
        yield from _at_least(self, "rollout.embedded", 1, "num_slots", "num_threads")


@dataclass(kw_only=True)
class RolloutConfig:
    engine: RolloutEngineName = RolloutEngineName.embedded
    """`embedded`: started by `megatron-drpo train`. `sglang`: attach to running servers at `endpoints`."""
    endpoints: list[str] = field(default_factory=list)
    """Base URLs of running servers, e.g. http://127.0.0.1:30000. Empty: start the embedded server."""
    num_prompts_per_step: int = 64
    num_samples_per_prompt: int = 8
    max_response_tokens: int = 1024
    temperature: float = 1.0
    """Sampling temperature; the trainer's logprobs use it as well."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: off."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Besides the model's own end-of-sequence ids."""
    deterministic: bool = False
    """Fix batch composition, order and per-sample seeds: bit-reproducible on the CPU platform in fp32."""
    max_concurrent_requests: int = 64
    """Requests in flight per data-parallel replica; each asks for all samples of one prompt."""
    request_timeout_s: float = 600.0
    num_retries: int = 3
    """Further attempts of a failed request before the run stops."""
    startup_timeout_s: float = 120.0
    """How long a server may take until it answers /health."""
    embedded: EmbeddedServerConfig = field(default_factory=EmbeddedServerConfig)

    def problems(self) -> Problems:
        yield from _at_least(
            self,
            "rollout",
            1,
            "num_prompts_per_step",
            "num_samples_per_prompt",
            "max_response_tokens",
            "max_concurrent_requests",
        )
        yield from _at_least(self, "rollout", 0, "num_retries")
        yield from _positive(self, "rollout", "temperature", "request_timeout_s", "startup_timeout_s")
        if not 0 < self.top_p <= 1:
            yield f"rollout.top_p={self.top_p}: must be in (0, 1]"
        if self.top_k != -1 and self.top_k < 1:
            yield f"rollout.top_k={self.top_k}: must be -1 (off) or at least 1"
        if self.engine is RolloutEngineName.sglang and not self.endpoints:
            yield "rollout.engine=sglang needs rollout.endpoints: the URLs of running servers"
        for url in self.endpoints:
            if not url.startswith(("http://", "https://")):
                yield f"rollout.endpoints: {url!r} must start with http:// or https://"
        yield from self.embedded.problems()


# -------------------------------------------------------------------------------------------- reward


class Overlong(StrEnum):
    keep = "keep"
    mask = "mask"
    soft_penalty = "soft_penalty"


class OnRewardError(StrEnum):
    error = "error"
    zero = "zero"


@dataclass(kw_only=True)
class RewardConfig:
    name: str = "math_verify"
    """`math_verify`, `exact_match`, or `module:function` taking a Rollout and returning a float."""
    num_workers: int = 2
    """Worker processes per data-parallel replica."""
    timeout_s: float = 10.0
    """Limit for one response."""
    on_error: OnRewardError = OnRewardError.error
    """A reward that raises or hangs: stop and name the response, or count it and score 0."""
    overlong: Overlong = Overlong.keep
    """Truncated responses: score as they are, leave out of the loss, or penalise (arXiv 2503.14476, 13)."""
    overlong_buffer_tokens: int = 0
    """soft_penalty: length of the interval before max_response_tokens over which the penalty grows to 1."""
    shuffle: bool = False
    """Negative control: permute the rewards among the samples of a step. Accuracy must not rise."""

    def problems(self) -> Problems:
        yield from _at_least(self, "reward", 1, "num_workers")
        yield from _positive(self, "reward", "timeout_s")
        if self.overlong is Overlong.soft_penalty and self.overlong_buffer_tokens < 1:
            yield (
                f"reward.overlong_buffer_tokens={self.overlong_buffer_tokens}: "
                "reward.overlong=soft_penalty needs at least 1"
            )


# ----------------------------------------------------------------------------------------- algorithm


class Advantage(StrEnum):
    uncentred = "uncentred"
    group_mean = "group_mean"
    group_mean_std = "group_mean_std"
    leave_one_out = "leave_one_out"


class Aggregation(StrEnum):
    token_mean = "token_mean"
    sequence_mean_token_mean = "sequence_mean_token_mean"
    sequence_mean_token_sum = "sequence_mean_token_sum"


@dataclass(kw_only=True)
class LossConfig:
    name: str = "drpo"
    """`drpo`, `surrogate` or `grpo`: see `losses/`."""
    delta: float = 0.1
    """drpo: bound on |pi - mu|. At 1 or above it can never bind."""
    clip_low: float = 0.2
    """grpo: ratio clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """grpo: ratio clipped above 1 + clip_high."""
    dual_clip: float | None = None
    """grpo: for negative advantages the loss is capped at dual_clip * |A|."""

    def problems(self) -> Problems:
        yield from _positive(self, "algorithm.loss", "delta", "clip_high")
        if not 0 < self.clip_low <= 1:
            yield f"algorithm.loss.clip_low={self.clip_low}: must be in (0, 1]"
        if self.dual_clip is not None and self.dual_clip <= 1:
            yield f"algorithm.loss.dual_clip={self.dual_clip}: must be greater than 1"


@dataclass(kw_only=True)
class AlgorithmConfig:
    loss: LossConfig = field(default_factory=LossConfig)
    advantage: Advantage = Advantage.group_mean
    aggregation: Aggregation = Aggregation.token_mean
    horizon_tokens: int | None = None
    """sequence_mean_token_sum: the fixed divisor; rollout.max_response_tokens when not given."""

    def problems(self) -> Problems:
        yield from self.loss.problems()
        yield from _at_least(self, "algorithm", 1, "horizon_tokens")


# -------------------------------------------------------------------------------------------- policy


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    none = "none"
    selective = "selective"
    full = "full"


@dataclass(kw_only=True)
class PolicyConfig:
    model_path: str = ""
    """HF folder: config.json, tokenizer, safetensors."""
    dtype: Dtype = Dtype.bf16
    """Parameters and activations. Main parameters, gradients and optimizer state are fp32 either way."""
    max_tokens_per_micro_batch: int = 8192
    """Token budget of one packed forward; a longer sequence gets a micro-batch of its own."""
    recompute: Recompute = Recompute.none
    """Recompute activations in the backward pass: nothing, the attention core, or every layer."""
    logprob_chunk_tokens: int = 1024
    """Rows of logits held in fp32 at a time by the logprob op."""
    megatron_overrides: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron's TransformerConfig; unknown names are an error."""

    def problems(self) -> Problems:
        if not self.model_path:
            yield "policy.model_path is missing: give an HF model folder"
        yield from _at_least(self, "policy", 1, "max_tokens_per_micro_batch", "logprob_chunk_tokens")


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the process mesh. Ranks = tensor * pipeline * data; expert layers re-split the same ranks."""

    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    """Model chunks per pipeline rank; 1: not interleaved."""
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    timeout_s: float = 600.0
    """Limit of one collective; on expiry the rank that waits stops with an error."""

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def problems(self) -> Problems:
        sizes = [f.name for f in fields(self) if f.name.endswith("_size")]
        yield from _at_least(self, "parallel", 1, *sizes)
        yield from _positive(self, "parallel", "timeout_s")
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            yield "parallel.sequence_parallel=True needs parallel.tensor_parallel_size > 1"
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            yield (
                f"parallel.virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} "
                "needs parallel.pipeline_parallel_size > 1"
            )
        expert_ranks = self.expert_parallel_size * self.expert_tensor_parallel_size
        ranks_per_stage = self.tensor_parallel_size * self.data_parallel_size
        if expert_ranks >= 1 and ranks_per_stage % expert_ranks:
            yield (
                f"parallel.expert_parallel_size * expert_tensor_parallel_size = {expert_ranks} must divide "
                f"tensor_parallel_size * data_parallel_size = {ranks_per_stage}"
            )


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, with Megatron's distributed optimizer."""

    lr: float = 1e-6
    min_lr: float = 0.0
    """Where linear and cosine schedules end."""
    schedule: Schedule = Schedule.constant
    num_warmup_updates: int = 0
    """Optimizer steps of linear warm-up from 0."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: off."""

    def problems(self) -> Problems:
        yield from _positive(self, "optimizer", "lr", "eps")
        yield from _at_least(
            self, "optimizer", 0, "min_lr", "num_warmup_updates", "weight_decay", "clip_grad"
        )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"optimizer.{name}={getattr(self, name)}: must be in [0, 1)"
        if self.min_lr > self.lr:
            yield f"optimizer.min_lr={self.min_lr}: must not exceed optimizer.lr={self.lr}"


# ----------------------------------------------------------------------------------------- run state


@dataclass(kw_only=True)
class CheckpointConfig:
    save_every_steps: int = 0
    """0: only at the end."""
    keep_last: int = 2
    """Older checkpoints are deleted."""
    resume: bool = True
    """Continue from run_dir's latest checkpoint if there is one."""
    load_path: str | None = None
    """Start from the checkpoint of another run (a `step_N` folder), under this run's layout."""
    export_hf: bool = True
    """Write the final weights as an HF folder, run_dir/hf."""

    def problems(self) -> Problems:
        yield from _at_least(self, "checkpoint", 0, "save_every_steps")
        yield from _at_least(self, "checkpoint", 1, "keep_last")


@dataclass(kw_only=True)
class EvalConfig:
    every_steps: int = 0
    """0: never. Otherwise also before the first step and after the last."""
    num_samples_per_prompt: int = 1
    """k of avg@k."""
    temperature: float = 1.0
    top_p: float = 1.0

    def problems(self) -> Problems:
        yield from _at_least(self, "eval", 0, "every_steps")
        yield from _at_least(self, "eval", 1, "num_samples_per_prompt")
        yield from _at_least(self, "eval", 0, "temperature")
        if not 0 < self.top_p <= 1:
            yield f"eval.top_p={self.top_p}: must be in (0, 1]"


@dataclass(kw_only=True)
class MetricsConfig:
    tensorboard: bool = True
    num_rollouts_dumped: int = 32
    """Rollouts per step written to run_dir/rollouts, for reading."""
    progress: bool = True
    """Live display on a terminal; plain lines otherwise."""

    def problems(self) -> Problems:
        yield from _at_least(self, "metrics", 0, "num_rollouts_dumped")


@dataclass(kw_only=True)
class Config:
    run_dir: str = "runs/default"
    """Everything a run writes goes here."""
    seed: int = 0
    platform: PlatformName = PlatformName.auto
    """`auto`: cuda if there is a GPU, else cpu."""
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise ConfigError(*problems)

    def problems(self) -> Problems:
        """Field rules of every section, then the rules between sections."""
        for f in fields(self):
            section = getattr(self, f.name)
            if hasattr(section, "problems"):
                yield from section.problems()
        yield from self._batch_problems()
        if self.eval.every_steps and not self.data.eval_path:
            yield f"eval.every_steps={self.eval.every_steps} needs data.eval_path"

    def _batch_problems(self) -> Problems:
        shares = self.parallel.data_parallel_size * self.train.num_updates_per_step
        prompts = self.rollout.num_prompts_per_step
        if shares >= 1 and prompts % shares:
            yield (
                f"rollout.num_prompts_per_step={prompts} must be a multiple of "
                f"parallel.data_parallel_size * train.num_updates_per_step = {shares}"
            )
