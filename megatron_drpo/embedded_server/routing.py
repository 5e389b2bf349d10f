"""Which experts the routers of a served model chose."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter


class RouteRecorder:
    """Keeps what every router chose in the model's latest forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._num_layers = int(model.config.num_hidden_layers)
        self._chosen: dict[int, torch.Tensor] = {}
        """[T, K] per layer with experts."""
        self.has_routers = False
        for name, module in model.named_modules():
            if isinstance(module, Qwen3MoeTopKRouter):
                layer = re.search(r"layers\.(\d+)\.", name)
                assert layer is not None, name
                module.register_forward_hook(partial(self._keep, int(layer[1])))
                self.has_routers = True

    def routes(self) -> Int[torch.Tensor, "T layers K"]:
        """Of the latest forward pass, its tokens one after the other; zeros in layers without experts.

        Only for models that have routers.
        """
        nowhere_TK = torch.zeros_like(next(iter(self._chosen.values())))
        return torch.stack([self._chosen.get(layer, nowhere_TK) for layer in range(self._num_layers)], 1)

    def _keep(self, layer: int, _: object, __: object, output: Any) -> None:
        """A router's forward hook: its output is (logits, weights, experts)."""
        self._chosen[layer] = output[2]
