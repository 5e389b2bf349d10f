"""Proof that a conversion refuses what is wrong: `python tools/corrupt_conversion.py`.

Folders and checkpoints of a tiny model are damaged in one way each, or the target cannot be written. Every
conversion or verification must then end with an exit status other than 0 and a message that names the file or
the tensor, without a traceback, and TARGET must not exist.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conversion import hf_to_megatron, megatron_to_hf, verify
from megatron_drpo.weights.hf_folder import HfFolder, HfWriter
from tools.corruption_case import Action, Case, Kind
from tools.corruptions import RELEASE, all_cases
from tools.tiny_model import write_tiny_moe

COMMANDS: dict[Action, Callable[[str, str], int]] = {
    Action.to_megatron: lambda source, target: hf_to_megatron.main([source, target, *OPTIONS]),
    Action.to_hf: lambda source, target: megatron_to_hf.main([source, target, *OPTIONS]),
    Action.verify: lambda source, target: verify.main([source, "--workers", "2"]),
}
OPTIONS = ("--workers", "2", "--unit-mib", "1")
TIMEOUT_S = 60.0
SHARD_BYTES = 600_000


class Originals:
    """One undamaged folder of every kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tiny = folder / "tiny"
        write_tiny_moe(tiny, num_layers=2, expert_size=256)
        weights = HfFolder(tiny)
        with HfWriter(self[Kind.plain_hf], source=tiny, max_shard_bytes=SHARD_BYTES) as writer:
            for name in weights:
                writer.add(name, weights.get(name).bfloat16())
        checkpoint, plain = self[Kind.checkpoint], self[Kind.plain_checkpoint]
        _convert(Action.to_megatron, self[Kind.plain_hf], checkpoint, folder / "log")
        _convert(Action.to_hf, checkpoint, self[Kind.hf], folder / "log")
        shutil.copytree(checkpoint, plain)
        for name in ("conversion.json", "integrity.json"):
            (plain / RELEASE / name).unlink()

    def __getitem__(self, kind: Kind) -> Path:
        return self._folder / kind.name


@dataclass(frozen=True)
class Outcome:
    """What a conversion of damaged input did."""

    case: Case
    message: str
    problems: tuple[str, ...]


def try_case(case: Case, originals: Originals, folder: Path) -> Outcome:
    """Damage a copy, convert it, and see.

    Args:
        folder: an empty one for this case; it stays as the conversion left it.
    """
    source, target = folder / "source", folder / "out" / "target"
    shutil.copytree(originals[case.kind], source)
    case.damage(source)
    existed = case.name == "target exists"
    status, output = run(case.action, source, target, folder / "log", lambda: case.setting(source, target))
    problems = [] if status not in (0, None) else [f"exit status {status}"]
    if "Traceback" in output:
        problems.append("traceback")
    names = case.names.replace("TARGET_FOLDER", re.escape(str(target.parent)))
    names = names.replace("TARGET", re.escape(str(target))).replace("SOURCE", re.escape(str(source)))
    lines = [line for line in output.splitlines() if re.match(r"\w+Error: |/.*;|disk: ", line)]
    if not re.search(names, output.partition("Error: ")[2] or output, re.DOTALL):
        problems.append(f"does not name {case.names}")
    if target.exists() and (not existed or any(target.iterdir())):
        problems.append("there is a target")
    if Path("executed").exists():
        problems.append("a command was executed")
    message = (lines or output.splitlines() or ["nothing"])[-1]
    return Outcome(case, message.replace(f"{folder}/", ""), tuple(problems))


def run(
    action: Action, source: Path, target: Path, log: Path, setting: Callable[[], None]
) -> tuple[int | None, str]:
    """Convert in a process of its own, which costs no import; exit status (None: killed) and output."""
    process = multiprocessing.get_context("fork").Process(
        target=_run_main, args=(action, source, target, log, setting)
    )
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return None, f"no end in {TIMEOUT_S:g} s"
    return process.exitcode, log.read_text(errors="replace")


def _run_main(action: Action, source: Path, target: Path, log: Path, setting: Callable[[], None]) -> None:
    stream = log.open("w", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    setting()
    sys.exit(COMMANDS[action](str(source), str(target)))


def _convert(action: Action, source: Path, target: Path, log: Path) -> None:
    status, output = run(action, source, target, log, lambda: None)
    if status != 0:
        raise RuntimeError(f"the undamaged conversion failed: {output}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose names match this regular expression")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if re.search(arguments.only, str(case))]
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table("input", "corruption", "action", "message", "")
    num_failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        originals = Originals(folder)
        for number, case in enumerate(cases):
            (folder / str(number)).mkdir()
            outcome = try_case(case, originals, folder / str(number))
            num_failed += bool(outcome.problems)
            verdict = f"[red]{'; '.join(outcome.problems)}[/]" if outcome.problems else "[green]ok[/]"
            console.print(f"[dim]{number + 1} of {len(cases)}: {case}[/] {verdict}")
            table.add_row(case.kind, case.name, case.action, outcome.message, verdict)
    console.print(table)
    console.print(f"{len(cases)} cases, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
