"""What can be wrong with the input or the target of a conversion, one case each."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_drpo.weights.hf_folder import INDEX_FILE
from tools.bad_surroundings import settings
from tools.corruption_case import Action, Case, Kind
from tools.damage import (
    Damage,
    append,
    create,
    edit_json,
    edit_tensors,
    flip,
    flip_at,
    overwrite,
    remove,
    set_config,
    set_header_size,
    swap,
    truncate,
    without,
)

FIRST = "model-00001-of-*.safetensors"
LAST = "model-*.safetensors"
RELEASE = "release"
EMBEDDING = "model.embed_tokens.weight"
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"
NORM = "model.norm.weight"


# ----------------------------------------------------------------------------------------- HF folders


def _hf(kind: Kind, *cases: tuple[str, str, Damage]) -> Iterator[Case]:
    for name, names, damage in cases:
        yield Case(name, kind, Action.to_megatron, names, damage)


def safetensors_files() -> Iterator[Case]:
    yield from _hf(
        Kind.plain_hf,
        ("dtype's letter in a header", r"model-00001", flip(FIRST, '"BF16"', at=1)),
        ("shape's digit in a header", r"model-00001", flip(FIRST, '"shape":[', at=9)),
        ("offset's digit in a header", r"model-00001", flip(FIRST, '"data_offsets":[0,', at=17)),
        ("tensor's name in a header", "lm_head", flip(FIRST, '"lm_head.weight"', at=1)),
        ("field's name in a header", r"model-00001", flip(FIRST, '"dtype"', at=2)),
        ("brace of a header", r"model-00001", flip(FIRST, "}}", at=1)),
        ("__metadata__ of a header", r"model-00001", flip(FIRST, "__metadata__", at=3)),
        ("header's length, lowest bit", r"model-0000\d", flip_at(LAST, 0)),
        ("header's length, highest bit", r"model-0000\d", flip_at(LAST, 7, bit=7)),
        ("header's length, 8 too few", r"model-0000\d", set_header_size(LAST, -8)),
        ("file ends one byte early", r"model-0000\d", truncate(LAST, 1)),
        ("file ends in its header", r"model-0000\d", overwrite(LAST, b"\x10")),
        ("file is empty", r"model-0000\d", overwrite(LAST, b"")),
        ("file has a byte too many", r"model-0000\d", append(LAST, b"\0")),
        ("file is missing", r"model-0000\d", remove(LAST)),
        ("two files exchanged", "listed", swap(FIRST, LAST)),
        ("index names a missing file", "gone.safe", edit_json(INDEX_FILE, _send_to("gone.safetensors"))),
        ("index names no file", INDEX_FILE, edit_json(INDEX_FILE, _send_to(None))),
        ("index lists what is not there", "more", edit_json(INDEX_FILE, _list_more)),
        ("index is no JSON", INDEX_FILE, flip(INDEX_FILE, ":", at=0)),
        ("index has no map", INDEX_FILE, overwrite(INDEX_FILE, b"{}")),
        ("index is missing", "no weights", remove(INDEX_FILE)),
    )


def _send_to(file: str | None) -> Callable[[Any], None]:
    def edit(index: Any) -> None:
        index["weight_map"][EMBEDDING] = file

    return edit


def _list_more(index: Any) -> None:
    index["weight_map"]["more"] = index["weight_map"][EMBEDDING]


def tensors() -> Iterator[Case]:
    def change(having: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
        return edit_tensors(edit, having)

    def cast(name: str, dtype: torch.dtype) -> Damage:
        return change(name, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    yield from _hf(
        Kind.plain_hf,
        ("tensor too many", "more", change(NORM, lambda tensors: tensors.update(more=torch.ones(2)))),
        ("tensor missing", EXPERT, change(EXPERT, without(EXPERT))),
        ("tensor of another shape", NORM, change(NORM, lambda t: t.update({NORM: t[NORM][:-1]}))),
        ("tensor transposed", EXPERT, change(EXPERT, lambda t: t.update({EXPERT: t[EXPERT].T}))),
        ("fp16 tensor among bf16 ones", EXPERT, cast(EXPERT, torch.float16)),
        ("int tensor", EXPERT, cast(EXPERT, torch.int32)),
        ("fp64 tensor", EXPERT, cast(EXPERT, torch.float64)),
        ("fp32 expert among bf16 ones", EXPERT, cast(EXPERT, torch.float32)),
        ("FP8 tensor without scales", EXPERT, cast(EXPERT, torch.float8_e4m3fn)),
    )


# Change of config.json -> what the message must name, in HF folders and in checkpoints.
_WRONG_CONFIGS: dict[str, tuple[dict[str, object], str, str]] = {
    "one layer more": ({"num_hidden_layers": 3}, r"model\.layers\.2", r"decoder\.layers"),
    "one layer less": ({"num_hidden_layers": 1}, r"model\.layers\.1", r"decoder\.layers"),
    "hidden size": ({"hidden_size": 32}, EMBEDDING, "embedding"),
    "experts": ({"num_local_experts": 7}, r"experts\.7", "experts"),
    "width of experts": ({"moe_intermediate_size": 16}, "experts", "experts"),
    "heads": ({"num_attention_heads": 2}, "q_proj", "linear_qkv|linear_proj"),
    "vocabulary": ({"vocab_size": 23}, EMBEDDING, "embed"),
    "tied embeddings": ({"tie_word_embeddings": True}, "lm_head", "output_layer"),
    "model type": ({"model_type": "qwen4"}, "qwen4", "qwen4"),
    "hidden size is text": ({"hidden_size": "64"}, "config.json.*hidden_size", "config.json.*hidden_size"),
}


def configs() -> Iterator[Case]:
    for kind, action, file in (
        (Kind.plain_hf, Action.to_megatron, "config.json"),
        (Kind.checkpoint, Action.to_hf, f"{RELEASE}/hf/config.json"),
    ):
        for name, (values, in_hf, in_checkpoint) in _WRONG_CONFIGS.items():
            names = in_hf if action is Action.to_megatron else in_checkpoint
            yield Case(f"config: {name}", kind, action, names, set_config(file, **values))
        yield Case("config missing", kind, action, r"config\.json", remove(file))
        yield Case("config is no JSON", kind, action, r"config\.json", flip(file, "{"))
    yield Case(
        "config: unknown quantisation",
        Kind.plain_hf,
        Action.to_megatron,
        r"config\.json.*quant",
        set_config(quantization_config={"quant_method": "awq"}),
    )


# ------------------------------------------------------------------------------- hashes and checkpoints


def hashes() -> Iterator[Case]:
    """Both kinds of folder that these tools write."""
    for kind, action, prefix in (
        (Kind.hf, Action.to_megatron, ""),
        (Kind.checkpoint, Action.to_hf, f"{RELEASE}/"),
    ):
        file = f"{prefix}conversion.json"
        for name, damage in (
            ("a hash", flip(file, f'"{EMBEDDING}": [\n   [\n    0,', at=len(EMBEDDING) + 35)),
            ("a tensor's name", flip(file, f'"{EXPERT}": [', at=1)),
            ("a row", flip(file, f'"{EXPERT}": [\n   [\n    0', at=len(EXPERT) + 15)),
            ("a number of rows", flip(file, f'"{EXPERT}": [\n   [\n    0,\n    ', at=len(EXPERT) + 22)),
            ("a dtype", flip(file, '": "bfloat16"', at=4)),
            ("the algorithm", flip(file, '"xxh3_128"', at=1)),
            ("the format's version", flip(file, '"format_version": 1', at=18, bit=1)),
            ("a bracket", flip(file, "[", bit=2)),
            ("a field's name", flip(file, '"hashes"', at=1)),
            ("hashes are a list", edit_json(file, lambda values: values.update(hashes=[]))),
            ("hashes of one tensor missing", edit_json(file, lambda v: v["hashes"].pop(EXPERT))),
            ("the end", truncate(file, 10)),
        ):
            yield Case(f"conversion.json: {name}", kind, action, r"conversion\.json", damage)
    data = "model.safetensors"
    yield from _hf(
        Kind.hf,
        ("first byte of the data", data, _flip_data(data, 0)),
        ("last byte of the data", data, flip_at(data, -1)),
        ("a bit in the middle", data, _flip_data(data, 200_001, bit=6)),
    )


def _flip_data(name: str, position: int, bit: int = 0) -> Damage:
    """Position after the header."""

    def damage(folder: Path) -> None:
        size = int.from_bytes((folder / name).read_bytes()[:8], "little")
        flip_at(name, 8 + size + position, bit)(folder)

    return damage


class _Command:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def checkpoints() -> Iterator[Case]:
    for kind in (Kind.checkpoint, Kind.plain_checkpoint):
        for name, names, damage in (*_METADATA, *_DATA):
            inside = _inside(damage)
            yield Case(name, kind, Action.to_hf, names, inside)
    for name, names, damage in _WITH_HASHES:
        yield Case(name, Kind.checkpoint, Action.to_hf, names, _inside(damage))
    tracker = "latest_checkpointed_iteration.txt"
    yield Case("tracker", Kind.checkpoint, Action.to_hf, "iter_0000007", overwrite(tracker, b"7"))


def _inside(damage: Damage) -> Damage:
    return lambda folder: damage(folder / RELEASE)


_METADATA: tuple[tuple[str, str, Damage], ...] = (
    (".metadata: a tensor's key", r"\.metadata|embedding", flip(".metadata", "embedding.word", at=2)),
    (".metadata: a file's name", r"\.metadata|distcp", flip(".metadata", "__0_0.distcp", at=2)),
    (".metadata: a class", r"\.metadata", flip(".metadata", "TensorStorageMetadata", at=1)),
    (".metadata: a dtype", r"\.metadata|decoder|bfloat16", flip(".metadata", "bfloat16", at=7)),
    (".metadata: first byte", r"\.metadata", flip_at(".metadata", 0)),
    (".metadata: last byte", r"\.metadata", flip_at(".metadata", -1)),
    (".metadata: the end", r"\.metadata", truncate(".metadata", 100)),
    (".metadata is empty", r"\.metadata", overwrite(".metadata", b"")),
    (".metadata is missing", r"\.metadata", remove(".metadata")),
    (".metadata runs a command", r"\.metadata", overwrite(".metadata", pickle.dumps(_Command()))),
    ("metadata.json: another format", r"metadata\.json", flip("metadata.json", "torch_dist", at=1)),
    ("metadata.json is no JSON", r"metadata\.json", flip("metadata.json", "{")),
    ("metadata.json is missing", r"metadata\.json", remove("metadata.json")),
)
_DATA: tuple[tuple[str, str, Damage], ...] = (
    (".distcp: the archive's first bytes", "__0_0.distcp", flip_at("__0_0.distcp", 0)),
    (".distcp: pickled class", "__0_0.distcp", flip("__0_0.distcp", "_rebuild_tensor", at=3)),
    (".distcp: dtype", "__0_0.distcp", flip("__0_0.distcp", "BFloat16Storage", at=1)),
    (".distcp: the archive's table", "__0_0.distcp", flip("__0_0.distcp", "PK\1\2", at=2)),
    (".distcp ends early", "__0_0.distcp", truncate("__0_0.distcp", 1)),
    (".distcp is empty", "__0_0.distcp", overwrite("__0_0.distcp", b"")),
    (".distcp is missing", "__1_0.distcp", remove("__1_0.distcp")),
    (".distcp files exchanged", r"__\d_0\.distcp", swap("__0_0.distcp", "__1_0.distcp")),
)
_WITH_HASHES: tuple[tuple[str, str, Damage], ...] = (
    (".distcp: a bit of the data", "distcp|tensor 'model", flip_at("__1_0.distcp", 40_000)),
    (".metadata: an object's key", r"\.metadata", flip(".metadata", "_extra_state/shard", at=1)),
    ("common.pt: a bit", r"common\.pt", flip("common.pt", "checkpoint_version", at=1)),
    ("common.pt is missing", r"common\.pt", remove("common.pt")),
    ("integrity.json: a hash", r"\.metadata", flip("integrity.json", '".metadata": "', at=14)),
    ("integrity.json: a file's name", r"integrity\.json", flip("integrity.json", '"common.pt"', at=1)),
    ("integrity.json is no JSON", r"integrity\.json", flip("integrity.json", "{")),
    ("integrity.json has no files", r"integrity\.json", overwrite("integrity.json", b"[]")),
)


def for_verify() -> Iterator[Case]:
    """Bits that a conversion does not read, or only as it reads any other weights."""
    central = "PK\1\2"
    for name, names, damage in (
        ("padding of an archive", "__0_0.distcp", flip("__0_0.distcp", "ZZZZ", at=1)),
        ("time in an archive", "__0_0.distcp", flip("__0_0.distcp", "PK\3\4", at=10)),
        ("checksum in an archive", "__0_0.distcp", flip("__0_0.distcp", central, at=16)),
        ("last byte of a file", "__1_0.distcp", flip_at("__1_0.distcp", -1)),
        ("a bit of the data", "__1_0.distcp", flip_at("__1_0.distcp", 40_000)),
        ("a byte too many", "__0_0.distcp", append("__0_0.distcp", b"\0")),
        ("an empty object", "__objects_0.distcp", flip_at("__objects_0.distcp", 100)),
        ("a file too many", r"__9_0\.distcp", create("__9_0.distcp")),
        ("integrity.json: hash of data", "__0_0.distcp", flip("integrity.json", '"__0_0.distcp": "', at=20)),
        ("integrity.json: a file less", "__0_0", edit_json("integrity.json", _unlist("__0_0.distcp"))),
        ("conversion.json: the source's name", r"conversion\.json", flip("conversion.json", "plain", at=1)),
        ("conversion.json is missing", r"conversion\.json", remove("conversion.json")),
        ("integrity.json is missing", r"integrity\.json", remove("integrity.json")),
    ):
        yield Case(name, Kind.checkpoint, Action.verify, names, _inside(damage))
    data = "model.safetensors"
    for name, damage in (
        ("first byte of the data", _flip_data(data, 0)),
        ("last byte of the data", flip_at(data, -1)),
        ("header's length", flip_at(data, 0)),
        ("a byte too many", append(data, b"\0")),
    ):
        yield Case(name, Kind.hf, Action.verify, data, damage)
    yield Case(
        "conversion.json: a hash",
        Kind.hf,
        Action.verify,
        EMBEDDING,
        flip("conversion.json", f'"{EMBEDDING}": [\n   [\n    0,', at=len(EMBEDDING) + 35),
    )


def _unlist(name: str) -> Callable[[Any], None]:
    def edit(values: Any) -> None:
        del values["files"][name]

    return edit


def all_cases() -> list[Case]:
    groups = (safetensors_files, tensors, configs, hashes, checkpoints, for_verify, settings)
    return [case for group in groups for case in group()]
