"""Which checkpoint a folder means."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.torch_dist import find_checkpoint


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "metadata.json").touch()
    return folder


def test_the_folder_itself(tmp_path: Path) -> None:
    assert find_checkpoint(checkpoint(tmp_path / "step_000003")) == tmp_path / "step_000003"


@pytest.mark.parametrize(("tracker", "name"), [("release", "release"), ("30\n", "iter_0000030")])
def test_megatron_lm(tmp_path: Path, tracker: str, name: str) -> None:
    checkpoint(tmp_path / name)
    checkpoint(tmp_path / "iter_0000020")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert find_checkpoint(tmp_path) == tmp_path / name


@pytest.mark.parametrize("given", ["", "checkpoints"])
def test_run_of_the_trainer(tmp_path: Path, given: str) -> None:
    checkpoint(tmp_path / "checkpoints" / "step_000004")
    (tmp_path / "checkpoints" / "latest").write_text("step_000004\n")
    assert find_checkpoint(tmp_path / given) == tmp_path / "checkpoints" / "step_000004"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"", b"\n", b"x" * 5000, b"/etc", b"step\x00", "step_\u0661".encode()]
)
@pytest.mark.parametrize("file", ["latest", "latest_checkpointed_iteration.txt"])
def test_a_pointer_that_is_no_name(tmp_path: Path, file: str, content: bytes) -> None:
    checkpoint(tmp_path / "release")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file} does not name a checkpoint"):
        find_checkpoint(tmp_path)


def test_no_checkpoint_or_an_incomplete_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"\.metadata and metadata\.json missing"):
        find_checkpoint(tmp_path)
    (checkpoint(tmp_path / "release") / ".metadata").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match=r"release: not a complete .* \.metadata missing"):
        find_checkpoint(tmp_path)
