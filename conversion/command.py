"""What the command-line tools share: arguments, the printed plan, errors as messages."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conversion.plan import UNIT_BYTES
from conversion.run import Conversion, run_conversion
from megatron_drpo.errors import DrpoError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.runtime.process_end import Terminated, ends_in_order_on_sigterm, tell_end
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's own text."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How to run a conversion, whatever its direction."""
    parser.add_argument("--dtype", choices=DTYPES, help="cast every weight; default: keep what is stored")
    parser.add_argument(
        "--workers",
        type=positive,
        default=min(4, 2 * (os.cpu_count() or 1)),  # they wait for the disk half of the time
        help="processes; default: %(default)s",
    )
    parser.add_argument(
        "--unit-mib",
        type=positive,
        default=UNIT_BYTES // 2**20,
        help="that a worker does in one go: what an interruption loses; default: %(default)s",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET, once all is written")
    parser.add_argument("--restart", action="store_true", help="discard an unfinished conversion to TARGET")


def positive(text: str) -> int:
    """An argument's value that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run_command(action: Callable[[], None], *, is_resumable: bool) -> int:
    """Run it; the exit status. Errors of ours and of the disk are one message.

    Args:
        is_resumable: the command may be repeated after an interruption.
    """
    ignore_expected_warnings()
    hint = "the same command goes on from here" if is_resumable else ""
    try:
        with ends_in_order_on_sigterm(lambda: hint):
            action()
    except DrpoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(
            "; ".join(filter(None, [f"{error.filename or 'disk'}: {error.strerror}", hint])), file=sys.stderr
        )
        return 1
    except (KeyboardInterrupt, Terminated) as error:
        return tell_end(error)
    return 0


def convert_or_plan(conversion: Conversion, arguments: argparse.Namespace) -> None:
    """What a conversion's command does, with the arguments of `add_run_arguments`."""
    target: Path = arguments.target
    if arguments.dry_run:
        print_plan(conversion, arguments.source, target)
        return
    run_conversion(
        conversion,
        target,
        num_workers=arguments.workers,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    print(f"{target} is complete; to check it: python -m conversion.verify {shlex.quote(str(target))}")


def print_plan(conversion: Conversion, source: Path, target: Path) -> None:
    """What a conversion would do, with sizes."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for name, value in [
        ("from", str(source)),
        ("to", str(target)),
        ("model", describe(conversion.arch)),
        *conversion.summary(),
    ]:
        table.add_row(f"[dim]{name}[/]", escape(value))
    console.print(table)
    units = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("unit", "pieces", "GB", "from", "to"):
        units.add_column(column, justify="right" if column in ("unit", "pieces", "GB") else "left")
    for unit in conversion.units:
        first, last = unit.pieces[0].name, unit.pieces[-1].name
        units.add_row(
            str(unit.index), str(len(unit.pieces)), f"{unit.num_bytes / 1e9:.3f}", short(first), short(last)
        )
    console.print(units)


def short(name: object) -> str:
    """A Megatron name without its quotes."""
    return str(name).replace("'", "").replace("decoder.layers.", "")


def describe(arch: ArchitectureConfig) -> str:
    """An architecture in one line."""
    text = f"{arch.num_layers} layers, hidden size {arch.hidden_size}, vocabulary {arch.vocab_size}"
    if arch.moe is not None:
        num_moe = sum(arch.moe.is_moe_layer)
        text += f", {arch.moe.num_experts} experts in {num_moe} layers"
    return text + (", tied embeddings" if arch.tie_word_embeddings else "")
