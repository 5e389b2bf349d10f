"""A second output matrix beside tied embeddings: an equal copy, or an error that names both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_drpo.errors import ModelError
from megatron_drpo.weights import tied_head
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.tied_head import check_tied_head

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def folder_of(path: Path, tensors: dict[str, torch.Tensor], *, tied: bool = True) -> HfFolder:
    """Every tensor in a file of its own."""
    path.mkdir(exist_ok=True)
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({"filler": torch.zeros(3), name: tensors[name].clone()}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return HfFolder(path)


@pytest.mark.parametrize("chunk", [1, 8, 35, 2**22])
@pytest.mark.parametrize("position", [0, 7, 34])
def test_one_value_that_differs_anywhere_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, position: int
) -> None:
    monkeypatch.setattr(tied_head, "_CHUNK_ELEMENTS", chunk)
    folder = folder_of(tmp_path, {EMBEDDING: WEIGHT, HEAD: WEIGHT})
    assert check_tied_head(folder) == HEAD
    other = WEIGHT.clone()
    other.view(-1)[position] = other.view(-1)[position].nextafter(torch.tensor(9.0))
    with pytest.raises(ModelError, match="is not"):
        check_tied_head(folder_of(tmp_path, {EMBEDDING: WEIGHT, HEAD: other}))


def test_the_message_names_both_tensors_their_files_and_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        check_tied_head(folder_of(tmp_path, {EMBEDDING: WEIGHT, HEAD: -WEIGHT}))
    assert str(error.value) == (
        f"{tmp_path}: config.json says tie_word_embeddings, but 'lm_head.weight' (in "
        f"{tmp_path}/model-1.safetensors) is not 'model.embed_tokens.weight' (in "
        f"{tmp_path}/model-0.safetensors). If the model has an output matrix of its own, set "
        "\"tie_word_embeddings\": false in config.json; if not, remove 'lm_head.weight' from its file"
    )


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        (WEIGHT.bfloat16(), WEIGHT.bfloat16().float()),
        (torch.full((2, 2), torch.nan), torch.full((2, 2), torch.nan)),
        (torch.zeros(2, 2), -torch.zeros(2, 2)),
    ],
)
def test_equal_values(tmp_path: Path, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """Of another dtype, NaN in both, zeros of either sign."""
    assert check_tied_head(folder_of(tmp_path, {EMBEDDING: embedding, HEAD: head})) == HEAD


@pytest.mark.parametrize("head", [WEIGHT.bfloat16(), WEIGHT[:6], WEIGHT.T.contiguous()])
def test_rounded_values_and_other_shapes_are_another_matrix(tmp_path: Path, head: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="is not"):
        check_tied_head(folder_of(tmp_path, {EMBEDDING: WEIGHT, HEAD: head}))


def test_folders_without_a_copy(tmp_path: Path) -> None:
    assert check_tied_head(folder_of(tmp_path / "one", {EMBEDDING: WEIGHT})) is None
    assert check_tied_head(folder_of(tmp_path / "head", {HEAD: WEIGHT})) is None
    untied = folder_of(tmp_path / "untied", {EMBEDDING: WEIGHT, HEAD: -WEIGHT}, tied=False)
    assert check_tied_head(untied) is None
