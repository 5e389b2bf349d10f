"""`policy.megatron_overrides` against the fields of Megatron's TransformerConfig."""

from __future__ import annotations

import difflib
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from megatron.core.transformer import TransformerConfig

from megatron_drpo.config.limits import cut, shown

_PLAIN_SUM = "the loss of a global batch is a plain sum over its tokens"
_EXCHANGE = "only one way of the pipeline's exchange is right for packed micro-batches"
_DROPOUT = "logprobs would be random"
_OWNED = {
    "tensor_model_parallel_size": "set parallel.tensor_parallel_size instead",
    "sequence_parallel": "set parallel.sequence_parallel instead",
    "context_parallel_size": "set parallel.context_parallel_size instead",
    "pipeline_model_parallel_size": "set parallel.pipeline_parallel_size instead",
    "virtual_pipeline_model_parallel_size": "set parallel.virtual_pipeline_parallel_size instead",
    "expert_model_parallel_size": "set parallel.expert_parallel_size instead",
    "expert_tensor_parallel_size": "set parallel.expert_tensor_parallel_size instead",
    "moe_extended_tp": "set parallel.expert_tensor_parallel_size instead",
    "bf16": "set policy.dtype instead",
    "fp16": "set policy.dtype instead",
    "params_dtype": "set policy.dtype instead",
    "pipeline_dtype": "set policy.dtype instead",
    "moe_enable_routing_replay": "set policy.routing_replay instead",
    "moe_router_fusion": "the fused router knows no replay of routes",
    "transformer_impl": "set policy.layers instead",
    "use_cpu_initialization": "set platform instead",
    "calculate_per_token_loss": _PLAIN_SUM,
    "finalize_model_grads_func": _PLAIN_SUM,
    "grad_scale_func": _PLAIN_SUM,
    "variable_seq_lengths": "micro-batches are packed, so their lengths differ",
    "overlap_p2p_comm": _EXCHANGE,
    "batch_p2p_comm": _EXCHANGE,
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
}
"""Fields that the program sets, with what to do about it."""
_LOSSES = {
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0,
    "moe_z_loss_coeff": None,
    "mtp_num_layers": None,
}
"""Fields that add a loss to the objective, with the value that adds none."""


def check_megatron_overrides(overrides: dict[str, Any]) -> list[str]:
    """Names that TransformerConfig does not have, values that its fields cannot hold, and fields that are not
    the user's, as sentences."""
    known = [f.name for f in fields(TransformerConfig)]
    declared = get_type_hints(TransformerConfig)
    problems = []
    for name, value in overrides.items():
        key = f"policy.megatron_overrides.{cut(name)}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{key}: not a field of TransformerConfig{hint}")
        elif name in _OWNED:
            problems.append(f"{key}={shown(value)}: the program sets this field: {_OWNED[name]}")
        elif not _fits(value, declared[name]):
            problems.append(f"{key}={shown(value)}: expected {_describe(declared[name])}")
        elif name in _LOSSES and not _adds_no_loss(name, value):
            problems.append(
                f"{key}={shown(value)}: the objective is the only loss: Megatron's others depend on how a "
                f"batch is split into micro-batches; leave this field at {shown(_LOSSES[name])}"
            )
    return problems


def convert_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields' values: a member of an enum for its name, everything else as it is."""
    declared = get_type_hints(TransformerConfig)
    enums = {name: declared[name].__members__ for name in overrides if _is_enum(declared.get(name))}
    return {
        name: enums[name].get(value, value) if name in enums else value for name, value in overrides.items()
    }


def _adds_no_loss(name: str, value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(one == _LOSSES[name] for one in values)


def _describe(declared: Any) -> str:
    if _is_enum(declared):
        return f"one of {', '.join(map(repr, declared.__members__))}"
    return declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")


def _is_enum(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, Enum)


def _fits(value: object, declared: Any) -> bool:
    """Whether a value, as YAML has them, is of a type: an enum's member is
    its name; no function or dtype can be written."""
    origin, arguments = get_origin(declared), get_args(declared)
    if _is_enum(declared):
        return isinstance(value, str) and value in declared.__members__
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if declared in (int, float):
        numbers = (int,) if declared is int else (int, float)
        return type(value) in numbers and abs(cast(float, value)) < 2**63  # false for NaN
    return declared in (bool, str, list, NoneType) and type(value) is declared
