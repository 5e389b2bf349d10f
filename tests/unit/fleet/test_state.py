"""What the trainer tells the owner of a fleet."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_drpo.fleet.state import announce_update, read_updates, update_file


def test_updates_are_announced_by_server(tmp_path: Path) -> None:
    """A later word on a server replaces the earlier one; what is long over is forgotten."""
    path, now = tmp_path / "fleet.json", time.time()
    assert read_updates(path) == {}
    announce_update(path, ["http://a", "http://b"], now + 60)
    announce_update(path, ["http://b"], now)
    announce_update(path, ["http://c"], now - 4000)
    announce_update(path, [], now)
    assert read_updates(path) == {"http://a": now + 60, "http://b": now}


@pytest.mark.parametrize("text", ["", "[1]", '{"http://a": "soon"}', '{"http://a": null}', "\xff"])
def test_a_word_that_is_not_ours_is_none(tmp_path: Path, text: str) -> None:
    update_file(tmp_path / "fleet.json").write_bytes(text.encode("latin-1"))
    assert read_updates(tmp_path / "fleet.json") == {}
