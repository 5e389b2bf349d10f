"""Which model families there are."""

from megatron_drpo.errors import ModelError
from megatron_drpo.models import llama, qwen2, qwen3, qwen3_moe
from megatron_drpo.models.base import ModelFamily
from megatron_drpo.weights.hf_folder import HfConfig

FAMILIES = {
    family.model_type: family for family in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)
}


def get_family(config: HfConfig) -> ModelFamily:
    """The family of an HF config, by its `model_type`; ModelError lists the known ones."""
    model_type = config.get("model_type", str)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{config.source}: model_type {model_type!r} is not supported; known: {known}")
    return FAMILIES[model_type]
