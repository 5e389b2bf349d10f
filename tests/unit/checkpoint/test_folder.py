"""Which checkpoint is in force, and whose it is. tests/unit/test_checkpoint.py kills saves."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.checkpoint.folder import CheckpointFolder, RunState, read_run_state
from megatron_drpo.config.schema import CheckpointConfig
from megatron_drpo.errors import CheckpointError


def folder_of(run_dir: Path, **fields: Any) -> CheckpointFolder:
    return CheckpointFolder(str(run_dir), CheckpointConfig(**fields))


def put(run_dir: Path, step: int, **fields: Any) -> Path:
    """A checkpoint without tensors, of a run that starts or goes on in this folder."""
    run = folder_of(run_dir, **fields)
    run.claim()
    partial, final = run.folder / f".partial_{step}", run.folder / f"step_{step:06d}"
    partial.mkdir()
    (partial / "run_state.json").write_text(json.dumps(asdict(RunState(step=step, run_id=run.run_id))))
    run.publish(partial, final)
    return final


def test_own_checkpoints_are_recognised_however_the_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CheckpointFolder("run", CheckpointConfig()).is_own(
        tmp_path / "run" / "checkpoints" / "step_000002"
    )
    assert CheckpointFolder(str(tmp_path / "run"), CheckpointConfig()).is_own(
        Path("run/checkpoints/step_000002")
    )


def test_without_latest_the_newest_of_the_runs_own_checkpoints_is_in_force(tmp_path: Path) -> None:
    """Later ones of an earlier run in the folder are not the run's own."""
    put(tmp_path, 9)
    put(tmp_path, 3, resume=False)
    newest = put(tmp_path, 4)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert folder_of(tmp_path, load_path="elsewhere").locate() == newest
    assert not (tmp_path / "checkpoints" / "latest").exists(), "a look changes nothing"
    folder_of(tmp_path).adopt(newest)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000004\n"


def set_run_id(path: Path, run_id: str | None) -> None:
    file = path / "run_state.json"
    values = json.loads(file.read_text())
    values |= {"run_id": run_id}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_checkpoints_of_others_and_unreadable_ones_are_refused(tmp_path: Path) -> None:
    path, other = put(tmp_path, 1), put(tmp_path, 2)
    pointer = path.parent / "latest"
    for run_id in ("other", None):
        for each in (path, other):
            set_run_id(each, run_id)
        assert folder_of(tmp_path).locate() == other, "latest says so, as in runs from before ids"
        pointer.unlink()
        owner = "another run" if run_id else "a run without an id"
        with pytest.raises(CheckpointError) as error:
            folder_of(tmp_path).locate()
        assert str(error.value) == (
            f"{pointer} is missing: {path} is of {owner}; {other} is of {owner}. To continue from one of "
            f"step_000001, step_000002, write its name into {pointer}. To start over, take another run_dir, "
            "or checkpoint.resume=false, which replaces these"
        )
        assert folder_of(tmp_path, resume=False).locate() is None
        pointer.write_text("step_000002\n")
    set_run_id(path, (path.parent / "run_id").read_text().strip())
    (other / "run_state.json").write_bytes(b"\xff")
    pointer.unlink()
    with pytest.raises(CheckpointError, match=r"run_state\.json cannot be read: .+ one of step_000001"):
        folder_of(tmp_path).locate()
    shutil.rmtree(other)
    assert folder_of(tmp_path).locate() == path


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"../step_000002", b"step_000003", b"x" * 5000])
def test_latest_that_names_nothing(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, 2)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_bytes(content)
    expected = "latest does not name a checkpoint|step_000003 is not a complete checkpoint, though .+latest"
    with pytest.raises(CheckpointError, match=rf"({expected}).+ from one of step_000002, write its name"):
        folder_of(tmp_path).locate()
    pointer.unlink()
    pointer.mkdir()
    with pytest.raises(CheckpointError, match="latest does not name a checkpoint"):
        folder_of(tmp_path).locate()


def test_a_run_has_one_id_until_it_starts_over(tmp_path: Path) -> None:
    ids = []
    for resume in (True, True, False, True):
        path = put(tmp_path, 1, resume=resume)
        ids.append(read_run_state(path).run_id)
        assert ids[-1] + "\n" == (path.parent / "run_id").read_text()
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"run_state\.json cannot be read"),
        ("[]", r"run_state\.json cannot be read"),
        ("{}", r"run_state\.json cannot be read: 'format_version'"),
        ('{"format_version": 1, "colour": 2}', r"run_state\.json cannot be read: .+'colour'"),
        ('{"format_version": 99, "colour": 2}', "format version 99, this program reads 1"),
        ('{"format_version": 1, "files": 3}', r"run_state\.json cannot be read: 'files' is 3"),
    ],
)
def test_a_run_state_of_another_kind_is_a_checkpoint_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_run_state(tmp_path)


def test_the_way_back_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    paths = [put(tmp_path / "run", step, keep_last=9) for step in (3, 20, 1_000_000)]
    here, there = folder_of(tmp_path / "run"), folder_of(tmp_path / "other")
    assert here.way_back(paths[0]) == "There is no older checkpoint beside it"
    assert here.way_back(paths[2]) == (
        "To go back to an older checkpoint (step_000003, step_000020), write step_000020 into "
        f"{tmp_path}/run/checkpoints/latest and start the run again"
    )
    (paths[2].parent / "latest").write_text("step_000020\n")
    assert here.locate() == paths[1]
    assert there.way_back(paths[1]) == (
        f"To go back to an older checkpoint (step_000003), set checkpoint.load_path={paths[0]}"
    )
