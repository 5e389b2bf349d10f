"""Names and values in policy.megatron_overrides that TransformerConfig cannot hold."""

from __future__ import annotations

import math

import pytest

from megatron_drpo.limits import shown
from megatron_drpo.policy.overrides import check_megatron_overrides


def test_unknown_overrides_name_the_nearest_field() -> None:
    problems = check_megatron_overrides({"moe_router_topkk": 2, "moe_aux_loss_coeff": 0.0, "zzzz": 1})
    assert problems == [
        "policy.megatron_overrides.moe_router_topkk: not a field of TransformerConfig; "
        "did you mean moe_router_topk?",
        "policy.megatron_overrides.zzzz: not a field of TransformerConfig",
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("moe_router_topk", "2", "int"),
        ("moe_router_topk", 2.0, "int"),
        ("moe_router_topk", True, "int"),
        ("qk_layernorm", 1, "bool"),
        ("qk_layernorm", "yes", "bool"),
        ("layernorm_epsilon", "tiny", "float"),
        ("layernorm_epsilon", math.nan, "float"),
        ("layernorm_epsilon", math.inf, "float"),
        ("layernorm_epsilon", None, "float"),
        ("layernorm_epsilon", 10**400, "float"),
        ("moe_router_topk", 10**22, "int"),
        ("moe_ffn_hidden_size", [1], "Optional[int]"),
        ("moe_router_dtype", "fp8", "Optional[Literal['fp32', 'fp64']]"),
        ("moe_layer_freq", [1, "0"], "Union[int, List[int]]"),
        ("window_size", [1, 2, 3], "Optional[Tuple[int, int]]"),
        ("activation_func", "silu", "Callable"),
        ("params_dtype", "bfloat16", "dtype"),
    ],
)
def test_override_of_another_type(name: str, value: object, expected: str) -> None:
    assert check_megatron_overrides({name: value}) == [
        f"policy.megatron_overrides.{name}={shown(value)}: expected {expected}"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_topk", 2),
        ("qk_layernorm", True),
        ("layernorm_epsilon", 1),
        ("layernorm_epsilon", 1e-6),
        ("moe_ffn_hidden_size", None),
        ("moe_router_dtype", "fp64"),
        ("moe_layer_freq", 2),
        ("moe_layer_freq", [1, 0]),
        ("window_size", [8, 0]),
        ("recompute_modules", ["moe", "core_attn"]),
    ],
)
def test_override_of_the_right_type(name: str, value: object) -> None:
    assert check_megatron_overrides({name: value}) == []
