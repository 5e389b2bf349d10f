"""Everything that can be known to be wrong before a process group or a server starts."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import torch

from megatron_drpo.checkpoint.checkpointer import check_checkpoint
from megatron_drpo.config.limits import shown
from megatron_drpo.config.schema import (
    Advantage,
    Anchor,
    Config,
    LogprobMode,
    Mode,
    Overlong,
    Placement,
    PlatformName,
    RolloutEngineName,
    RoutingReplay,
)
from megatron_drpo.data.prompts import check_prompt_file
from megatron_drpo.data.tokenizer import load_tokenizer
from megatron_drpo.errors import CheckpointError, ConfigError, ModelError
from megatron_drpo.fleet.build import choose_first_gpu, starts_fleet
from megatron_drpo.launch.check_model import check_megatron, check_tokens, count_positions
from megatron_drpo.losses.objective import build_objective
from megatron_drpo.losses.registry import build_loss, check_loss
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.registry import get_family
from megatron_drpo.policy.overrides import check_megatron_overrides
from megatron_drpo.policy.parallel import check_layout
from megatron_drpo.rewards.functions import check_reward, needs_answer
from megatron_drpo.rewards.pool import find_answer_problems
from megatron_drpo.rollout.conversation import load_rollout_function
from megatron_drpo.weight_sync.nccl import check_nccl
from megatron_drpo.weight_sync.placement import check_path, warn_path
from megatron_drpo.weight_sync.quantised import check_quantisation
from megatron_drpo.weights.hf_folder import TOKENIZER_FILES, HfFolder
from megatron_drpo.weights.load_megatron import check_megatron_weights
from megatron_drpo.weights.mapping import ParameterMapping
from megatron_drpo.weights.tied_head import check_tied_head
from megatron_drpo.weights.torch_dist import find_checkpoint


def check_config(config: Config, *, reads_prompts: bool = True, sends_weights: bool = True) -> list[str]:
    """Problems with files, model, layout, servers, loss and reward, as sentences; empty if the run can start.

    Args:
        reads_prompts: False leaves out what is in prompt files, where another process has looked at them.
        sends_weights: False leaves out how weights reach the servers, which another machine may see otherwise
            than the one that sends them.
    """
    problems = check_megatron_overrides(config.policy.megatron_overrides)
    try:
        architecture, mapping = _read_model(config.policy.model_path)
        problems += check_layout(config.parallel, architecture)
    except ModelError as error:
        architecture = mapping = None
        problems.append(f"policy.model_path: {error}")
    if config.policy.weights_path is not None:
        problems += _check_weights(config.policy.weights_path, mapping)
    if reads_prompts:
        problems += _check_data(config, architecture)
    if architecture is not None and not problems:
        problems += check_megatron(config, architecture)
    if config.train.mode is Mode.rl:
        problems += [] if architecture is None else check_tokens(config.rollout, architecture)
        problems += _check_objective(config, architecture)
        problems += _check_groups(config)
        problems += _check_rollout(config)
        problems += check_path(config) if sends_weights else []
        problems += check_quantisation(config)
        problems += check_nccl(config)
        problems += check_reward(config.reward)
    problems += _check_replay(config, architecture)
    if config.checkpoint.load_path is not None and not Path(config.checkpoint.load_path).is_dir():
        problems.append(f"checkpoint.load_path={config.checkpoint.load_path}: no such folder")
    elif architecture is not None:
        problems += check_checkpoint(config.run_dir, config.checkpoint, architecture)
    return problems


def refuse_problems(config: Config, problems: list[str]) -> None:
    """Nothing if there are none.

    Raises:
        ConfigError: all problems, and the warnings, which the same hand may mend.
    """
    if problems:
        raise ConfigError(*problems, warnings=warn_config(config))


def warn_config(config: Config) -> list[str]:
    """Settings that are allowed but hardly meant, as sentences. Other settings may be broken."""
    warnings = []
    if config.train.mode is Mode.rl:
        if not any(config.algorithm.problems()) and not check_loss(config.algorithm.loss):
            warnings += build_objective(config.algorithm).warnings()
        rollout = config.rollout
        truncations = [f"rollout.top_p={shown(rollout.top_p)}"] if rollout.top_p < 1 else []
        truncations += [f"rollout.top_k={shown(rollout.top_k)}"] if rollout.top_k is not None else []
        if truncations:
            warnings.append(
                f"{', '.join(truncations)}: tokens are drawn from a truncated distribution, but "
                "rollout_logprobs are those of the full one"
            )
        if config.algorithm.dynamic_sampling.enabled and config.algorithm.advantage is Advantage.uncentred:
            warnings.append(
                "algorithm.dynamic_sampling.enabled=True with algorithm.advantage=uncentred: groups of equal "
                "rewards are dropped, though uncentred advantages would learn from them"
            )
        warnings += warn_path(config)
    return warnings


def _check_objective(config: Config, architecture: ArchitectureConfig | None) -> list[str]:
    """Of the loss, how it is computed, and the reference policy."""
    problems = check_loss(config.algorithm.loss)
    if problems:
        return problems
    objective = build_objective(config.algorithm)
    if objective.needs_sequences and config.policy.logprob_mode is LogprobMode.one_pass:
        problems.append(
            "policy.logprob_mode=one_pass: the loss or a correction needs whole sequences, so gradients "
            "are not known chunk by chunk; use auto or recompute"
        )
    num_topk = objective.loss.num_topk
    if architecture is not None and num_topk > architecture.vocab_size:
        problems.append(
            f"algorithm.loss.num_topk={num_topk}: must not exceed the model's vocab_size, "
            f"{architecture.vocab_size}"
        )
    path = config.algorithm.kl.reference_path
    if objective.kl is None or path is None or architecture is None:
        return problems
    try:
        if _read_model(path)[0] != architecture:
            problems.append(
                f"algorithm.kl.reference_path={path}: another architecture than policy.model_path has"
            )
    except ModelError as error:
        problems.append(f"algorithm.kl.reference_path: {error}")
    return problems


def _check_replay(config: Config, architecture: ArchitectureConfig | None) -> list[str]:
    """Of policy.routing_replay."""
    replay = config.policy.routing_replay
    key = f"policy.routing_replay={replay}"
    problems: list[str] = []
    if replay is RoutingReplay.none:
        return []
    if config.train.mode is Mode.sft:
        problems.append(f"{key}: train.mode=sft has no pass whose routes could be replayed")
    if architecture is not None and architecture.moe is None:
        problems.append(f"{key}: the model of policy.model_path has no experts")
    if replay is RoutingReplay.recomputed and config.algorithm.anchor is not Anchor.recomputed:
        problems.append(f"{key} needs algorithm.anchor=recomputed: it replays that pass")
    if config.policy.megatron_overrides.get("moe_router_fusion"):
        problems.append(f"{key}: policy.megatron_overrides.moe_router_fusion must be off, it asks nobody")
    return problems


def _check_rollout(config: Config) -> list[str]:
    """Of the servers that the run starts, and of the user's function."""
    rollout = config.rollout
    problems: list[str] = []
    if rollout.function is not None:
        try:
            load_rollout_function(rollout.function)
        except ConfigError as error:
            problems.append(str(error))
        if not check_loss(config.algorithm.loss) and build_loss(config.algorithm.loss).num_topk:
            problems.append(
                f"rollout.function={rollout.function}: algorithm.loss.name={config.algorithm.loss.name} "
                "needs the most probable ids of every token, which inserted tokens do not have"
            )
    if starts_fleet(config) and rollout.fleet.placement is Placement.ray:
        problems += _check_ray(config)
    if rollout.engine is RolloutEngineName.sglang and starts_fleet(config):
        if not Path(rollout.sglang.python).is_file():
            problems.append(
                f"rollout.sglang.python={rollout.sglang.python}: no such file; `make sglang-env` builds "
                "SGLang's environment"
            )
        has_gpu = torch.cuda.is_available()
        on_cpu = config.platform is PlatformName.cpu or (config.platform is PlatformName.auto and not has_gpu)
        if not on_cpu and rollout.fleet.placement is Placement.local:
            problems += _check_gpus(config, torch.cuda.device_count())
        if rollout.deterministic and on_cpu:
            problems.append(
                "rollout.deterministic=True: SGLang's deterministic inference needs a GPU; take "
                "rollout.engine=embedded, or rollout.deterministic=false"
            )
    return problems


def _check_gpus(config: Config, num_gpus: int) -> list[str]:
    """Whether this machine has GPUs for the servers that a run here starts."""
    fleet, size = config.rollout.fleet, config.rollout.sglang.tensor_parallel_size
    first = choose_first_gpu(config, config.parallel.world_size)
    needed = first + fleet.num_servers * size
    if needed <= num_gpus:
        return []
    return [
        f"rollout.fleet.num_servers={fleet.num_servers}: with {size} GPUs each from GPU {first} on they need "
        f"{needed}, this machine has {num_gpus}. Start fewer, or share the trainer's with "
        "rollout.colocated=true, or take servers elsewhere (rollout.endpoints, rollout.fleet_file)"
    ]


def _check_ray(config: Config) -> list[str]:
    problems = []
    if importlib.util.find_spec("ray") is None:
        problems.append("rollout.fleet.placement=ray: Ray is not installed; pip install 'megatron-drpo[ray]'")
    if config.rollout.colocated:
        problems.append(
            "rollout.fleet.placement=ray: rollout.colocated=True needs servers on the trainer's own GPUs, "
            "which Ray does not know of; take placement=local, or rollout.endpoints"
        )
    return problems


def _check_groups(config: Config) -> list[str]:
    """Of rewards and advantages within a group."""
    problems = []
    num_samples, advantage = config.rollout.num_samples_per_prompt, config.algorithm.advantage
    if num_samples == 1 and config.algorithm.dynamic_sampling.enabled:
        problems.append(
            "algorithm.dynamic_sampling.enabled=True needs rollout.num_samples_per_prompt of at least 2: the "
            "rewards of one sample are always equal, so every group would be dropped"
        )
    if num_samples == 1 and advantage is not Advantage.uncentred:
        problems.append(
            f"rollout.num_samples_per_prompt=1 with algorithm.advantage={advantage}: a sample that is its "
            "own baseline has advantage 0, so nothing would be learned; take at least 2, or uncentred"
        )
    reward, limit = config.reward, config.rollout.max_response_tokens
    if reward.overlong is Overlong.soft_penalty and reward.overlong_buffer_tokens > limit:
        problems.append(
            f"reward.overlong_buffer_tokens={reward.overlong_buffer_tokens}: must not exceed "
            f"rollout.max_response_tokens={limit}, or the shortest response is penalised"
        )
    return problems


def _check_weights(path: str, mapping: ParameterMapping | None) -> list[str]:
    """Of the checkpoint that the policy starts from; without a model, only whether there is one."""
    try:
        if mapping is None:
            find_checkpoint(path)
        else:
            check_megatron_weights(path, mapping)
    except CheckpointError as error:
        return [f"policy.weights_path: {error}"]
    return []


def _read_model(model_path: str) -> tuple[ArchitectureConfig, ParameterMapping]:
    """Of an HF folder that has all it takes to train.

    Raises:
        ModelError: it has not.
    """
    folder = HfFolder(model_path)
    if not any((folder.path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{model_path}: no tokenizer (one of {', '.join(TOKENIZER_FILES)})")
    family = get_family(folder.config)
    architecture = family.architecture(folder.config)
    shapes = {name: folder.shape(name) for name in folder.keys()}  # noqa: SIM118  not a dict
    mapping = family.mapping(architecture)
    mapping.check_hf(shapes, str(folder.path))
    check_tied_head(folder)
    return architecture, mapping


def _check_data(config: Config, architecture: ArchitectureConfig | None) -> list[str]:
    """Of every line of the prompt files; without a model, only what no tokenizer is needed for."""
    is_rl = config.train.mode is Mode.rl
    problems: list[str] = []
    tokenizer = None
    if architecture is not None:
        try:
            tokenizer = load_tokenizer(config.policy.model_path)
        except ModelError as error:
            problems.append(f"policy.model_path: {error}")
    room = None
    if is_rl and architecture is not None:
        room = count_positions(config.rollout, architecture)[0] - config.rollout.max_response_tokens
    paths = [config.data.train_path]
    if is_rl and config.data.eval_path is not None:
        paths.append(config.data.eval_path)
    for path in paths:
        problems += check_prompt_file(
            path,
            config.data,
            tokenizer,
            config.train.mode,
            needs_answer=is_rl and needs_answer(config.reward),
            find_answer_problems=partial(find_answer_problems, config.reward) if is_rl else None,
            vocab_size=None if architecture is None else architecture.vocab_size,
            room=room if room is None or room > 0 else None,  # without room none of the prompts is at fault
        )
    return problems
