"""The checksums that a SGLang server must report, computed from HF-named tensors as they stream by.

SGLang's /weights_checker hashes every parameter of every tensor-parallel rank as it lies there: q, k and v
in one matrix, gate and up in one, all experts in one, each rank its own shard. On a CPU the hash is the first
8 bytes of SHA-256 (`tensor_hash` of
https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/managers/mm_utils.py), on a GPU that of
`gpu_hash.py`. Both can be fed piece by piece, so no fused matrix is ever built here. The layouts are those
of SGLang's models/{qwen3_moe,qwen3,qwen2,llama}.py with layers/linear.py,
layers/moe/fused_moe_triton/layer.py, layers/vocab_parallel_embedding.py and configs/update_config.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from megatron_drpo.errors import WeightSyncError
from megatron_drpo.weight_sync.client import ServerInfo
from megatron_drpo.weight_sync.gpu_hash import GpuDigest
from megatron_drpo.weights.hf_folder import HfConfig

_MODEL_TYPES = ("qwen3_moe", "qwen3", "qwen2", "llama")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_VOCAB_MULTIPLE = 64
_INTERMEDIATE_MULTIPLE = 32
"""Per rank; configs/update_config.py, on CPUs."""
_QKV = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)")
_GATE_UP = re.compile(r"(.*\.mlp\.)(gate|up)_proj\.(weight)")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_VOCAB = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides how a server holds its weights; servers of the same layout hold the same bytes."""

    tp_size: int
    dtype: torch.dtype
    num_experts: int
    """0: none."""
    device: str = "cpu"
    """cpu or cuda."""

    @property
    def is_certain(self) -> bool:
        """Whether every parameter lies as is assumed here. On GPUs some kernels want the weights of experts
        in an order of their own; which one SGLang takes depends on the GPU."""
        return self.device == "cpu"


def known_layout(info: ServerInfo, config: HfConfig) -> Layout | None:
    """How a server holds the model of `config`; None where that is not known here.

    Known are plain servers. Quantised, packed (AMX) or otherwise distributed weights have other bytes.
    """
    arguments = info.arguments
    plain = {"quantization": None, "pp_size": 1, "dp_size": 1, "ep_size": 1, "enable_dp_attention": False}
    if any(arguments.get(key, value) != value for key, value in plain.items()):
        return None
    if arguments.get("attention_backend") == "intel_amx" or info.dtype not in _DTYPES:
        return None
    if info.device not in ("cpu", "cuda"):
        return None
    if config.get("model_type", str, "") not in _MODEL_TYPES:
        return None
    num_heads = config.get("num_attention_heads", int)
    num_kv_heads = config.get("num_key_value_heads", int, num_heads)
    if num_heads % info.tp_size or num_kv_heads % info.tp_size:
        return None  # SGLang pads heads then
    # transformers 5 writes `num_local_experts` for what earlier versions call `num_experts`.
    num_experts = config.get("num_local_experts", int, config.get("num_experts", int, 0))
    sizes = [config.get(key, int, 0) for key in ("intermediate_size", "moe_intermediate_size")]
    sizes.append(_padded(config.get("vocab_size", int), _VOCAB_MULTIPLE))
    if info.device == "cuda" and any(size % info.tp_size for size in sizes):
        return None  # only on CPUs are all of them padded
    return Layout(info.tp_size, _DTYPES[info.dtype], num_experts, info.device)


class _Sha256Digest:
    """Of a parameter of a server on a CPU."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, tensor: torch.Tensor) -> None:
        self._digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        pass

    def hexdigest(self) -> str:
        return self._digest.hexdigest()[:16]


@dataclass(slots=True)
class _Hash:
    """One parameter of all ranks: its pieces in order, whatever the order they come in."""

    digests: list[_Sha256Digest | GpuDigest]
    """One per rank."""
    num_pieces: int
    num_done: int = 0
    early: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Pieces that came before their turn, per rank."""

    def add(self, turn: int, shards: list[torch.Tensor]) -> None:
        if turn != self.num_done:
            self.early[turn] = [shard.clone() for shard in shards]
            return
        while True:
            for digest, shard in zip(self.digests, shards, strict=True):
                digest.update(shard)
            self.num_done += 1
            if self.num_done == self.num_pieces:
                for digest in self.digests:
                    digest.finish()
            if self.num_done not in self.early:
                return
            shards = self.early.pop(self.num_done)


class ServedChecksums:
    """Takes in every tensor of the model, on any device, then has the checksums of all ranks."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._hashes: dict[str, _Hash] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Hash one HF tensor's place in the server's parameters."""
        tensor = tensor.detach().to(self._layout.dtype)
        if match := _EXPERT.fullmatch(name):
            self._add_expert(match[1], int(match[2]), match[3], tensor)
        elif match := _QKV.fullmatch(name):
            self._piece(f"{match[1]}qkv_proj.{match[3]}", "qkv".index(match[2]), 3, self._shards(tensor))
        elif match := _GATE_UP.fullmatch(name):
            turn = ("gate", "up").index(match[2])
            self._piece(f"{match[1]}gate_up_proj.{match[3]}", turn, 2, self._intermediate(tensor, 0))
        elif name.endswith(".o_proj.weight"):
            self._piece(name, 0, 1, self._shards(tensor, dim=1))
        elif name.endswith(".down_proj.weight"):
            self._piece(name, 0, 1, self._intermediate(tensor, 1))
        elif name in _VOCAB:
            self._piece(name, 0, 1, self._vocabulary(tensor))
        else:
            self._piece(name, 0, 1, [tensor] * self._layout.tp_size)

    def checksums(self) -> list[dict[str, str]]:
        """Per rank: 16 hexadecimal digits by SGLang's name of the parameter.

        Raises:
            WeightSyncError: a part of a fused parameter was never added.
        """
        for name, hashed in self._hashes.items():
            if hashed.num_done < hashed.num_pieces:
                raise WeightSyncError(
                    f"the policy exported {hashed.num_done} of {hashed.num_pieces} parts of {name}"
                )
        return [
            {name: hashed.digests[rank].hexdigest() for name, hashed in self._hashes.items()}
            for rank in range(self._layout.tp_size)
        ]

    def _add_expert(self, prefix: str, expert: int, kind: str, tensor: torch.Tensor) -> None:
        num_experts = self._layout.num_experts
        if kind == "down":
            self._piece(f"{prefix}w2_weight", expert, num_experts, self._intermediate(tensor, 1))
        else:
            turn = 2 * expert + ("gate", "up").index(kind)
            self._piece(f"{prefix}w13_weight", turn, 2 * num_experts, self._intermediate(tensor, 0))

    def _piece(self, name: str, turn: int, num_pieces: int, shards: list[torch.Tensor]) -> None:
        if name not in self._hashes:
            build = _Sha256Digest if self._layout.device == "cpu" else GpuDigest
            self._hashes[name] = _Hash([build() for _ in range(self._layout.tp_size)], num_pieces)
        self._hashes[name].add(turn, shards)

    def _intermediate(self, tensor: torch.Tensor, dim: int) -> list[torch.Tensor]:
        padding = _INTERMEDIATE_MULTIPLE * self._layout.tp_size if self._layout.device == "cpu" else 1
        return self._shards(tensor, dim, multiple=padding)

    def _vocabulary(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        divides = _padded(len(tensor), _VOCAB_MULTIPLE) % self._layout.tp_size == 0
        multiple = _VOCAB_MULTIPLE * (1 if divides else self._layout.tp_size)
        return self._shards(tensor, multiple=multiple)

    def _shards(self, tensor: torch.Tensor, dim: int = 0, multiple: int = 1) -> list[torch.Tensor]:
        """Equal parts, one per rank, after padding with zeros to a multiple."""
        missing = _padded(tensor.shape[dim], multiple) - tensor.shape[dim]
        if missing:
            shape = list(tensor.shape)
            shape[dim] = missing
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim)
        return list(tensor.tensor_split(self._layout.tp_size, dim))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def compute_served_checksums(
    tensors: Iterable[tuple[str, torch.Tensor]], layout: Layout
) -> list[dict[str, str]]:
    """`ServedChecksums` of all tensors."""
    served = ServedChecksums(layout)
    for name, tensor in tensors:
        served.add(name, tensor)
    return served.checksums()
