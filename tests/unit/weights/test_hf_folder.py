"""HF folders: reading, checking, writing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.hf_folder import HfConfig, HfFolder, HfWriter, check_hf_folder

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.arange(8, dtype=torch.float32).reshape(2, 4),
}


def write_folder(path: Path, **shards: list[str]) -> Path:
    """An HF folder; without shards a single file, else shard name -> tensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "x", "size": 3}')
    (path / "tokenizer.json").write_text("{}")
    if not shards:
        save_file(TENSORS, path / "model.safetensors")
        return path
    weight_map: dict[str, str] = {}
    for shard, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, path / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("shards", [{}, {"one": ["a"], "two": ["b", "c"]}])
def test_reading(tmp_path: Path, shards: dict[str, list[str]]) -> None:
    folder = HfFolder(write_folder(tmp_path / "m", **shards))
    assert set(folder.keys()) == {"a", "b", "c"}
    assert folder.shape("a") == (4, 3)
    assert folder.dtype("b") == torch.bfloat16
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.get(name), tensor)
    assert torch.equal(folder.get_slice("a", slice(1, 3), slice(0, 2)), TENSORS["a"][1:3, 0:2])
    assert torch.equal(folder.get_slice("b", slice(2, 5)), TENSORS["b"][2:5])
    assert "a" in folder
    with pytest.raises(ModelError, match="no tensor 'zz'"):
        folder.get("zz")


def break_config(path: Path) -> str:
    (path / "config.json").unlink()
    return f"{path / 'config.json'}: missing"


def break_json(path: Path) -> str:
    (path / "config.json").write_text("{")
    return f"{path / 'config.json'}: not valid JSON"


def remove_shard(path: Path) -> str:
    (path / "two.safetensors").unlink()
    return f"{path / 'two.safetensors'}: shard is missing"


def truncate_data(path: Path) -> str:
    file = path / "two.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    return f"{file}: truncated: {size - 5} bytes, the header announces {size}"


def truncate_header(path: Path) -> str:
    file = path / "two.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    return f"{file}: truncated, or not a safetensors file: 20 bytes do not hold the header"


def empty_shard(path: Path) -> str:
    (path / "two.safetensors").write_bytes(b"")
    return f"{path / 'two.safetensors'}: truncated, or not a safetensors file: 0 bytes"


def append_bytes(path: Path) -> str:
    file = path / "two.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    return f"{file}: damaged"


def list_absent_tensor(path: Path) -> str:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["ghost"] = "one.safetensors"
    file.write_text(json.dumps(index))
    return f"{path / 'one.safetensors'}: tensor 'ghost' is listed in {file.name} but absent here"


def remove_weights(path: Path) -> str:
    (path / "model.safetensors.index.json").unlink()
    return f"{path}: no weights: neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.parametrize(
    "damage",
    [
        break_config,
        break_json,
        remove_shard,
        truncate_data,
        truncate_header,
        empty_shard,
        append_bytes,
        list_absent_tensor,
        remove_weights,
    ],
)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    path = write_folder(tmp_path / "m", one=["a"], two=["b", "c"])
    assert check_hf_folder(path) == []
    expected = damage(path)
    problems = check_hf_folder(path)
    assert len(problems) == 1
    assert problems[0].startswith(expected)
    with pytest.raises(ModelError) as error:
        HfFolder(path)
    assert str(error.value) == problems[0]


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m", one=["a"], two=["b", "c"])
    expected = [break_config(path), truncate_data(path)]
    assert check_hf_folder(path) == expected
    assert check_hf_folder(tmp_path / "none") == [
        f"{tmp_path / 'none'}: no such folder; give a Hugging Face model folder"
    ]


def test_typed_config() -> None:
    config = HfConfig(
        {"n": 3, "flag": False, "name": "x", "list": [1], "none": None, "in": {"k": 1}}, "c.json"
    )
    assert config.get("n", int) == 3
    assert config.get("n", float) == 3.0
    assert config.get("flag", bool) is False
    assert config.get("none", int, 7) == 7
    assert config.get_ints("list") == [1]
    assert config.get_ints("absent") == []
    assert config.section("in").get("k", int) == 1
    assert config.has("n", "name")
    assert not config.has("none")
    with pytest.raises(ModelError, match=r"c.json: 'flag' is False, expected int"):
        config.get("flag", int)
    with pytest.raises(ModelError, match=r"c.json: in: 'x' is missing"):
        config.section("in").get("x", str)


def test_one_file_when_it_fits(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    (source / "readme.md").write_text("stays behind")
    with HfWriter(tmp_path / "out", source=source, metadata={"step": "3"}) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        assert not (tmp_path / "out").exists()
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out/config.json").read_text() == (source / "config.json").read_text()
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == TENSORS.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert b'"step":"3"' in (tmp_path / "out/model.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


def test_shards_and_index(tmp_path: Path) -> None:
    """a (48 bytes) alone; b (12) and c (32) fit into 44 together."""
    source = write_folder(tmp_path / "source")
    with HfWriter(tmp_path / "out", source=source, max_shard_bytes=44) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 92},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }
    folder = HfFolder(tmp_path / "out")
    assert all(torch.equal(folder.get(name), tensor) for name, tensor in TENSORS.items())


def test_values_are_those_at_the_time_of_add(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    with HfWriter(tmp_path / "out", source=write_folder(tmp_path / "source")) as writer:
        writer.add("t", tensor)
        tensor.zero_()
        writer.add("transposed", torch.arange(6.0).reshape(2, 3).T)
    folder = HfFolder(tmp_path / "out")
    assert torch.equal(folder.get("t"), torch.ones(3))
    assert torch.equal(folder.get("transposed"), torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_config_names_the_dtype_that_was_written(tmp_path: Path) -> None:
    """An fp32 source exported in bf16 (its router in fp32) loads as bf16."""
    source = write_folder(tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "x", "dtype": "float32"}')
    with HfWriter(tmp_path / "out", source=source) as writer:
        writer.add("experts", torch.ones(64, dtype=torch.bfloat16))
        writer.add("router", torch.ones(4))
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "x", "dtype": "bfloat16"}


def write_and_fail(path: Path, source: Path) -> None:
    with HfWriter(path, source=source, overwrite=True) as writer:
        writer.add("a", TENSORS["a"])
        raise KeyboardInterrupt


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path / "out", source)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(source, source)
    assert torch.equal(HfFolder(source).get("c"), TENSORS["c"])
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source")
    out = write_folder(tmp_path / "out", one=["a"], two=["b", "c"])
    with pytest.raises(ModelError, match="exists already"), HfWriter(out, source=source):
        pass
    with HfWriter(out, source=source, overwrite=True) as writer:
        writer.add("new", torch.ones(2))
    assert list(HfFolder(out).keys()) == ["new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with HfWriter(tmp_path / "out", source=write_folder(tmp_path / "source")) as writer:
        writer.add("a", TENSORS["a"])
        with pytest.raises(ModelError, match="'a' was already written"):
            writer.add("a", TENSORS["a"])
