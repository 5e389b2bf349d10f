"""Which names of Transformer Engine there are, under which module, and what stands for each.

Megatron-Core finds out what it has by importing: a name that is missing here is a feature that it goes
without. (https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/extensions/transformer_engine.py)
"""

from __future__ import annotations

VERSION_VARIABLE = "MEGATRON_DRPO_TE_CPU_VERSION"
"""The environment variable that chooses as which version of Transformer Engine the stand-in behaves."""
DEFAULT_VERSION = "2.11.0"
"""The newest that megatron-core 0.16.1 asks for (>= 2.9, < 2.12)."""

NAME = "transformer_engine"

_HERE = "megatron_drpo.platform.te_cpu"

INTERFACE: dict[str, dict[str, str]] = {
    "": {"__version__": "version:VERSION"},
    "common": {},
    "common.recipe": {
        name: f"recipe:{name}"
        for name in (
            "Format",
            "Recipe",
            "DelayedScaling",
            "Float8CurrentScaling",
            "Float8BlockScaling",
            "MXFP8BlockScaling",
        )
    },
    "pytorch": {
        "Linear": "linear:Linear",
        "LayerNormLinear": "linear:LayerNormLinear",
        "GroupedLinear": "grouped_linear:GroupedLinear",
        "RMSNorm": "norm:RMSNorm",
        "LayerNorm": "norm:LayerNorm",
        "DotProductAttention": "attention:DotProductAttention",
        "Fp8Padding": "fp8:Fp8Padding",
        "Fp8Unpadding": "fp8:Fp8Unpadding",
        "fp8_autocast": "fp8:fp8_autocast",
        "fp8_model_init": "fp8:fp8_model_init",
        "checkpoint": "checkpoint:checkpoint",
    },
    "pytorch.attention": {"DotProductAttention": "attention:DotProductAttention"},
    "pytorch.attention.rope": {"apply_rotary_pos_emb": "rope:apply_rotary_pos_emb"},
    "pytorch.cpp_extensions": {"general_gemm": "gemm:general_gemm"},
    "pytorch.distributed": {
        "CudaRNGStatesTracker": "checkpoint:CudaRNGStatesTracker",
        "activation_recompute_forward": "checkpoint:activation_recompute_forward",
        "checkpoint": "checkpoint:checkpoint",
        "is_fp8_activation_recompute_enabled": "checkpoint:is_fp8_activation_recompute_enabled",
    },
    "pytorch.float8_tensor": {"Float8Tensor": "fp8:Float8Tensor"},
    "pytorch.fp8": {
        "FP8GlobalStateManager": "fp8:FP8GlobalStateManager",
        "fp8_autocast": "fp8:fp8_autocast",
        "fp8_model_init": "fp8:fp8_model_init",
    },
    "pytorch.module": {},
    "pytorch.module.base": {
        "TransformerEngineBaseModule": "base:TransformerEngineBaseModule",
        "get_dummy_wgrad": "gemm:get_dummy_wgrad",
        "get_workspace": "gemm:get_workspace",
    },
    "pytorch.ops": {"Sequential": "ops:Sequential", "FusibleOperation": "ops:FusibleOperation"},
    "pytorch.optimizers": {
        "FusedAdam": "optimizers:FusedAdam",
        "FusedSGD": "optimizers:FusedSGD",
        "multi_tensor_applier": "optimizers:multi_tensor_applier",
        "multi_tensor_l2norm": "optimizers:multi_tensor_l2norm",
        "multi_tensor_scale": "optimizers:multi_tensor_scale",
    },
    "pytorch.permutation": {
        name: f"permutation:{name}"
        for name in (
            "moe_permute",
            "moe_permute_with_probs",
            "moe_sort_chunks_by_index",
            "moe_sort_chunks_by_index_with_probs",
            "moe_unpermute",
        )
    },
    "pytorch.router": {
        name: f"router:{name}"
        for name in (
            "fused_compute_score_for_moe_aux_loss",
            "fused_moe_aux_loss",
            "fused_topk_with_score_function",
        )
    },
    "pytorch.tensor": {"QuantizedTensor": "fp8:QuantizedTensor"},
    "pytorch.tensor.float8_tensor": {"Float8Tensor": "fp8:Float8Tensor"},
    "pytorch.tensor.utils": {
        "cast_master_weights_to_fp8": "fp8:cast_master_weights_to_fp8",
        "replace_raw_data": "fp8:replace_raw_data",
    },
}
"""Module of Transformer Engine (below its top) to {name: "module of this folder:name"}."""


def names_of(module: str) -> dict[str, tuple[str, str]] | None:
    """{name: (importable module, attribute)} of a module of Transformer Engine by its full name.

    None: there is none of that name.
    """
    path = module.removeprefix(NAME).removeprefix(".")
    if path not in INTERFACE:
        return None
    places = {name: place.partition(":") for name, place in INTERFACE[path].items()}
    return {name: (f"{_HERE}.{file}", attribute) for name, (file, _, attribute) in places.items()}


def children_of(module: str) -> list[str]:
    """Full names of the modules directly below one."""
    names = [f"{NAME}.{path}" for path in INTERFACE if path]
    return [name for name in names if name.rpartition(".")[0] == module]
