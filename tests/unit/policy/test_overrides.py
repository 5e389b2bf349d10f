"""Names and values in policy.megatron_overrides that TransformerConfig cannot hold."""

from __future__ import annotations

import math

import pytest
from megatron.core.transformer.enums import AttnBackend

from megatron_drpo.config.limits import shown
from megatron_drpo.policy.overrides import check_megatron_overrides, convert_overrides


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
        ("init_method", "normal", "Optional[Callable]"),
        ("autocast_dtype", "bfloat16", "Optional[torch.dtype]"),
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


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("context_parallel_size", 2, "set parallel.context_parallel_size instead"),
        ("pipeline_model_parallel_size", 2, "set parallel.pipeline_parallel_size instead"),
        ("sequence_parallel", True, "set parallel.sequence_parallel instead"),
        ("bf16", False, "set policy.dtype instead"),
        ("params_dtype", "bfloat16", "set policy.dtype instead"),
        ("moe_enable_routing_replay", True, "set policy.routing_replay instead"),
        ("calculate_per_token_loss", False, "the loss of a global batch is a plain sum over its tokens"),
        ("variable_seq_lengths", False, "micro-batches are packed, so their lengths differ"),
        (
            "overlap_p2p_comm",
            True,
            "only one way of the pipeline's exchange is right for packed micro-batches",
        ),
        ("hidden_dropout", 0.1, "logprobs would be random"),
        ("finalize_model_grads_func", None, "the loss of a global batch is a plain sum over its tokens"),
    ],
)
def test_fields_that_the_program_owns(name: str, value: object, why: str) -> None:
    [problem] = check_megatron_overrides({name: value})
    assert problem.startswith(f"policy.megatron_overrides.{name}={shown(value)}: the program sets this field")
    assert problem.endswith(why)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_aux_loss_coeff", 0.001),
        ("moe_aux_loss_coeff", [0.0, 0.001]),
        ("moe_z_loss_coeff", 1e-3),
        ("moe_router_load_balancing_type", "aux_loss"),
        ("mtp_num_layers", 1),
    ],
)
def test_losses_beside_the_objective_are_refused(name: str, value: object) -> None:
    """Megatron multiplies them by a micro-batch's tokens and expects a division that never comes."""
    [problem] = check_megatron_overrides({name: value})
    assert problem.startswith(
        f"policy.megatron_overrides.{name}={shown(value)}: the objective is the only loss"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_aux_loss_coeff", 0.0),
        ("moe_aux_loss_coeff", [0, 0.0]),
        ("moe_z_loss_coeff", None),
        ("moe_router_load_balancing_type", "none"),
        ("mtp_num_layers", None),
    ],
)
def test_losses_that_are_off_are_taken(name: str, value: object) -> None:
    assert check_megatron_overrides({name: value}) == []


def test_enums_are_named_by_their_members() -> None:
    assert check_megatron_overrides({"attention_backend": "flash"}) == []
    assert convert_overrides({"attention_backend": "flash", "qk_layernorm": True}) == {
        "attention_backend": AttnBackend.flash,
        "qk_layernorm": True,
    }
    assert check_megatron_overrides({"attention_backend": "flush"}) == [
        "policy.megatron_overrides.attention_backend='flush': expected one of 'flash', 'fused', 'unfused', "
        "'local', 'auto'"
    ]
