"""Convert a Hugging Face folder into a Megatron torch_dist checkpoint: no GPU, little memory, resumable.

    python -m conversion.hf_to_megatron models/Qwen3-30B-A3B checkpoints/qwen3-30b

Whatever interrupts it, the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conversion.command import (
    DTYPES,
    add_run_arguments,
    build_parser,
    positive,
    print_done,
    print_plan,
    run_command,
)
from conversion.plan import Unit
from conversion.to_megatron import RELEASE, ToMegatron, ToMegatronOptions
from conversion.torch_dist_writer import data_file_name
from conversion.workers import run_units
from conversion.workspace import Workspace
from megatron_drpo.models.places import KeyLayout


def convert(
    source: Path,
    target: Path,
    options: ToMegatronOptions,
    *,
    num_workers: int = 2,
    overwrite: bool = False,
    restart: bool = False,
) -> None:
    """Convert one folder, or go on with it.

    Raises:
        DrpoError: says what is wrong, where, and how to go on.
    """
    conversion = ToMegatron(source, options)
    conversion.check_tied_copy()
    with Workspace(
        target,
        conversion.description(),
        conversion.num_bytes,
        sources=[source],
        overwrite=overwrite,
        restart=restart,
    ) as workspace:
        if not workspace.is_published:
            _fill(workspace, conversion, num_workers, title=f"{source} -> {target}")
        workspace.publish()


def _fill(workspace: Workspace, conversion: ToMegatron, num_workers: int, *, title: str) -> None:
    folder = workspace.content / RELEASE
    folder.mkdir(exist_ok=True)

    def work(unit: Unit, count: Callable[[int], None]) -> dict[str, Any]:
        return conversion.work(unit, folder / data_file_name(unit.index), count)

    run_units(conversion.units, work, workspace, num_workers=num_workers, title=title)
    conversion.finish(workspace)
    workspace.check_unchanged(conversion.description())


def main(argv: Sequence[str] | None = None) -> int:
    """Of the command line; the exit status."""
    parser = build_parser(__doc__)
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("target", type=Path, help="folder to create")
    parser.add_argument(
        "--layout", type=KeyLayout, choices=list(KeyLayout), help="of keys; default: Megatron's own"
    )
    parser.add_argument(
        "--vocab-multiple",
        type=positive,
        default=128,
        help="pad the vocabulary to a multiple; Megatron-LM wants 128 x its tensor parallel size",
    )
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    options = ToMegatronOptions(
        layout=arguments.layout,
        dtype=DTYPES.get(arguments.dtype),
        vocab_multiple=arguments.vocab_multiple,
        unit_bytes=arguments.unit_mib * 2**20,
    )

    def action() -> None:
        if arguments.dry_run:
            print_plan(ToMegatron(arguments.source, options), arguments.source, arguments.target)
            return
        convert(
            arguments.source,
            arguments.target,
            options,
            num_workers=arguments.workers,
            overwrite=arguments.overwrite,
            restart=arguments.restart,
        )
        print_done(arguments.target)

    return run_command(action, is_resumable=True)


if __name__ == "__main__":
    sys.exit(main())
