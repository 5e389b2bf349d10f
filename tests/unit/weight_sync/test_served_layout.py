"""Checksums of SGLang's parameters, against fused and sharded tensors that are built here and hashed whole.

That these are SGLang's own is shown against real servers in tests/sglang/test_weight_sync.py.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from megatron_drpo.errors import WeightSyncError
from megatron_drpo.weight_sync.client import ServerInfo
from megatron_drpo.weight_sync.gpu_hash import GpuDigest
from megatron_drpo.weight_sync.served_layout import Layout, compute_served_checksums, known_layout
from megatron_drpo.weights.hf_folder import HfFolder


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def info(**arguments: Any) -> ServerInfo:
    fields: dict[str, Any] = {
        "frontend": "python",
        "version": "0.5.23",
        "tp_size": 1,
        "device": "cpu",
        "dtype": "float32",
    }
    own = {key: arguments.pop(key) for key in list(arguments) if key in fields}
    fields |= own
    return ServerInfo(**fields, arguments=arguments)


def shards(tensor: torch.Tensor, tp_size: int, dim: int) -> list[torch.Tensor]:
    size = tensor.shape[dim] // tp_size
    return [tensor.narrow(dim, rank * size, size) for rank in range(tp_size)]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", ["moe_mixed", "qwen2", "llama_tied", "dense"])
def test_checksums_by_hand(hf_model: Callable[[str], Path], name: str, tp_size: int) -> None:
    """Of layer 1: attention, and a dense or an expert MLP; the vocabulary of 101 is padded to 128.

    The intermediate sizes are 96, padded to 128 for two ranks, and 32 for experts, to 64.
    """
    folder = HfFolder(hf_model(name))
    layout = known_layout(info(tp_size=tp_size), folder.config)
    assert layout is not None
    tensors = {key: folder.get(key) for key in folder}
    items = list(tensors.items())
    random.Random(0).shuffle(items)  # parts of a fused parameter come in any order
    found = compute_served_checksums(items, layout)
    prefix = "model.layers.2."
    expected: dict[str, list[torch.Tensor]] = {}
    for kind in ("weight", "bias") if name == "qwen2" else ("weight",):
        parts = [shards(tensors[f"{prefix}self_attn.{part}_proj.{kind}"], tp_size, 0) for part in "qkv"]
        expected[f"self_attn.qkv_proj.{kind}"] = [torch.cat(rank) for rank in zip(*parts, strict=True)]
    expected["self_attn.o_proj.weight"] = shards(tensors[f"{prefix}self_attn.o_proj.weight"], tp_size, 1)
    expected["input_layernorm.weight"] = [tensors[f"{prefix}input_layernorm.weight"]] * tp_size
    missing = 32 if tp_size == 2 else 0
    if name == "moe_mixed":
        w13: list[list[torch.Tensor]] = []
        w2: list[list[torch.Tensor]] = []
        for e in range(8):
            mlp = [tensors[f"{prefix}mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            gate, up = (shards(pad(part, (0, 0, 0, missing)), tp_size, 0) for part in mlp[:2])
            w13.append([torch.cat(rank) for rank in zip(gate, up, strict=True)])
            w2.append(shards(pad(mlp[2], (0, missing)), tp_size, 1))
        expected["mlp.experts.w13_weight"] = [torch.stack(rank) for rank in zip(*w13, strict=True)]
        expected["mlp.experts.w2_weight"] = [torch.stack(rank) for rank in zip(*w2, strict=True)]
        expected["mlp.gate.weight"] = [tensors[f"{prefix}mlp.gate.weight"]] * tp_size
    else:
        mlp = [tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")]
        gate, up = (shards(pad(part, (0, 0, 0, missing)), tp_size, 0) for part in mlp[:2])
        expected["mlp.gate_up_proj.weight"] = [torch.cat(rank) for rank in zip(gate, up, strict=True)]
        expected["mlp.down_proj.weight"] = shards(pad(mlp[2], (0, missing)), tp_size, 1)
    vocabulary = shards(pad(tensors["model.embed_tokens.weight"], (0, 0, 0, 27)), tp_size, 0)
    for rank in range(tp_size):
        for key, ranks in expected.items():
            assert found[rank].pop(prefix + key) == sha(ranks[rank]), key
        assert not any(
            key.startswith(prefix) and "_norm" not in key and "layernorm" not in key for key in found[rank]
        )
        assert found[rank]["model.embed_tokens.weight"] == sha(vocabulary[rank])
        assert ("lm_head.weight" in found[rank]) == (name != "llama_tied")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_servers_on_gpus_by_hand(hf_model: Callable[[str], Path], tp_size: int) -> None:
    """Experts and MLPs are not padded there; the vocabulary is."""
    folder = HfFolder(hf_model("moe_mixed"))
    layout = known_layout(info(tp_size=tp_size, device="cuda"), folder.config)
    assert layout is not None
    tensors = {key: folder.get(key) for key in folder}
    found = compute_served_checksums(tensors.items(), layout)
    prefix = "model.layers.2.mlp.experts."
    w13: list[list[torch.Tensor]] = [[] for _ in range(tp_size)]
    w2: list[list[torch.Tensor]] = [[] for _ in range(tp_size)]
    for rank, e in itertools.product(range(tp_size), range(8)):
        gate, up = (shards(tensors[f"{prefix}{e}.{part}_proj.weight"], tp_size, 0) for part in ("gate", "up"))
        w13[rank].append(torch.cat([gate[rank], up[rank]]))
        w2[rank].append(shards(tensors[f"{prefix}{e}.down_proj.weight"], tp_size, 1)[rank])
    vocabulary = shards(pad(tensors["lm_head.weight"], (0, 0, 0, 27)), tp_size, 0)
    for rank in range(tp_size):
        assert found[rank][f"{prefix}w13_weight"] == gpu_digest(torch.stack(w13[rank]))
        assert found[rank][f"{prefix}w2_weight"] == gpu_digest(torch.stack(w2[rank]))
        assert found[rank]["lm_head.weight"] == gpu_digest(vocabulary[rank])
        assert found[rank]["model.norm.weight"] == gpu_digest(tensors["model.norm.weight"])


def gpu_digest(tensor: torch.Tensor) -> str:
    digest = GpuDigest()
    digest.update(tensor)
    return digest.hexdigest()


def test_weights_are_cast_to_what_the_server_holds() -> None:
    weight = torch.randn(4, 4)
    [found] = compute_served_checksums([("model.norm.weight", weight)], Layout(1, torch.bfloat16, 0))
    assert found == {"model.norm.weight": sha(weight.bfloat16())}


def test_a_missing_part_is_named() -> None:
    tensors = [("model.layers.0.self_attn.q_proj.weight", torch.ones(4, 4))]
    with pytest.raises(
        WeightSyncError, match=r"1 of 3 parts of model\.layers\.0\.self_attn\.qkv_proj\.weight"
    ):
        compute_served_checksums(tensors, Layout(1, torch.float32, 0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "cuda", "tp_size": 2, "pp_size": 2},
        {"device": "xpu"},
        {"quantization": "fp8"},
        {"dtype": "auto"},
        {"ep_size": 2},
        {"tp_size": 3},
        {"attention_backend": "intel_amx"},
        {"enable_dp_attention": True},
    ],
)
def test_layouts_that_are_not_known(hf_model: Callable[[str], Path], arguments: dict[str, Any]) -> None:
    config = HfFolder(hf_model("moe_mixed")).config
    assert known_layout(info(), config) == Layout(1, torch.float32, 8, "cpu")
    assert known_layout(info(device="cuda"), config) == Layout(1, torch.float32, 8, "cuda")
    assert known_layout(info(**arguments), config) is None
