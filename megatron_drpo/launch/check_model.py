"""What a configuration asks of its model: Megatron's consent, positions and tokens."""

from __future__ import annotations

from megatron_drpo.config.limits import shown
from megatron_drpo.config.schema import Config, RolloutConfig, RolloutEngineName
from megatron_drpo.errors import ConfigError, PlatformError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.model import build_transformer_config


def check_megatron(config: Config, architecture: ArchitectureConfig) -> list[str]:
    """Whether Megatron takes the model, the layout and policy.megatron_overrides together, and its layers are
    installed."""
    try:
        platform = build_platform(config.platform)
    except PlatformError:  # only the machine that trains can tell
        return []
    try:
        build_transformer_config(config, architecture, platform)
    except PlatformError as error:
        return [str(error)]
    except ConfigError as error:
        return list(error.problems)
    return []


def count_positions(rollout: RolloutConfig, architecture: ArchitectureConfig) -> tuple[int, str]:
    """Tokens that a prompt and its response may have together, and what says so."""
    length = rollout.sglang.context_length
    if rollout.engine is RolloutEngineName.sglang and length is not None and not rollout.endpoints:
        return length, "rollout.sglang.context_length"
    return architecture.max_position_embeddings, "the model's max_position_embeddings"


def check_tokens(rollout: RolloutConfig, architecture: ArchitectureConfig) -> list[str]:
    """Whether the model has the positions and the tokens that rollouts need."""
    problems = []
    positions, source = count_positions(rollout, architecture)
    if positions > architecture.max_position_embeddings:
        problems.append(
            f"{source}={positions}: must not exceed the model's max_position_embeddings, "
            f"{architecture.max_position_embeddings}"
        )
    if rollout.max_response_tokens >= positions:
        problems.append(
            f"rollout.max_response_tokens={rollout.max_response_tokens}: must be less than {source}, "
            f"{positions}, which the prompt needs as well"
        )
    unknown = [token for token in rollout.stop_token_ids if token >= architecture.vocab_size]
    if unknown:
        problems.append(
            f"rollout.stop_token_ids={shown(rollout.stop_token_ids)}: {unknown[0]} is outside the model's "
            f"vocabulary of {architecture.vocab_size}"
        )
    return problems
