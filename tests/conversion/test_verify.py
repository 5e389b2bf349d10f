"""Each level of verification finds what it is for, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import verify
from conversion.layouts import parse_layout
from conversion.run import run_conversion
from conversion.to_hf import ToHf, ToHfOptions
from megatron_drpo.config.schema import ParallelConfig
from megatron_drpo.errors import ConversionError

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Exit status and output of `verify`."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        status = verify.main([*map(str, arguments), "--workers", "1"])
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return call


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_what_is_right_passes(
    run: Run, checkpoint: Callable[[str], Path], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    status, output = run(checkpoint("moe"), "--hf", hf_model("moe"))
    assert (status, "failed" in output) == (0, False)
    assert f"135 compared with {hf_model('moe')}" in output
    run_conversion(ToHf(checkpoint("moe"), None, ToHfOptions()), tmp_path / "hf", num_workers=1)
    assert run(tmp_path / "hf")[0] == 0


def test_a_flipped_bit_of_a_weight(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Both hashes see it; the tensor is named."""
    shutil.copytree(checkpoint("moe"), tmp_path / "copy")
    flip(tmp_path / "copy" / "release" / "__0_0.distcp", 300_000)
    status, output = run(tmp_path / "copy")
    assert status == 1
    assert "__0_0.distcp: SHA-256 differs" in output
    assert "2 problems" in output
    assert "tensor 'model.layers." in output


def test_a_flipped_bit_that_no_reader_looks_at(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of torch's archives: no reader looks at it, only the file's hash shows it."""
    shutil.copytree(checkpoint("moe"), tmp_path / "copy")
    file = tmp_path / "copy" / "release" / "__0_0.distcp"
    flip(file, file.read_bytes().index(b"FB") + 10)
    status, output = run(tmp_path / "copy")
    assert status == 1
    assert "1 problems" in output
    assert "SHA-256 differs" in output


def test_files_of_a_checkpoint_that_no_conversion_made(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As a run's own: hashes of files, none of tensors."""
    shutil.copytree(checkpoint("moe"), tmp_path / "copy")
    folder = tmp_path / "copy" / "release"
    (folder / "conversion.json").unlink()
    listed = json.loads((folder / "integrity.json").read_text())
    del listed["files"]["conversion.json"]
    (folder / "integrity.json").write_text(json.dumps(listed))
    status, output = run(tmp_path / "copy")
    assert (status, "files, SHA-256" in output) == (0, True)
    flip(folder / "__0_0.distcp", 300_000)
    status, output = run(tmp_path / "copy")
    assert status == 1
    assert "1 problems" in output
    assert "__0_0.distcp: SHA-256 differs" in output


def test_another_folder(
    run: Run, checkpoint: Callable[[str], Path], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """One value of the HF folder is another."""
    shutil.copytree(hf_model("moe"), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][1, 2] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    status, output = run(checkpoint("moe"), "--hf", tmp_path / "hf")
    assert status == 1
    assert "1 problems" in output
    assert "'model.layers.2.mlp.experts.3.up_proj.weight', rows from 0 on: differs from" in output


def test_another_folder_with_a_head_of_its_own(
    run: Run, checkpoint: Callable[[str], Path], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Beside tied embeddings; nothing in the checkpoint corresponds to it."""
    shutil.copytree(hf_model("qwen2_tied"), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    status, output = run(checkpoint("qwen2_tied"), "--hf", tmp_path / "hf")
    assert status == 1
    assert "'lm_head.weight'" in output


def test_a_converted_hf_folder(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    run_conversion(ToHf(checkpoint("moe"), None, ToHfOptions()), tmp_path / "hf", num_workers=1)
    file = tmp_path / "hf" / "model.safetensors"
    flip(file, file.stat().st_size - 1)
    status, output = run(tmp_path / "hf")
    assert status == 1
    assert "tensor 'lm_head.weight', rows 0 to 100: their hash is not the one in conversion.json" in output


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_other_files(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path, file: str) -> None:
    """In both formats."""
    shutil.copytree(checkpoint("dense"), tmp_path / "megatron")
    run_conversion(ToHf(tmp_path / "megatron", None, ToHfOptions()), tmp_path / "hf", num_workers=1)
    for path, folder in [("megatron", "megatron/release/hf"), ("hf", "hf")]:
        changed = tmp_path / folder / file
        changed.write_text(changed.read_text() + " ")
        status, output = run(tmp_path / path)
        assert status == 1
        assert f"{changed}: its hash is not the one in conversion.json" in output


def test_hashes_that_are_missing(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    run_conversion(ToHf(checkpoint("dense"), None, ToHfOptions()), tmp_path / "hf", num_workers=1)
    file = tmp_path / "hf" / "conversion.json"
    values = json.loads(file.read_text())
    del values["hashes"]["model.norm.weight"]
    file.write_text(json.dumps(values))
    status, output = run(tmp_path / "hf")
    assert status == 1
    assert "conversion.json" in output
    assert "'model.norm.weight'" in output


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_megatron(run: Run, checkpoint: Callable[[str], Path]) -> None:
    """All levels; what does not fit the model is skipped, not failed."""
    status, output = run(checkpoint("moe"), "--level", "4", "--layouts", "tp2pp2ep2", "tp3")
    assert status == 0, output
    words = " ".join(output.split())
    for line in ("ok Megatron's loader", "ok model on tp2pp2ep2", "ok logits on tp2pp2ep2"):
        assert line in words
    assert "skipped model on tp3: parallel.tensor_parallel_size=3 must divide" in words
    assert "same top-1 100.0%" in words


def test_layouts_are_parsed() -> None:
    assert parse_layout("tp2pp3", is_moe=False) == ParallelConfig(
        tensor_parallel_size=2, pipeline_parallel_size=3
    )
    assert parse_layout("tp2pp2ep4", is_moe=True) == ParallelConfig(
        tensor_parallel_size=2,
        sequence_parallel=True,
        pipeline_parallel_size=2,
        expert_parallel_size=4,
        data_parallel_size=2,
    )
    assert parse_layout("tp2", is_moe=True).expert_tensor_parallel_size == 2
    with pytest.raises(ConversionError, match="'tp' is no layout"):
        parse_layout("tp", is_moe=False)


def test_logits_that_differ_fail() -> None:
    report = verify.Report()
    expected = torch.randn(4, 9)
    verify._compare_logits("logits on tp2", expected + 2e-3, expected, report)
    assert len(report.problems) == 1
    verify._compare_logits("logits on tp2", expected * torch.nan, expected, report)
    assert len(report.problems) == 2
    verify._compare_logits("logits on tp2", expected + 1e-4, expected, report)
    assert len(report.problems) == 2


def test_nothing_to_compare_with(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Success would say too much."""
    shutil.copytree(checkpoint("dense"), tmp_path / "copy")
    for name in ("conversion.json", "integrity.json"):
        (tmp_path / "copy" / "release" / name).unlink()
    status, output = run(tmp_path / "copy")
    assert status == 1
    assert "nothing was compared: it has no hashes; give a folder with weights as --hf" in output
