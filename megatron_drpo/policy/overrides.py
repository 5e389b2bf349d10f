"""`policy.megatron_overrides` against the fields of Megatron's TransformerConfig."""

from __future__ import annotations

import difflib
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from megatron.core.transformer import TransformerConfig

from megatron_drpo.limits import cut, shown


def check_megatron_overrides(overrides: dict[str, Any]) -> list[str]:
    """Names that TransformerConfig does not have, and values that its fields cannot hold, as sentences."""
    known = [f.name for f in fields(TransformerConfig)]
    declared = get_type_hints(TransformerConfig)
    problems = []
    for name, value in overrides.items():
        key = f"policy.megatron_overrides.{cut(name)}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{key}: not a field of TransformerConfig{hint}")
        elif not _fits(value, declared[name]):
            kind = declared[name]
            words = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            problems.append(f"{key}={shown(value)}: expected {words}")
    return problems


def _fits(value: object, declared: Any) -> bool:
    """Whether a value, as YAML has them, is of a type: no function, dtype or enum member can be written."""
    origin, arguments = get_origin(declared), get_args(declared)
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
