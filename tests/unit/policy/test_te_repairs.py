"""What mends the seams between Megatron-Core and Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable

import megatron.core.tensor_parallel.layers as megatron_layers
import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_drpo.platform.te_cpu import version
from megatron_drpo.policy.model import PolicyModel
from megatron_drpo.policy.te_repairs import output_layer_without_apex


def test_a_model_with_fused_weight_gradients_can_be_built_without_apex(
    build_model: Callable[..., PolicyModel],
) -> None:
    """Megatron's output layer alone asks for apex's extension, and is never called."""
    config = build_model("moe").config
    assert config.gradient_accumulation_fusion

    def output_layer() -> ColumnParallelLinear:
        return ColumnParallelLinear(64, 128, config=config, init_method=torch.nn.init.zeros_, bias=False)

    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        output_layer()
    with output_layer_without_apex():
        assert not hasattr(output_layer().weight, "main_grad")
    assert not megatron_layers._grad_accum_fusion_available


def test_the_refusal_is_back_after_an_error() -> None:
    with pytest.raises(KeyError), output_layer_without_apex():
        raise KeyError
    assert not megatron_layers._grad_accum_fusion_available


@pytest.mark.parametrize("marks", [True, False])
def test_experts_are_marked_whatever_transformer_engine_does(
    build_model: Callable[..., PolicyModel], monkeypatch: pytest.MonkeyPatch, marks: bool
) -> None:
    monkeypatch.setattr(version, "MARKS_EXPERT_WEIGHTS", marks)
    experts = {
        name: parameter for name, parameter in build_model("moe").named_parameters() if ".experts." in name
    }
    assert len(experts) == 4 * 2 * 8  # layers, matrices, experts
    for name, parameter in experts.items():
        assert param_is_not_tensor_parallel_duplicate(parameter, torch.distributed.group.WORLD), name
        assert vars(parameter)["partition_dim"] == (0 if "linear_fc1" in name else 1), name
