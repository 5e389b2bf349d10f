"""Every knob of a run, in the order data flows through it.

Defaults live here and nowhere else. This module imports nothing heavy, so that a configuration can be
checked in a second on any machine. How files and command lines become a `Config`: `config/io.py`.

Every number declares its limits (`config/limits.py`): what lies outside ends a run or bends it in silence,
what lies inside is generous. "No limit" is `null`, and an interval of 0 is "never". A section's `rules()` say
what limits cannot; `Config` gathers all problems. Rules that need the model (heads, layers, experts) live in
`policy/parallel.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from megatron_drpo.config.limits import Problems, Section, file_path, host_name, limits, number
from megatron_drpo.errors import ConfigError

MAX_STEPS = 10_000_000
MAX_TOKENS = 2**24
MAX_RANKS = 65_536
DAY_S = 86_400
MONTH_S = 30 * DAY_S


# --------------------------------------------------------------------------------------- what to do


class Mode(StrEnum):
    rl = "rl"
    sft = "sft"


class PlatformName(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True)
class TrainConfig(Section):
    mode: Mode = Mode.rl
    """`rl`: sample, score, update. `sft`: maximise the likelihood of each line's `response`."""
    num_steps: int = number(100, at_least=1, at_most=MAX_STEPS)
    """Steps of the whole run; a resumed run continues up to this number."""
    num_updates_per_step: int = number(1, at_least=1, at_most=10_000)
    """Optimizer steps (global batches) per step; each takes an equal share of the step's sequences."""


# ---------------------------------------------------------------------------------------------- data


class OnBadLine(StrEnum):
    error = "error"
    skip = "skip"


class OnLongPrompt(StrEnum):
    error = "error"
    drop = "drop"


OWN_TEMPLATE_ARGUMENTS = {"conversation", "messages", "tools", "add_generation_prompt", "tokenize", "padding"}
OWN_TEMPLATE_ARGUMENTS |= {"continue_final_message", "truncation", "max_length", "return_tensors"}
OWN_TEMPLATE_ARGUMENTS |= {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
"""Of apply_chat_template, and not to be found in `chat_template_kwargs`."""


@dataclass(kw_only=True)
class DataConfig(Section):
    train_path: str = file_path("")
    """JSONL; a line has `prompt` (text) or `messages` (chat), `answer`, `response` (sft), `tools` and
    `chat_template_kwargs` (with a chat template), free metadata."""
    eval_path: str | None = file_path(None)
    """Held-out JSONL of the same form."""
    on_bad_line: OnBadLine = OnBadLine.error
    """A line that is not valid: stop and name it, or skip and count it."""
    apply_chat_template: bool = False
    """Wrap a `prompt` as one user message. `messages` always go through the chat template."""
    system_prompt: str | None = None
    """Put before the messages of a line that do not begin with a system message."""
    tools: list[Any] = field(default_factory=list)
    """For the chat template: JSON schemas of functions, where a line has no `tools` of its own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """For the chat template, e.g. {enable_thinking: false}; a line's `chat_template_kwargs` come last."""
    max_prompt_tokens: int = number(1024, at_least=1, at_most=MAX_TOKENS)
    on_long_prompt: OnLongPrompt = OnLongPrompt.drop
    """A prompt over max_prompt_tokens: drop and count it, or stop and name it."""
    shuffle: bool = True
    """Reshuffle every epoch, seeded by `seed` and the epoch."""

    def rules(self) -> Problems:
        if not self.train_path:
            yield "data.train_path is missing: give a JSONL file of prompts"
        if not all(isinstance(tool, dict) for tool in self.tools):
            yield "data.tools: must be a list of JSON schemas, each a mapping"
        for name in sorted(OWN_TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys()):
            yield f"data.chat_template_kwargs.{name}: is no variable of a chat template, leave it out"


# ------------------------------------------------------------------------------------------- rollout


class RolloutEngineName(StrEnum):
    embedded = "embedded"
    sglang = "sglang"


@dataclass(kw_only=True)
class EmbeddedServerConfig(Section):
    """The server this project starts itself, backed by transformers (`embedded_server/`)."""

    host: str = host_name("127.0.0.1")
    num_slots: int = number(64, at_least=1, at_most=4096)
    """Sequences decoded together."""
    num_threads: int = number(2, at_least=1, at_most=1024)
    """CPU threads of the server process."""


@dataclass(kw_only=True)
class SGLangServerConfig(Section):
    """The SGLang servers that this project starts (`make sglang-env` builds their environment)."""

    python: str = file_path(".venv-sglang/bin/python")
    """Interpreter of the environment that has sglang."""
    host: str = host_name("127.0.0.1")
    tensor_parallel_size: int = number(1, at_least=1, at_most=1024)
    context_length: int | None = number(None, at_least=1, at_most=MAX_TOKENS)
    """Longest prompt with its response; not given: the model's own."""
    max_total_tokens: int | None = number(None, at_least=1, at_most=2**32)
    """Tokens in the key-value cache; not given: what SGLang finds room for (16384 without a GPU)."""
    arguments: list[str] = field(default_factory=list)
    """Further flags of sglang.launch_server, e.g. [--mem-fraction-static, "0.8"]."""


class Placement(StrEnum):
    local = "local"
    ray = "ray"


@dataclass(kw_only=True)
class FleetConfig(Section):
    """How many servers are started, and what happens to one that fails."""

    num_servers: int = number(1, at_least=1, at_most=10_000)
    placement: Placement = Placement.local
    """Where: on this machine, or on the nodes of a Ray cluster, each server as an actor with
    rollout.sglang.tensor_parallel_size GPUs that is started again on any node with room."""
    ray_address: str = "auto"
    """Of the cluster, e.g. 10.0.0.1:6379; auto: the one that this machine belongs to."""
    first_gpu: int | None = number(None, at_least=0, at_most=1023)
    """Index on this machine of the first server's first GPU; the others follow. Not given: after those of the
    trainer's ranks; 0 with rollout.colocated, and by `fleet up`."""
    health_interval_s: float = number(10.0, at_least=0.01, at_most=DAY_S)
    """Between two generations that prove a server alive."""
    health_timeout_s: float = number(60.0, at_least=0.1, at_most=DAY_S)
    """A server that generates nothing for so long hangs: it is killed and started again. The time in which it
    is given weights does not count."""
    max_failures: int = number(3, at_least=1, at_most=1000)
    """Failures in a row after which a server leaves the fleet; a server that has worked for
    failure_memory_s starts anew at 0."""
    failure_memory_s: float = number(600.0, at_least=0.1, at_most=MONTH_S)
    restart_backoff_s: float = number(1.0, at_least=0, at_most=3600)
    """Pause before the first restart; it doubles with every failure in a row."""


@dataclass(kw_only=True)
class RolloutConfig(Section):
    engine: RolloutEngineName = RolloutEngineName.embedded
    """What is started if neither `endpoints` nor `fleet_file` is given: this project's server, or SGLang."""
    endpoints: list[str] = field(default_factory=list)
    """Base URLs of servers that others run, e.g. http://127.0.0.1:30000. Empty: start a fleet."""
    fleet_file: str | None = file_path(None)
    """The fleet.json of a running fleet, see `megatron-drpo fleet up`; instead of `endpoints`."""
    api_key_env: str | None = None
    """Environment variable that holds the key which the servers ask for; servers we start get it as well."""
    colocated: bool = False
    """Servers and trainer take turns on the same GPUs: each lets go of its memory while the other works."""
    max_staleness: int = number(0, at_least=0, at_most=1000)
    """Steps by which sampling may be ahead of training. 0: synchronous. 1: the next step's batch is sampled
    while this one trains. n: up to n more batches are in flight, and no token is trained on that is more than
    n steps old."""
    function: str | None = None
    """`module:function`: an asynchronous function of a `Conversation` that makes each rollout of several
    turns, see `rollout/conversation.py`; not given: one turn."""
    oversampling: float = number(0.0, at_least=0, at_most=100)
    """Share of further prompts in flight beyond what a step needs: it trains on the first groups to finish.
    The slowest are interrupted and go on from the tokens they have, in the next step: tokens may be one step
    older than max_staleness says."""
    num_prompts_per_step: int = number(64, at_least=1, at_most=10**6)
    num_samples_per_prompt: int = number(8, at_least=1, at_most=10**5)
    max_response_tokens: int = number(1024, at_least=1, at_most=MAX_TOKENS)
    temperature: float = number(1.0, at_least=0.01, at_most=10)
    """Sampling temperature; the trainer's logprobs use it as well."""
    top_p: float = number(1.0, at_least=0.01, at_most=1)
    top_k: int | None = number(None, at_least=1, at_most=MAX_TOKENS)
    """Only this many of the most probable tokens are drawn from; null: all."""
    stop_token_ids: list[int] = field(default_factory=list, metadata=limits(at_least=0, at_most=MAX_TOKENS))
    """Besides the model's own end-of-sequence ids."""
    deterministic: bool = False
    """Fix batch composition, order and per-sample seeds: bit-reproducible on the CPU platform in fp32."""
    max_concurrent_requests: int = number(64, at_least=1, at_most=10**5)
    """Requests in flight per data-parallel replica; each asks for all samples of one prompt."""
    request_timeout_s: float = number(600.0, at_least=0.1, at_most=MONTH_S)
    num_retries: int = number(3, at_least=0, at_most=1000)
    """Further attempts of a request that a server fails (500), leaves without an answer for request_timeout_s
    or aborts without a token, on another server first, before the run stops."""
    startup_timeout_s: float | None = number(None, at_least=0.1, at_most=DAY_S)
    """How long a server may take until it generates; not given: 2 minutes, 10 for SGLang that the run starts,
    and the time to read the model at 100 MB/s (61 GB: 10 minutes more)."""
    no_server_timeout_s: float = number(600.0, at_least=0.1, at_most=MONTH_S)
    """How long to wait while no server of the fleet has current weights or is available (no connection; 408,
    425, 429, 502, 503, 504; no JSON), before the run stops."""
    embedded: EmbeddedServerConfig = field(default_factory=EmbeddedServerConfig)
    sglang: SGLangServerConfig = field(default_factory=SGLangServerConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    @property
    def api_key(self) -> str | None:
        """What `api_key_env` holds."""
        return None if self.api_key_env is None else os.environ.get(self.api_key_env)

    def rules(self) -> Problems:
        if self.api_key_env is not None and not self.api_key:
            yield f"rollout.api_key_env={self.api_key_env}: that environment variable is not set"
        if self.endpoints and self.fleet_file is not None:
            yield "rollout.endpoints and rollout.fleet_file exclude each other: give one of them"
        if self.colocated and self.max_staleness:
            yield (
                f"rollout.max_staleness={self.max_staleness}: rollout.colocated=True needs 0, for servers "
                "cannot sample while the trainer has their GPUs"
            )
        yield from self._deterministic_problems()
        for url in self.endpoints:
            if not url.startswith(("http://", "https://")):
                yield f"rollout.endpoints: {url!r} must start with http:// or https://"
            elif not _names_a_server(url):
                yield f"rollout.endpoints: {url!r} is not a URL such as http://127.0.0.1:30000"

    def _deterministic_problems(self) -> Problems:
        if not self.deterministic:
            return
        if self.function is not None:
            yield f"rollout.function={self.function}: rollout.deterministic=True samples single turns alone"
        for name in ("max_staleness", "oversampling"):
            if getattr(self, name):
                yield (
                    f"rollout.{name}={getattr(self, name)}: rollout.deterministic=True needs 0, for what is "
                    "sampled would depend on time"
                )


def _names_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:  # of the port, or an IPv6 address
        return False


# -------------------------------------------------------------------------------------------- reward


class Overlong(StrEnum):
    keep = "keep"
    mask = "mask"
    soft_penalty = "soft_penalty"


class OnRewardError(StrEnum):
    error = "error"
    zero = "zero"


@dataclass(kw_only=True)
class RewardConfig(Section):
    name: str = "math_verify"
    """`math_verify`, `exact_match`, or `module:function`, from a Rollout to a float. What it prints goes to
    run_dir/logs."""
    num_workers: int = number(2, at_least=1, at_most=1024)
    """Worker processes per data-parallel replica."""
    timeout_s: float = number(10.0, at_least=0.01, at_most=DAY_S)
    """Limit for one response."""
    on_error: OnRewardError = OnRewardError.error
    """A reward that raises or hangs: stop and name the response, or count it and score 0."""
    keep_special_tokens: bool = False
    """Leave special tokens (`<|im_end|>`, `<think>` where it is one) in the text of a response, which the
    reward gets and run_dir/rollouts shows."""
    overlong: Overlong = Overlong.keep
    """Truncated responses: score as they are, leave out of the loss, or penalise (arXiv 2503.14476, 13)."""
    overlong_buffer_tokens: int = number(0, at_least=0, at_most=MAX_TOKENS)
    """soft_penalty: length of the interval before max_response_tokens over which the penalty grows to 1."""
    shuffle: bool = False
    """Negative control: permute the rewards among the samples of a step. Accuracy must not rise."""

    def rules(self) -> Problems:
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
    reinforce_plus_plus = "reinforce_plus_plus"


class Aggregation(StrEnum):
    token_mean = "token_mean"
    sequence_mean_token_mean = "sequence_mean_token_mean"
    sequence_mean_token_sum = "sequence_mean_token_sum"


class Anchor(StrEnum):
    rollout = "rollout"
    recomputed = "recomputed"


class TokenCorrection(StrEnum):
    none = "none"
    tis = "tis"
    mis = "mis"
    icepop = "icepop"


class KlEstimator(StrEnum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


@dataclass(kw_only=True)
class LossConfig(Section):
    name: str = "drpo"
    """One of `losses/registry.py`, or `module:function` taking a LossConfig and returning a `Loss`."""
    delta: float = number(0.1, at_least=1e-6, at_most=1000)
    """drpo, mask_drpo: bound on |pi - mu| of the regulariser. At 1 or above it can never bind."""
    epsilon: float = number(0.2, at_least=1e-6, at_most=1000)
    """spo: bound on |r - 1|."""
    mask_high: float = number(0.15, at_least=1e-6, at_most=100)
    """dppo, mask_drpo: for A > 0, the divergence (TV or KL) above which a diverging token is masked."""
    mask_low: float | None = number(None, at_least=1e-6, at_most=100)
    """The same for A < 0; mask_high when not given."""
    ratio_cap: float | None = number(None, at_least=0.01, at_most=10**6)
    """dppo: the detached ratio is capped here; not given: no cap."""
    num_topk: int = number(20, at_least=1, at_most=10_000)
    """dppo_topk: ids per token that the rollout reports; the rest of the vocabulary is one further bin."""
    clip_low: float = number(0.2, at_least=1e-6, at_most=1)
    """grpo, gspo, cispo: ratio clipped below 1 - clip_low."""
    clip_high: float = number(0.2, at_least=1e-6, at_most=1000)
    """grpo, gspo, cispo: ratio clipped above 1 + clip_high."""
    dual_clip: float | None = number(None, at_least=1.01, at_most=1000)
    """grpo: for negative advantages the loss is capped at dual_clip * |A|."""


@dataclass(kw_only=True)
class CorrectionConfig(Section):
    """Train/rollout mismatch: each factor multiplies the loss of a token, without a gradient.

    rho = old / mu with `anchor=recomputed`. With `anchor=rollout`, rho = pi / mu, which r contains already:
    there the masks give 1 instead of rho, and tis has no meaning. All are independent of each other; a masked
    token contributes 0 but keeps its place in the aggregation.
    """

    token: TokenCorrection = TokenCorrection.none
    """tis: min(rho, token_high), truncated (needs `anchor=recomputed`). mis: rho up to token_high, else 0.
    icepop: rho inside [token_low, token_high], else 0 (arXiv 2510.18855)."""
    token_low: float = number(0.5, at_least=0, at_most=1000)
    """icepop alone reads it."""
    token_high: float = number(2.0, at_least=0.001, at_most=1000)
    sequence_low: float | None = number(None, at_least=0.001, at_most=1000)
    """Sequences whose geometric mean of rho lies outside [sequence_low, sequence_high] are masked."""
    sequence_high: float | None = number(None, at_least=0.001, at_most=1000)
    opsm_delta: float | None = number(None, at_least=1e-6, at_most=100)
    """Off-policy sequence mask (arXiv 2512.02556): in sequences with mean(logmu - logpi) > opsm_delta, mu
    being the anchor, tokens with A < 0 are masked."""
    faulty_log_ratio: float = number(20.0, at_least=1, at_most=30)
    """A token with log(pi / mu) above it, mu as the engine reported it, was never sampled so: the engine is
    at fault. It is kept out of the loss and the aggregation, counted (mismatch/faulty_tokens), alarmed. Log
    ratios are held at 30."""

    def rules(self) -> Problems:
        key = "algorithm.correction"
        for level in ("token", "sequence"):
            low, high = getattr(self, f"{level}_low"), getattr(self, f"{level}_high")
            if low is not None and high is not None and low > high:
                yield f"{key}.{level}_low={low}: must not exceed {level}_high={high}"


@dataclass(kw_only=True)
class KlConfig(Section):
    """A penalty on the divergence from a frozen reference policy, added to every loss token."""

    coef: float = number(0.0, at_least=0, at_most=1000)
    """0: no reference policy is held."""
    estimator: KlEstimator = KlEstimator.k3
    reference_path: str | None = file_path(None)
    """HF folder of the reference policy; not given: what the policy starts from."""


@dataclass(kw_only=True)
class DynamicSamplingConfig(Section):
    """DAPO's filter (arXiv 2503.14476, section 3.2): groups whose rewards are all equal are dropped and
    refilled."""

    enabled: bool = False
    max_rounds: int = number(10, at_least=1, at_most=10_000)
    """Batches of prompts drawn in one step before the run goes on with the groups it has."""


@dataclass(kw_only=True)
class AlgorithmConfig(Section):
    loss: LossConfig = field(default_factory=LossConfig)
    anchor: Anchor = Anchor.rollout
    """The denominator of r: the engine's logprobs (the paper's choice), or the trainer's own, recomputed
    before the step's first update."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    entropy_coef: float = number(0.0, at_least=0, at_most=100)
    """Weight of the entropy bonus: the loss falls by entropy_coef * H."""
    advantage: Advantage = Advantage.group_mean
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    aggregation: Aggregation = Aggregation.token_mean
    horizon_tokens: int | None = number(None, at_least=1, at_most=MAX_TOKENS)
    """sequence_mean_token_sum: the fixed divisor; rollout.max_response_tokens when not given."""

    def rules(self) -> Problems:
        if self.anchor is Anchor.rollout and self.correction.token is TokenCorrection.tis:
            yield (
                "algorithm.correction.token=tis needs algorithm.anchor=recomputed: with anchor=rollout the "
                "ratio of the loss contains the correction already"
            )


# -------------------------------------------------------------------------------------------- policy


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Layers(StrEnum):
    transformer_engine = "transformer_engine"
    local = "local"


class Recompute(StrEnum):
    none = "none"
    selective = "selective"
    full = "full"


class RoutingReplay(StrEnum):
    none = "none"
    rollout = "rollout"
    recomputed = "recomputed"


class OnBadRoutes(StrEnum):
    error = "error"
    fallback = "fallback"


class LogprobMode(StrEnum):
    auto = "auto"
    one_pass = "one_pass"
    recompute = "recompute"


class LogprobBackend(StrEnum):
    auto = "auto"
    torch = "torch"
    triton = "triton"


@dataclass(kw_only=True)
class PolicyConfig(Section):
    model_path: str = file_path("")
    """HF folder: config.json, tokenizer, safetensors. Servers start from it."""
    weights_path: str | None = file_path(None)
    """torch_dist checkpoint, converted or of a run, whose weights the policy starts from; not given: those of
    model_path. Any parallel layout."""
    dtype: Dtype = Dtype.bf16
    """Parameters and activations. Main parameters, gradients and optimizer state are fp32 either way."""
    max_tokens_per_micro_batch: int = number(8192, at_least=1, at_most=MAX_TOKENS)
    """Token budget of one packed forward, of all context-parallel ranks together; a longer sequence gets a
    micro-batch of its own."""
    layers: Layers = Layers.transformer_engine
    """Whose layers Megatron builds. transformer_engine: fused, with grouped experts; on a CPU a stand-in of
    plain torch takes its place. local: Megatron's own, on GPUs far slower. Checkpoints are the same."""
    recompute: Recompute = Recompute.none
    """Recompute activations in the backward pass: nothing; what is large and quick to compute (a mixture of
    experts' activation and norms, else the attention core); or every layer."""
    logprob_mode: LogprobMode = LogprobMode.auto
    """one_pass: gradients of the LM head are formed in the forward pass, three GEMMs; not for losses or
    corrections of whole sequences. recompute: logits are computed again in the backward pass, four GEMMs.
    auto: one_pass where the loss allows it."""
    logprob_backend: LogprobBackend = LogprobBackend.auto
    """What reads and writes the logits: torch, or fused Triton kernels (CUDA). auto: triton on CUDA."""
    logprob_buffer_bytes: int = number(256 * 2**20, at_least=2**10, at_most=2**36)
    """Memory for logits; tokens go through the LM head in chunks that fit. One chunk, one collective
    where the mode is one_pass."""
    routing_replay: RoutingReplay = RoutingReplay.none
    """Which experts a token goes to in an update. none: what the router's current weights say. rollout: what
    the server chose when it sampled (R3, arXiv 2510.11370). recomputed: what the trainer's own pass before
    the step's first update chose (R2)."""
    on_bad_routes: OnBadRoutes = OnBadRoutes.error
    """Routes that are missing or cannot be right: stop and name the sequence, or let the router choose for
    that sequence and count it."""
    megatron_overrides: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron's TransformerConfig; unknown names are an error."""

    def rules(self) -> Problems:
        if not self.model_path:
            yield "policy.model_path is missing: give an HF model folder"


@dataclass(kw_only=True)
class ParallelConfig(Section):
    """Sizes of the process mesh. Ranks = tensor * context * pipeline * data; expert layers re-split the
    ranks of one pipeline stage."""

    tensor_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    sequence_parallel: bool = False
    context_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    """Ranks that share the tokens of each sequence."""
    pipeline_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    virtual_pipeline_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    """Model chunks per pipeline rank; 1: not interleaved."""
    expert_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    expert_tensor_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    data_parallel_size: int = number(1, at_least=1, at_most=MAX_RANKS)
    timeout_s: float = number(600.0, at_least=1, at_most=MONTH_S)
    """Limit of one collective; on expiry the rank that waits stops with an error."""

    @property
    def world_size(self) -> int:
        return (
            self.tensor_parallel_size
            * self.context_parallel_size
            * self.pipeline_parallel_size
            * self.data_parallel_size
        )

    def rules(self) -> Problems:
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            yield "parallel.sequence_parallel=True needs parallel.tensor_parallel_size > 1"
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            yield (
                f"parallel.virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} "
                "needs parallel.pipeline_parallel_size > 1"
            )
        expert_ranks = self.expert_parallel_size * self.expert_tensor_parallel_size
        ranks_per_stage = self.world_size // self.pipeline_parallel_size
        if ranks_per_stage % expert_ranks:
            yield (
                f"parallel.expert_parallel_size * expert_tensor_parallel_size = {expert_ranks} must divide "
                f"tensor_parallel_size * context_parallel_size * data_parallel_size = {ranks_per_stage}"
            )


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class OptimizerConfig(Section):
    """AdamW, with Megatron's distributed optimizer."""

    lr: float = number(1e-6, at_least=1e-12, at_most=1)
    min_lr: float = number(0.0, at_least=0, at_most=1)
    """Where linear and cosine schedules end."""
    schedule: Schedule = Schedule.constant
    num_warmup_updates: int = number(0, at_least=0, at_most=10**9)
    """Optimizer steps of linear warm-up from 0."""
    beta1: float = number(0.9, at_least=0, at_most=0.999999)
    beta2: float = number(0.999, at_least=0, at_most=0.999999)
    eps: float = number(1e-8, at_least=1e-20, at_most=1)
    weight_decay: float = number(0.01, at_least=0, at_most=10)
    clip_grad: float | None = number(1.0, at_least=1e-6, at_most=10**6)
    """Global gradient norm above which gradients are scaled down; null: no limit."""

    def rules(self) -> Problems:
        if self.min_lr > self.lr:
            yield f"optimizer.min_lr={self.min_lr}: must not exceed optimizer.lr={self.lr}"


# --------------------------------------------------------------------------------------- weight sync


class WeightSyncPath(StrEnum):
    auto = "auto"
    tensor = "tensor"
    distributed = "distributed"
    disk = "disk"


@dataclass(kw_only=True)
class WeightSyncConfig(Section):
    """How new weights reach the rollout servers after an update."""

    path: WeightSyncPath = WeightSyncPath.auto
    """tensor: in requests; from a GPU, as handles of its memory, for servers on the same machine that see it.
    distributed: broadcast over NCCL or gloo. disk: an HF folder in run_dir, on a file system that the servers
    share. auto: tensor where servers can take it, else distributed; disk where neither can be."""
    bucket_bytes: int = number(256 * 2**20, at_least=2**10, at_most=2**34)
    """Tensors travel in buckets of about this size; a larger tensor goes alone."""
    timeout_s: float = number(120.0, at_least=0.1, at_most=DAY_S)
    """Limit of each request and of each broadcast; a server that exceeds it is fenced."""
    disk_timeout_s: float | None = number(None, at_least=0.1, at_most=DAY_S)
    """disk: limit of a server's loading; not given: 2 minutes, and the time to read the model at 100 MB/s."""
    verify_every: int = number(1, at_least=0, at_most=MAX_STEPS)
    """Compare checksums after every n-th sync; 0: never."""
    host: str = host_name("127.0.0.1")
    """distributed: address of the first trainer rank's machine, as servers reach it."""
    servers_per_group: int = number(1, at_least=1, at_most=10_000)
    """distributed: servers that share one broadcast. 1: a dead server never holds up another. More: fewer
    bytes leave the trainer, and a server that fails takes its group along."""


# ----------------------------------------------------------------------------------------- run state


@dataclass(kw_only=True)
class CheckpointConfig(Section):
    save_every_steps: int = number(0, at_least=0, at_most=MAX_STEPS)
    """0: only at the end."""
    keep_last: int = number(2, at_least=1, at_most=10**6)
    """Older checkpoints are deleted."""
    resume: bool = True
    """Continue from run_dir's latest checkpoint if there is one."""
    load_path: str | None = file_path(None)
    """Start from the checkpoint of another run (a `step_N` folder), under this run's layout."""
    verify_on_load: bool = True
    """Compare the hashes of a checkpoint's files before resuming from it; each rank reads its part."""
    export_hf: bool = True
    """Write the final weights as an HF folder, run_dir/hf."""


@dataclass(kw_only=True)
class EvalConfig(Section):
    every_steps: int = number(0, at_least=0, at_most=MAX_STEPS)
    """0: never. Otherwise also before the first step and after the last."""
    num_samples_per_prompt: int = number(1, at_least=1, at_most=10**5)
    """k of avg@k."""
    temperature: float = number(1.0, at_least=0, at_most=10)
    top_p: float = number(1.0, at_least=0.01, at_most=1)

    def rules(self) -> Problems:
        if 0 < self.temperature < 0.01:
            yield f"eval.temperature={self.temperature}: must be 0 (the most probable token) or at least 0.01"


@dataclass(kw_only=True)
class DeadlinesConfig(Section):
    """How long a rank may stay in one phase; null: no limit. A phase that takes longer ends the run,
    with a message that says which rank waits for which, and with every rank's stacks (`runtime/watchdog.py`).

    A rank that waits in a single collective for parallel.timeout_s stops earlier, and names nobody.
    """

    start_s: float | None = number(3600.0, at_least=1, at_most=MONTH_S)
    """From the process group to the first phase: building and loading the model, reading prompts."""
    rollout_s: float | None = number(7200.0, at_least=1, at_most=MONTH_S)
    update_s: float | None = number(3600.0, at_least=1, at_most=MONTH_S)
    weight_sync_s: float | None = number(1800.0, at_least=1, at_most=MONTH_S)
    checkpoint_s: float | None = number(3600.0, at_least=1, at_most=MONTH_S)
    """Saving or loading a checkpoint, or the final export."""
    evaluation_s: float | None = number(7200.0, at_least=1, at_most=MONTH_S)


@dataclass(kw_only=True)
class MetricsConfig(Section):
    tensorboard: bool = True
    num_rollouts_dumped: int = number(32, at_least=0, at_most=10**6)
    """Rollouts per step written to run_dir/rollouts, for reading."""
    progress: bool = True
    """Live display on a terminal; plain lines otherwise."""
    prometheus_port: int | None = number(None, at_least=1, at_most=65_535)
    """Port at which rank 0 answers GET /metrics for Prometheus; not given: none."""
    prometheus_host: str = host_name("127.0.0.1")
    """Where it listens; 0.0.0.0 for a Prometheus on another machine."""


@dataclass(kw_only=True)
class Config(Section):
    run_dir: str = file_path("runs/default")
    """Everything a run writes goes here."""
    seed: int = number(0, at_least=0, at_most=2**32 - 1)
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
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    deadlines: DeadlinesConfig = field(default_factory=DeadlinesConfig)

    def __post_init__(self) -> None:
        self.expand_paths()
        problems = list(self.problems())
        if problems:
            raise ConfigError(*problems)

    def rules(self) -> Problems:
        yield from self._batch_problems()
        if self.eval.every_steps and not self.data.eval_path:
            yield f"eval.every_steps={self.eval.every_steps} needs data.eval_path"

    def _batch_problems(self) -> Problems:
        shares = self.parallel.data_parallel_size * self.train.num_updates_per_step
        prompts = self.rollout.num_prompts_per_step
        if prompts % shares:
            yield (
                f"rollout.num_prompts_per_step={prompts} must be a multiple of "
                f"parallel.data_parallel_size * train.num_updates_per_step = {shares}"
            )
