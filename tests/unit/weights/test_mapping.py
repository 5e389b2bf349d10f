"""The parameter mapping, both ways, on full tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.errors import ModelError
from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.mapping import (
    HfTensor,
    MegatronName,
    ParameterMapping,
    TensorMap,
    direct,
    gate_up,
    qkv,
)

QKV = MegatronName("decoder.layers.self_attention.linear_qkv.weight", 3)
FC1 = MegatronName("decoder.layers.mlp.experts.experts.linear_fc1.weight", 3, 5)
EMBEDDING = MegatronName("embedding.word_embeddings.weight")


def qkv_map(groups: int, heads_per_group: int, head_dim: int, hidden: int) -> TensorMap:
    q_rows, kv_rows = groups * heads_per_group * head_dim, groups * head_dim
    q, k, v = (
        HfTensor("q", (q_rows, hidden)),
        HfTensor("k", (kv_rows, hidden)),
        HfTensor("v", (kv_rows, hidden)),
    )
    return qkv(QKV, q, k, v, num_query_groups=groups)


def random_hf(tensor_map: TensorMap) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.randn(tensor.shape) for tensor in tensor_map.hf}


sizes = st.integers(min_value=1, max_value=4)


@given(groups=sizes, heads_per_group=sizes, head_dim=sizes, hidden=sizes)
def test_qkv_is_each_groups_queries_then_its_key_and_value(
    groups: int, heads_per_group: int, head_dim: int, hidden: int
) -> None:
    tensor_map = qkv_map(groups, heads_per_group, head_dim, hidden)
    hf = random_hf(tensor_map)
    q = hf["q"].view(groups, heads_per_group * head_dim, hidden)
    k = hf["k"].view(groups, head_dim, hidden)
    v = hf["v"].view(groups, head_dim, hidden)
    expected = torch.cat([q, k, v], dim=1).reshape(-1, hidden)
    assert torch.equal(tensor_map.to_megatron(hf.__getitem__), expected)


def test_gate_lies_above_up() -> None:
    tensor_map = gate_up(FC1, "gate", "up", (3, 2))
    hf = random_hf(tensor_map)
    assert torch.equal(tensor_map.to_megatron(hf.__getitem__), torch.cat([hf["gate"], hf["up"]]))


@given(groups=sizes, heads_per_group=sizes, head_dim=sizes, data=st.data())
def test_any_rows_are_what_the_whole_matrix_has_there(
    groups: int, heads_per_group: int, head_dim: int, data: st.DataObject
) -> None:
    """A shard put together from its blocks = the same rows of the full matrix."""
    tensor_map = qkv_map(groups, heads_per_group, head_dim, hidden=2)
    hf = random_hf(tensor_map)
    num_rows = tensor_map.shape[0]
    start = data.draw(st.integers(0, num_rows - 1))
    stop = data.draw(st.integers(start + 1, num_rows))
    blocks = list(tensor_map.blocks(start, stop))
    shard = torch.cat([hf[b.hf_name][b.hf_row : b.hf_row + b.num_rows] for b in blocks])
    assert torch.equal(shard, tensor_map.to_megatron(hf.__getitem__)[start:stop])
    assert [b.row for b in blocks] == [
        start + sum(b.num_rows for b in blocks[:i]) for i in range(len(blocks))
    ]


@given(vocab=st.integers(1, 9), padding=st.integers(0, 9))
def test_vocabulary_padding_is_zero_and_trimmed(vocab: int, padding: int) -> None:
    tensor_map = direct(EMBEDDING, "embed", (vocab, 3), padded=True)
    hf = random_hf(tensor_map)
    matrix = tensor_map.to_megatron(hf.__getitem__, num_rows=vocab + padding)
    assert torch.equal(matrix, torch.cat([hf["embed"], torch.zeros(padding, 3)]))
    assert torch.equal(tensor_map.to_hf(matrix)["embed"], hf["embed"])


@pytest.mark.parametrize(
    "model",
    [
        "dense",
        "dense_tied",
        "qwen2",
        "qwen2_tied",
        "llama",
        "moe",
        "moe_bf16",
        "moe_mixed",
        "moe_sparse_step_tied",
    ],
)
def test_every_tensor_of_a_model_round_trips_bit_equal(model: str, hf_model: Callable[[str], Path]) -> None:
    folder = HfFolder(hf_model(model))
    family = get_family(folder.config)
    mapping = family.mapping(family.architecture(folder.config))
    exported: dict[str, torch.Tensor] = {}
    for tensor_map in mapping:
        num_rows = 128 if tensor_map.padded else None
        exported |= tensor_map.to_hf(tensor_map.to_megatron(folder.get, num_rows))
    assert exported.keys() == set(folder.keys())
    assert list(exported) == list(mapping.hf_shapes)
    for name, tensor in exported.items():
        assert tensor.dtype == folder.dtype(name)
        assert torch.equal(tensor, folder.get(name)), name


@pytest.mark.parametrize(
    ("key", "offsets", "expected"),
    [
        ("embedding.word_embeddings.weight", (), EMBEDDING),
        ("decoder.layers.self_attention.linear_qkv.weight", (3,), QKV),
        ("decoder.layers.3.self_attention.linear_qkv.weight", (), QKV),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 5), FC1),
        ("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", (5,), FC1),
    ],
)
def test_stacked_and_per_layer_keys_are_one_name(
    key: str, offsets: tuple[int, ...], expected: MegatronName
) -> None:
    assert MegatronName.from_sharded(key, offsets) == expected


def test_wrong_shapes_are_named() -> None:
    tensor_map = gate_up(FC1, "gate", "up", (3, 2))
    with pytest.raises(ModelError, match=re.escape("'gate': expected shape [3, 2], found [4, 2]")):
        tensor_map.to_megatron(lambda _: torch.zeros(4, 2))
    with pytest.raises(
        ModelError, match=re.escape(f"{FC1}: expected shape [6, 2] from config.json, found [7, 2]")
    ):
        tensor_map.to_hf(torch.zeros(7, 2))
    embedding = direct(EMBEDDING, "embed", (5, 2), padded=True)
    with pytest.raises(ModelError, match=re.escape("at least [5, 2] from config.json, found [4, 2]")):
        embedding.to_hf(torch.zeros(4, 2))


def test_folder_and_model_must_have_the_same_tensors() -> None:
    mapping = ParameterMapping(
        [direct(EMBEDDING, "embed", (5, 2)), direct(QKV, "qkv", (4, 2))], (".inv_freq",)
    )
    mapping.check_hf({"embed": (5, 2), "qkv": (4, 2), "a.inv_freq": (1,)}, "folder")
    with pytest.raises(ModelError) as error:
        mapping.check_hf({"embed": (5, 3), "bias": (1,)}, "folder")
    assert str(error.value) == (
        "folder: weights and config.json disagree: tensor 'qkv' is missing; unexpected tensor 'bias'; "
        "tensor 'embed': expected shape [5, 2] from config.json, found [5, 3]"
    )


def test_a_parameter_without_counterpart_is_named() -> None:
    with pytest.raises(ModelError, match=re.escape(f"{FC1.key!r}, layer 3, expert 5 has no")):
        ParameterMapping([])[FC1]
