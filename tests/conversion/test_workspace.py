"""The unfinished output of a conversion: what is continued, what is refused, and who may write."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from conversion.workspace import Workspace
from megatron_drpo.errors import ConversionError

WHAT = {"files": {"x": 1}}


def fill(target: Path, text: str, **options: Any) -> None:
    """A whole conversion of one file."""
    with Workspace(target, WHAT, 1, **options) as workspace:
        if not workspace.is_published:
            (workspace.content / "file").write_text(text)
            workspace.record(0, {"num_bytes": 1})
        workspace.publish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Stands for a kill: nothing may handle it."""


def test_units_that_are_done_stay_done(tmp_path: Path) -> None:
    with Workspace(tmp_path / "x", WHAT, 10) as workspace:
        workspace.record(0, {"num_bytes": 4})
        workspace.record(2, {"num_bytes": 5})
    with (tmp_path / ".x.converting.jsonl").open("a") as journal:
        journal.write('{"unit":1,"num_by')  # as a kill cuts it off
    with Workspace(tmp_path / "x", WHAT, 10) as workspace:
        assert workspace.done == {0: {"num_bytes": 4}, 2: {"num_bytes": 5}}
        assert workspace.num_bytes_done == 9
        workspace.publish()
    assert names(tmp_path) == ["x"]


def test_another_conversion_is_not_continued(tmp_path: Path) -> None:
    with Workspace(tmp_path / "x", WHAT, 1):
        pass
    other = {"files": {"x": 2}}
    with pytest.raises(ConversionError, match="other options"):
        Workspace(tmp_path / "x", other, 1).__enter__()
    with Workspace(tmp_path / "x", other, 1, restart=True) as workspace:
        assert workspace.done == {}


def test_an_old_target_is_not_taken_for_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it replaced the target; then somebody removed the hidden folder to make room."""
    fill(tmp_path / "x", "old")

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("conversion.workspace.flush_folder", kill)
        with pytest.raises(Killed):
            fill(tmp_path / "x", "new", overwrite=True)
    shutil.rmtree(tmp_path / ".x.converting")
    fill(tmp_path / "x", "new", overwrite=True)
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_killed_after_it_got_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tidying up is left to do."""

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("conversion.workspace.replaced_path", kill)
        with pytest.raises(Killed):
            fill(tmp_path / "x", "first")
    assert (tmp_path / "x" / "file").read_text() == "first"
    fill(tmp_path / "x", "second")
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert names(tmp_path) == ["x"]


def test_one_after_the_other(tmp_path: Path) -> None:
    """A second one waits for the first, which then removes the journal that it waits for."""
    begun, errors = threading.Event(), list[str]()

    def second() -> None:
        begun.wait()
        try:
            fill(tmp_path / "x", "second", overwrite=True)
        except ConversionError as error:
            errors.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    with Workspace(tmp_path / "x", WHAT, 1) as workspace:
        (workspace.content / "file").write_text("first")
        begun.set()
        thread.join(0.5)
        assert thread.is_alive()
        workspace.publish()
    thread.join(20)
    assert errors == []
    assert (tmp_path / "x" / "file").read_text() == "second"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_targets_that_are_no_folders(tmp_path: Path, overwrite: bool) -> None:
    """Refused before any work, with --overwrite too."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, kind in [("file", "a file"), ("link", "a link"), ("dangling", "a link")]:
        with pytest.raises(ConversionError, match=f"{name} is {kind}, not a folder"):
            fill(tmp_path / name, "new", overwrite=overwrite)
    assert names(tmp_path) == ["dangling", "file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"\0\0\n", b"[1]\n"])
def test_a_damaged_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".x.converting").mkdir()
    (tmp_path / ".x.converting.jsonl").write_bytes(content)
    with pytest.raises(ConversionError, match="damaged: discard the unfinished conversion with --restart"):
        fill(tmp_path / "x", "new")
    fill(tmp_path / "x", "new", restart=True)
    assert names(tmp_path) == ["x"]


def test_the_current_folder_as_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConversionError, match=r"/here: exists already"):
        fill(Path(), "new")


def test_a_disk_that_is_too_full(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "x", WHAT, 10**18)
    with pytest.raises(ConversionError, match=r"GB are needed, .* GB are free"):
        workspace.__enter__()
