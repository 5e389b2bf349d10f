"""Killed with SIGKILL before any one change of the disk, a conversion goes on to the same bytes."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from conversion import hf_to_megatron, megatron_to_hf
from tools.corrupt_conversion import OPTIONS, Originals
from tools.corruption_case import Action, Kind
from tools.crash_points import CrashPoint

MAINS = {Action.to_megatron: hf_to_megatron.main, Action.to_hf: megatron_to_hf.main}
SOURCES = {Action.to_megatron: Kind.plain_hf, Action.to_hf: Kind.checkpoint}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def convert(action: Action, source: Path, target: Path, options: list[str], crash: int, where: str) -> int:
    """In a process of its own; its exit status, negative if it was killed."""

    def run() -> None:
        if crash:
            CrashPoint(crash, target.parent, in_children=where == "worker")
        raise SystemExit(MAINS[action]([str(source), str(target), *OPTIONS, *options]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize(
    ("where", "overwrite"), [("parent", False), ("parent", True), ("worker", False)], ids=str
)
@pytest.mark.parametrize("action", list(SOURCES))
def test_every_crash_point(
    action: Action, where: str, overwrite: bool, originals: Originals, tmp_path: Path
) -> None:
    source = originals[SOURCES[action]]
    options = ["--overwrite"] if overwrite else []
    assert convert(action, source, tmp_path / "undisturbed", options, 0, where) == 0
    expected = file_hashes(tmp_path / "undisturbed")
    crash, status = 0, -1
    while status != 0:
        crash += 1
        target = tmp_path / f"crash_{crash}" / "target"
        target.parent.mkdir()
        if overwrite:
            target.mkdir()
            (target / "old").write_text("old")
        status = convert(action, source, target, options, crash, where)
        assert status in (0, 1 if where == "worker" else -signal.SIGKILL)
        if target.exists() and not (target / "old").exists():
            assert file_hashes(target) == expected, f"half a target before change {crash}"
        if status != 0:
            assert convert(action, source, target, options, 0, where) == 0, f"before change {crash}"
        assert file_hashes(target) == expected, f"before change {crash}"
        assert [path.name for path in target.parent.iterdir()] == ["target"], f"before change {crash}"
        shutil.rmtree(target.parent)
    assert crash > (1 if where == "worker" else 12), "hardly any change was seen"
