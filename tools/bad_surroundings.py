"""Conversions of good input that cannot succeed: the target, the disk, a source that changes meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conversion import run, workspace
from tools.corruption_case import Action, Case, Kind, Setting
from tools.damage import limit_file_size, obey_permissions


def _parent_is_a_file(source: Path, target: Path) -> None:
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    target.parent.write_text("")


def _parent_is_read_only(source: Path, target: Path) -> None:
    target.parent.mkdir()
    target.parent.chmod(0o555)
    obey_permissions()


def _target_exists(source: Path, target: Path) -> None:
    target.mkdir(parents=True)


def _other_conversion_unfinished(source: Path, target: Path) -> None:
    content = target.parent / f".{target.name}.converting"
    content.mkdir(parents=True)
    content.with_suffix(".converting.jsonl").write_text('{"conversion":"another"}\n')


def _disk_is_full(source: Path, target: Path) -> None:
    limit_file_size(100_000)


def _disk_is_small(source: Path, target: Path) -> None:
    usage = shutil.disk_usage(source)._replace(free=1000)
    workspace.shutil.disk_usage = lambda path: usage  # type: ignore[assignment]


def _around_the_units(before: Callable[[Path], None], after: Callable[[Path], None]) -> Setting:
    """Something happens to the source between the plan and the units, or between them and the end."""

    def setting(source: Path, target: Path) -> None:
        run_units = run.run_units

        def around(*arguments: Any, **options: Any) -> None:
            before(source)
            run_units(*arguments, **options)
            after(source)

        run.run_units = around

    return setting


def _nothing(source: Path) -> None:
    return None


def _touch_weights(source: Path) -> None:
    for file in (*source.rglob("*.safetensors"), *source.rglob("*.distcp")):
        os.utime(file, ns=(0, 0))


def _vanish(source: Path) -> None:
    shutil.rmtree(source)


def _fill_disk(source: Path) -> None:
    limit_file_size(10_000)


# Name, what the message must name (of the target TARGET, of the source SOURCE), what happens.
_SETTINGS: tuple[tuple[str, str, Setting], ...] = (
    ("target exists", "TARGET: exists already", _target_exists),
    ("target below a file", "TARGET_FOLDER", _parent_is_a_file),
    ("target's folder is read-only", "TARGET_FOLDER", _parent_is_read_only),
    ("target has another unfinished conversion", "TARGET_FOLDER.*unfinished", _other_conversion_unfinished),
    ("disk is too small", "TARGET_FOLDER.*GB are needed", _disk_is_small),
    ("disk is full", "TARGET_FOLDER.*(File too large|No space)", _disk_is_full),
    ("disk is full at the end", "TARGET_FOLDER.*File too large", _around_the_units(_nothing, _fill_disk)),
    ("source vanishes", "SOURCE", _around_the_units(_vanish, _nothing)),
    ("source vanishes at the end", "SOURCE|TARGET_FOLDER", _around_the_units(_nothing, _vanish)),
    ("source is written to meanwhile", "TARGET.*input changed", _around_the_units(_touch_weights, _nothing)),
)


def settings() -> Iterator[Case]:
    for kind, action in ((Kind.plain_hf, Action.to_megatron), (Kind.checkpoint, Action.to_hf)):
        for name, names, setting in _SETTINGS:
            yield Case(name, kind, action, names, setting=setting)
