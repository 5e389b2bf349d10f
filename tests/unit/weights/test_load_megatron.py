"""A model loaded from a torch_dist checkpoint: bit for bit what the HF folder gives, on every layout.

Megatron is imported by the ranks alone: that takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import Config, DataConfig, Dtype, ParallelConfig, PlatformName, PolicyConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import build_platform
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.mapping import ParameterMapping

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

ONE = ParallelConfig()
TP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_parallel_size=2)
PP2_VPP2 = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)
EP2 = ParallelConfig(expert_parallel_size=2, data_parallel_size=2)
TP2_EP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=2)
TP2_ETP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)

PER_LAYER = {"moe_layer_freq": [1, 1, 1, 1]}
"""All layers have experts, as 1 would say, but a list makes Megatron write the layer into its keys."""

Build = tuple[str, ParallelConfig, dict[str, Any], Dtype]
"""Model, layout, megatron_overrides, dtype."""
STACKED: Build = ("moe", ONE, {}, Dtype.fp32)
LAYERED: Build = ("moe", ONE, PER_LAYER, Dtype.fp32)
TWO_RANKS: list[tuple[str, Build]] = [
    ("stacked", ("moe", TP2, {}, Dtype.fp32)),
    ("stacked", ("moe", PP2, PER_LAYER, Dtype.fp32)),
    ("stacked", ("moe", TP2_ETP2, PER_LAYER, Dtype.bf16)),
    ("layered", ("moe", EP2, {}, Dtype.fp32)),
    ("layered", ("moe", PP2_VPP2, {}, Dtype.fp32)),
    ("layered", ("moe", TP2_EP2, PER_LAYER, Dtype.fp32)),
    ("mixed", ("moe_mixed", PP2, {}, Dtype.fp32)),
    ("tied", ("dense_tied", PP2_VPP2, {}, Dtype.fp32)),
    ("tied", ("dense_tied", TP2, {}, Dtype.bf16)),
]


def build(folder: HfFolder, build: Build) -> tuple[list[Any], ParameterMapping]:
    """This rank's bare chunks, all parameters NaN, and their mapping."""
    from megatron_drpo.policy.model import build_model_chunks, build_transformer_config
    from megatron_drpo.policy.parallel import initialise_parallel

    _, parallel, overrides, dtype = build
    platform = build_platform(PlatformName.cpu)
    state = initialise_parallel(parallel, "gloo", platform.prepare(0))
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(folder.path), dtype=dtype, megatron_overrides=overrides),
        parallel=parallel,
    )
    family = get_family(folder.config)
    architecture = family.architecture(folder.config)
    transformer_config = build_transformer_config(config, architecture, platform)
    chunks = build_model_chunks(transformer_config, architecture, platform, state.device)
    chunks = [chunk.to(transformer_config.params_dtype) for chunk in chunks]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    return chunks, family.mapping(architecture)


def parameters(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def save(path: Path, source: Path, what: Build, without: str = "nothing") -> list[str]:
    """A checkpoint with the weights of a folder, and padding rows of 7; the keys of its tensors."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

    from megatron_drpo.weights.load_hf import load_hf_weights

    folder = HfFolder(source)
    chunks, mapping = build(folder, what)
    load_hf_weights(chunks, folder, mapping)
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                first = 128 * parallel_state.get_tensor_model_parallel_rank()
                parameter.data[max(0, 101 - first) :] = 7.0
        entries = chunk.sharded_state_dict().items()
        state[f"model{index}"] = {
            name: entry
            for name, entry in entries
            if not (isinstance(entry, ShardedTensor) and entry.key.endswith(without))
        }
    if torch.distributed.get_rank() == 0:
        path.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(path))
    return sorted(load_tensors_metadata(str(path)))


def save_all(root: Path, sources: dict[str, Path]) -> dict[str, list[str]]:
    """On one rank."""
    return {
        "stacked": save(root / "stacked", sources["moe"], STACKED),
        "layered": save(root / "layered", sources["moe"], LAYERED),
        "mixed": save(root / "mixed", sources["moe_mixed"], ("moe_mixed", ONE, {}, Dtype.fp32)),
        "tied": save(root / "tied", sources["dense_tied"], ("dense_tied", ONE, {}, Dtype.fp32)),
        "lacking": save(root / "lacking", sources["moe"], STACKED, without="mlp.router.weight"),
    }


def differences(path: Path, source: Path, what: Build) -> list[str]:
    """Parameters of this rank that are not, bit for bit, those that the HF folder gives."""
    from megatron_drpo.weights.load_hf import load_hf_weights
    from megatron_drpo.weights.load_megatron import check_megatron_weights, load_megatron_weights

    folder = HfFolder(source)
    chunks, mapping = build(folder, what)
    check_megatron_weights(path, mapping)
    load_megatron_weights(chunks, path, mapping)
    found = parameters(chunks)
    load_hf_weights(chunks, folder, mapping)
    expected = parameters(chunks)
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def failure(path: Path, source: Path, what: Build) -> str:
    """The message of a load that must fail."""
    from megatron_drpo.weights.load_megatron import load_megatron_weights

    chunks, mapping = build(HfFolder(source), what)
    with pytest.raises(CheckpointError) as error:
        load_megatron_weights(chunks, path, mapping)
    if "cannot be read" not in str(error.value):
        assert all(bool(tensor.isnan().all()) for tensor in parameters(chunks).values())
    return str(error.value)


def load_on_two_ranks(
    root: Path, sources: dict[str, Path], failures: list[tuple[Path, str]]
) -> tuple[list[list[str]], list[str]]:
    found = [differences(root / name, sources[what[0]], what) for name, what in TWO_RANKS]
    # Under another layout than the first: a checkpoint of two ranks, its vocabulary padded to 256 rows.
    save(root / "two_ranks", sources["moe"], ("moe", TP2_EP2, {}, Dtype.fp32))
    found.append(differences(root / "two_ranks", sources["moe"], ("moe", EP2, PER_LAYER, Dtype.fp32)))
    messages = [failure(path, sources[name], (name, PP2, {}, Dtype.fp32)) for path, name in failures]
    return found, messages


def test_layouts_and_misfits(
    tmp_path: Path,
    hf_model: Callable[[str], Path],
    run_distributed: Callable[..., list[Any]],
) -> None:
    """Stacked and per-layer keys, each into models that would write either; other padding and dtypes; what
    does not fit is refused, with the same words on every rank, before anything is loaded."""
    sources = {name: hf_model(name) for name in ("moe", "moe_mixed", "dense", "dense_tied")}
    sources["wide"] = tmp_path / "wide"
    shutil.copytree(sources["moe"], sources["wide"])
    config = json.loads((sources["wide"] / "config.json").read_text()) | {"moe_intermediate_size": 48}
    (sources["wide"] / "config.json").write_text(json.dumps(config))
    (keys,) = run_distributed(save_all, 1, tmp_path, sources)
    router = "mlp.router.weight"
    assert f"decoder.layers.{router}" in keys["stacked"]
    assert f"decoder.layers.0.{router}" not in keys["stacked"]
    assert f"decoder.layers.3.{router}" in keys["layered"]
    assert f"decoder.layers.{router}" not in keys["layered"]
    assert f"decoder.layers.{router}" not in keys["lacking"]

    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "stacked", damaged)
    data = max(damaged.glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    garbled = tmp_path / "garbled"
    shutil.copytree(tmp_path / "stacked", garbled)
    (garbled / ".metadata").write_bytes(b"no pickle")
    failures = [
        (tmp_path / "nowhere", "moe"),
        (tmp_path / "stacked", "moe_mixed"),
        (tmp_path / "stacked", "dense"),
        (tmp_path / "layered", "wide"),
        (tmp_path / "lacking", "moe"),
        (garbled, "moe"),
        (damaged, "moe"),
    ]
    ranks = run_distributed(load_on_two_ranks, 2, tmp_path, sources, failures, timeout_s=100.0)
    for found, messages in ranks:
        assert found == [[] for _ in found]
        assert messages == ranks[0][1]
    nowhere, mixed, dense, wide, lacking, garbled_message, damaged_message = ranks[0][1]
    assert nowhere == f"{tmp_path / 'nowhere'}: no such folder; give a torch_dist checkpoint"
    refusal = "is not a checkpoint of this model: "
    fc1, fc2 = "decoder.layers.mlp.linear_fc1.", "decoder.layers.mlp.linear_fc2.weight"
    missing = [f"tensor '{key}' is missing" for key in (f"{fc1}layer_norm_weight", f"{fc1}weight", fc2)]
    assert mixed == f"{tmp_path / 'stacked'} {refusal}" + "; ".join(missing)
    assert dense.startswith(f"{tmp_path / 'stacked'} {refusal}" + "; ".join(missing))
    assert f"unexpected tensor 'decoder.layers.{router}'" in dense
    experts = "decoder.layers.0.mlp.experts.experts.linear_fc"
    assert wide.startswith(
        f"{tmp_path / 'layered'} {refusal}tensor '{experts}1.weight': expected shape [8, 96, 64], "
        f"found [8, 64, 64]; tensor '{experts}2.weight': expected shape [8, 64, 48], found [8, 64, 32]; "
    )
    assert lacking == f"{tmp_path / 'lacking'} {refusal}tensor 'decoder.layers.{router}' is missing"
    assert garbled_message.startswith(f"{garbled / '.metadata'}: damaged: ")
    assert damaged_message.startswith(f"{damaged} cannot be read: ")
