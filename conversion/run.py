"""Runs a conversion of either direction: workspace, workers, publication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from conversion.plan import Unit
from conversion.workers import run_units
from conversion.workspace import Workspace
from megatron_drpo.models.base import ArchitectureConfig


class Conversion(Protocol):
    """A planned conversion: `ToMegatron` or `ToHf`."""

    @property
    def arch(self) -> ArchitectureConfig: ...
    @property
    def units(self) -> Sequence[Unit]: ...
    @property
    def sources(self) -> Sequence[Path]:
        """Folders that are read."""
        ...

    @property
    def output_bytes(self) -> int:
        """Of all that is written, small files aside."""
        ...

    def summary(self) -> list[tuple[str, str]]:
        """Lines of the printed plan: what and its value."""
        ...

    def description(self) -> dict[str, Any]:
        """What makes two conversions the same: the input's files and the options."""
        ...

    def prepare(self, content: Path) -> None:
        """What must be in the output folder before the first unit; harmless if it is there."""
        ...

    def work(self, unit: Unit, content: Path, count: Callable[[int], None]) -> dict[str, Any]:
        """Write one unit; returns its record for the journal."""
        ...

    def finish(self, workspace: Workspace) -> None:
        """All that is not weights, once every unit is done."""
        ...


def run_conversion(
    conversion: Conversion,
    target: Path,
    *,
    num_workers: int = 2,
    overwrite: bool = False,
    restart: bool = False,
) -> None:
    """Do a conversion, or go on with it.

    Args:
        target: the folder to create.
        overwrite: an existing target is replaced, at the end.
        restart: discard an unfinished conversion to this target.

    Raises:
        DrpoError: says what is wrong, where, and how to go on.
    """
    with Workspace(
        target,
        conversion.description(),
        conversion.output_bytes,
        sources=conversion.sources,
        overwrite=overwrite,
        restart=restart,
    ) as workspace:
        if not workspace.is_published:
            conversion.prepare(workspace.content)

            def work(unit: Unit, count: Callable[[int], None]) -> dict[str, Any]:
                return conversion.work(unit, workspace.content, count)

            title = f"{conversion.sources[0]} -> {target}"
            run_units(conversion.units, work, workspace, num_workers=num_workers, title=title)
            conversion.finish(workspace)
            workspace.check_unchanged(conversion.description())
        workspace.publish()
