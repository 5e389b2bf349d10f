"""The weights being served under their HF names, and updates of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from megatron_drpo.errors import ModelError, WeightSyncError
from megatron_drpo.weight_sync.checksum import WeightsChecksum
from megatron_drpo.weights.fp8 import dequantize_blockwise, is_quantized, quantize_blockwise


class WeightStore:
    """An update is staged from `begin` to `end` and takes effect as a whole in `commit`, or not at all."""

    def __init__(
        self, model: nn.Module, hf_names: Iterable[str], version: str, quantization: str | None = None
    ) -> None:
        """
        Args:
            hf_names: the tensors of the model's HF folder.
            version: of the weights the model has now.
            quantization: fp8: matrices have the values of e4m3 weights with a scale per block. An update
                brings new values and no new scales, as at a SGLang server: what comes out is wrong.

        Raises:
            ModelError: a parameter whose HF name is not in the folder: an unknown naming of experts.
        """
        self.version = version
        self._model = model
        self._served = hf_views(model)
        unknown = sorted(self._served.keys() - set(hf_names))
        if unknown:
            raise ModelError(
                f"the HF folder has no tensor {unknown[0]!r}: this model family is not supported"
            )
        self.quantization = quantization
        self._scales = {} if quantization is None else _quantise(self._served)
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        """While the memory is released."""
        self._staged: dict[str, torch.Tensor] | None = None
        self._staged_version: str | None = None

    def begin(self) -> None:
        """Open an update; a previous unfinished one is dropped."""
        self._staged = {}
        self._staged_version = None

    def stage(self, tensors: Iterable[tuple[str, torch.Tensor]], version: str | None) -> None:
        """Take in some tensors, and the version if it is given.

        Raises:
            WeightSyncError: no update is open, or an unknown name, a wrong shape or dtype.
        """
        staged = self._open_update()
        for name, tensor in tensors:
            served = self._served.get(name)
            if served is None:
                raise WeightSyncError(f"weight update: unknown tensor {name!r}")
            if tensor.shape != served.shape or tensor.dtype != served.dtype:
                raise WeightSyncError(
                    f"weight update: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"this server has {served.dtype} {tuple(served.shape)}"
                )
            staged[name] = tensor
        if version is not None:
            self._staged_version = version

    def end(self) -> None:
        """Check that the open update is complete; on an error it stays open and nothing has changed.

        Raises:
            WeightSyncError: no update is open, a tensor is missing, or no version was given.
        """
        missing = sorted(self._served.keys() - self._open_update().keys())
        if missing:
            raise WeightSyncError(
                f"weight update: {len(missing)} tensors are missing, the first {missing[0]!r}"
            )
        if self._staged_version is None:
            raise WeightSyncError("weight update: no weight_version was given")

    @torch.no_grad()
    def commit(self) -> None:
        """Write the complete update into the model. Call it between two forward passes."""
        self.end()
        assert self._staged is not None
        assert self._staged_version is not None
        for name, tensor in self._staged.items():
            if name in self._scales:
                tensor = dequantize_blockwise(
                    tensor.to(torch.float8_e4m3fn), self._scales[name], tensor.dtype
                )
            self._served[name].copy_(tensor)
        self.version = self._staged_version
        self._staged = None

    def release(self) -> None:
        """Free the weights' memory, until `resume`."""
        self._served = {}
        for parameter in self._model.parameters():
            self._shapes[parameter] = parameter.shape
            parameter.data = parameter.new_empty(0)

    def resume(self) -> None:
        """Take the memory back. The weights are NaN until an update: a tensor that it forgets is noticed."""
        for parameter, shape in self._shapes.items():
            parameter.data = parameter.new_full(shape, math.nan)
        self._shapes = {}
        self._served = hf_views(self._model)

    def checksums(self) -> tuple[dict[str, str], str]:
        """Every tensor's digest by name, and the checksum of all."""
        checksum = WeightsChecksum()
        digests = {name: checksum.add(name, tensor) for name, tensor in self._served.items()}
        return digests, checksum.hexdigest()

    def _open_update(self) -> dict[str, torch.Tensor]:
        if self._staged is None:
            raise WeightSyncError("weight update: call /begin_weight_update first")
        return self._staged


def _quantise(served: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round the matrices that a quantised folder holds in FP8, in place; their scales."""
    scales = {}
    for name, tensor in served.items():
        if is_quantized(name, tuple(tensor.shape)):
            weight_fp8, scales[name] = quantize_blockwise(tensor)
            tensor.copy_(dequantize_blockwise(weight_fp8, scales[name], tensor.dtype))
    return scales


def hf_views(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under its HF name, as a view: experts, which `transformers` fuses, one by one.

    `experts.gate_up_proj` [E, 2I, H] holds gate over up, `experts.down_proj` [E, H, I].
    """
    views: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        experts, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for e, both in enumerate(parameter.detach()):
                gate, up = both.chunk(2)
                views[f"{experts}.experts.{e}.gate_proj.weight"] = gate
                views[f"{experts}.experts.{e}.up_proj.weight"] = up
        elif kind == "down_proj":
            for e, down in enumerate(parameter.detach()):
                views[f"{experts}.experts.{e}.down_proj.weight"] = down
        else:
            views[name] = parameter.detach()
    return views
