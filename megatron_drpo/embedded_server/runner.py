"""The model and its key/value cache: one row of the cache per active sequence.

Dimensions: A active sequences, S slots, U unique prompts, R rows written, L prompt tokens, K cached tokens,
H key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from megatron_drpo.embedded_server.routing import RouteRecorder
from megatron_drpo.errors import ModelError

_PREFILL_TOKENS = 8192
"""Padded tokens of one prefill forward."""
_GRANULE = 64
"""The cache grows to a multiple of this many tokens."""


def load_model(model_path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The HF folder's causal language model on the CPU, ready for inference.

    Raises:
        ModelError: an architecture whose attention this cache does not serve.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa")
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if kinds - {DynamicLayer}:
        names = sorted(kind.__name__ for kind in kinds)
        raise ModelError(
            f"{model_path}: the embedded server has full attention only; this model needs {names}"
        )
    expert_weights = [p for p in model.parameters() if p.dim() == 3]
    if expert_weights:
        # grouped_mm is the fastest on a CPU, but wants rows of a multiple of 16 bytes.
        aligned = all(p.stride(1) * p.element_size() % 16 == 0 for p in expert_weights)
        model.set_experts_implementation("grouped_mm" if aligned else "eager")
    return model.eval().requires_grad_(False)


class ModelRunner:
    """Prefill and decode over a batch of rows 0 .. A-1 that the caller manages."""

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        self.model = model
        self._num_slots = num_slots
        self._recorder = RouteRecorder(model)
        self.reset()

    @property
    def has_routers(self) -> bool:
        """Whether the model has experts to choose from."""
        return self._recorder.has_routers

    def reset(self) -> None:
        """Forget all rows and free their memory."""
        layers = [_SlotLayer(self._num_slots) for _ in range(self.model.config.num_hidden_layers)]
        self._layers = layers
        self._cache = Cache(layers=list(layers))

    @torch.inference_mode()
    def prefill(
        self, prompts: list[tuple[int, ...]], rows: list[int]
    ) -> dict[int, Int[torch.Tensor, "L layers K"]]:
        """Write the keys and values of all prompt tokens but the last (`decode` takes that) into `rows`.

        Equal prompts are computed once.

        Returns:
            The experts of these tokens by row, for prompts of at least two tokens of a model with routers.
        """
        routes: dict[int, torch.Tensor] = {}
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for prompt, row in zip(prompts, rows, strict=True):
            if len(prompt) > 1:
                rows_of.setdefault(prompt[:-1], []).append(row)
        for chunk in _chunks(sorted(rows_of, key=len, reverse=True)):
            length = len(chunk[0])
            ids_UL = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in chunk])
            computed = DynamicCache()
            # Padding stands on the right, where no real token can see it.
            self.model(input_ids=ids_UL, past_key_values=computed, use_cache=True, logits_to_keep=1)
            source = [u for u, prompt in enumerate(chunk) for _ in rows_of[prompt]]
            target = [row for prompt in chunk for row in rows_of[prompt]]
            if self.has_routers:
                routes_UL = self._recorder.routes().unflatten(0, ids_UL.shape)
                routes |= {row: routes_UL[u, : len(chunk[u])] for u, row in zip(source, target, strict=True)}
            for layer, new in zip(self._layers, computed.layers, strict=True):
                assert isinstance(new, DynamicLayer)
                assert new.keys is not None
                assert new.values is not None
                layer.write_prompts(new.keys[source], new.values[source], target)
        return routes

    @torch.inference_mode()
    def decode(self, tokens: list[int], positions: list[int]) -> Float[torch.Tensor, "A V"]:
        """Feed one token to each of rows 0 .. A-1; the logits that follow it."""
        positions_A = torch.tensor(positions)
        length = max(positions) + 1
        for layer in self._layers:
            layer.begin_step(positions_A, length)
        mask_AK: Bool[torch.Tensor, "A K"] = torch.arange(length) <= positions_A[:, None]
        output = self.model(
            input_ids=torch.tensor(tokens)[:, None],
            position_ids=positions_A[:, None],
            attention_mask=mask_AK[:, None, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def routes(self) -> Int[torch.Tensor, "A layers K"]:
        """The experts of the tokens that the latest `decode` was given; only of a model with routers."""
        return self._recorder.routes()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy a row's cache over another row's."""
        for layer in self._layers:
            layer.move(source, target)


def _chunks(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Split prompts, longest first, so that each padded batch stays within the token budget."""
    chunks: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        if chunks and (len(chunks[-1]) + 1) * len(chunks[-1][0]) <= _PREFILL_TOKENS:
            chunks[-1].append(prompt)
        else:
            chunks.append([prompt])
    return chunks


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, H, capacity, D], written at one position per row."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self._num_slots = num_slots
        self._keys_SHKD = torch.zeros(0)
        self._values_SHKD = torch.zeros(0)
        self._positions_A: Int[torch.Tensor, " A"] = torch.zeros(0, dtype=torch.int64)
        self._rows_A = torch.zeros(0, dtype=torch.int64)
        self._length = 0

    def begin_step(self, positions_A: Int[torch.Tensor, " A"], length: int) -> None:
        """Announce where the coming `update` writes, and how many positions it then returns."""
        self._positions_A = positions_A
        self._rows_A = torch.arange(len(positions_A))
        self._length = length

    def write_prompts(
        self,
        keys_RHLD: Float[torch.Tensor, "R H L D"],
        values_RHLD: Float[torch.Tensor, "R H L D"],
        rows: list[int],
    ) -> None:
        self._reserve(keys_RHLD, values_RHLD, keys_RHLD.shape[2])
        self._keys_SHKD[rows, :, : keys_RHLD.shape[2]] = keys_RHLD
        self._values_SHKD[rows, :, : keys_RHLD.shape[2]] = values_RHLD

    def move(self, source: int, target: int) -> None:
        self._keys_SHKD[target] = self._keys_SHKD[source]
        self._values_SHKD[target] = self._values_SHKD[source]

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Make room for `length` tokens per row, with the heads and head sizes of the given tensors."""
        if not self.is_initialized:
            self._keys_SHKD = keys.new_zeros(self._num_slots, keys.shape[1], 0, keys.shape[3])
            self._values_SHKD = values.new_zeros(self._num_slots, values.shape[1], 0, values.shape[3])
            self.is_initialized = True
        capacity = self._keys_SHKD.shape[2]
        if length > capacity:
            new_capacity = -(-max(length, capacity * 2) // _GRANULE) * _GRANULE
            # Zeros, not garbage: a masked position still enters the product with the values, as 0 * value.
            self._keys_SHKD = torch.nn.functional.pad(self._keys_SHKD, (0, 0, 0, new_capacity - capacity))
            self._values_SHKD = torch.nn.functional.pad(self._values_SHKD, (0, 0, 0, new_capacity - capacity))

    # ------------------------------------------------------------------- what transformers calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._reserve(key_states, value_states, self._length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [A, H, 1, D] at each row's position; the first `length` positions of rows 0 .. A-1."""
        self._reserve(key_states, value_states, self._length)
        self._keys_SHKD[self._rows_A, :, self._positions_A] = key_states[:, :, 0]
        self._values_SHKD[self._rows_A, :, self._positions_A] = value_states[:, :, 0]
        num_rows = len(self._rows_A)
        return self._keys_SHKD[:num_rows, :, : self._length], self._values_SHKD[:num_rows, :, : self._length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1
