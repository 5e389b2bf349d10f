"""Verify a converted checkpoint: by hashes, by Megatron's own loader, in a model, by its logits.

    python -m conversion.verify checkpoints/qwen3-30b                      hashes of files and tensors
    python -m conversion.verify checkpoints/qwen3-30b --hf models/Qwen3    ... and equal to that folder
    python -m conversion.verify checkpoints/small --level 4 --layouts tp2 pp2ep2

Levels 1 and 2 hold a few gigabytes at most. Levels 3 and 4 hold the whole model, level 4 twice in fp32. PATH
may also be a Hugging Face folder that megatron_to_hf made: its hashes are checked.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from conversion.check_hashes import check_files, check_hf_folder, check_tensors
from conversion.command import build_parser, positive, run_command
from conversion.hf_source import HfSource
from conversion.layouts import parse_layout
from conversion.manifest import find_manifest
from conversion.run import run_conversion
from conversion.to_hf import ToHf, ToHfOptions
from megatron_drpo.config.schema import ParallelConfig
from megatron_drpo.errors import CheckpointError, ConversionError
from megatron_drpo.weights.hf_folder import INDEX_FILE, SINGLE_FILE, HfFolder
from megatron_drpo.weights.integrity import read_integrity
from megatron_drpo.weights.tied_head import check_tied_head

LOGIT_TOLERANCE = 1e-3
_SEQUENCE_LENGTHS = (5, 33, 17)


class Report:
    """Prints one line per check, and remembers what failed."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.num_checks = 0
        self._console = Console(highlight=False)

    def add(self, what: str, problems: list[str], detail: str = "") -> None:
        mark = "[red]failed [/]" if problems else "[green]ok     [/]"
        self.num_checks += 1
        self._print(f"{mark} {escape(what)}" + (f": [dim]{escape(detail)}[/]" if detail else ""))
        self.problems += problems

    def skip(self, what: str, why: str) -> None:
        self._print(f"[yellow]skipped[/] {escape(what)}: [dim]{escape(why)}[/]")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)  # a path that is cut cannot be copied


def verify_checkpoint(
    path: Path,
    config_folder: Path | None,
    *,
    level: int,
    layouts: Sequence[str],
    num_workers: int,
    report: Report,
) -> None:
    """All checks up to a level.

    Raises:
        DrpoError: it is no checkpoint at all, or does not fit the config.
    """
    checkpoint = ToHf(path, config_folder, ToHfOptions())
    parallels = {layout: parse_layout(layout, is_moe=checkpoint.arch.moe is not None) for layout in layouts}
    manifest = find_manifest(checkpoint.reader.path)
    if manifest is None and read_integrity(checkpoint.reader.path) is None:
        report.skip("hashes", "this checkpoint has none")
    else:
        report.add("files, SHA-256", check_files(checkpoint.reader.path, num_workers=num_workers))
    source = _open_source(checkpoint, config_folder)
    if manifest is not None or source is not None:
        problems = check_tensors(checkpoint, manifest, source, num_workers=num_workers)
        compared = "hashes" if source is None else f"{source.folder.path}"
        report.add("tensors", problems, f"{len(checkpoint.mapping.hf_shapes)} compared with {compared}")
    if level >= 2:
        _verify_in_megatron(checkpoint, level, parallels, report)


def _open_source(checkpoint: ToHf, config_folder: Path | None) -> HfSource | None:
    if config_folder is None or not any(
        (config_folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)
    ):
        return None
    folder = HfFolder(config_folder)
    source = HfSource(folder, checkpoint.mapping, None)
    check_tied_head(folder)
    return source


def _verify_in_megatron(
    checkpoint: ToHf, level: int, layouts: dict[str, ParallelConfig], report: Report
) -> None:
    from conversion.check_megatron import compare_with_loader, compare_with_model
    from conversion.ranks import run_ranks
    from megatron_drpo.policy.parallel import check_layout

    place = (checkpoint.reader.path, checkpoint.config_folder)
    report.add("Megatron's loader", run_ranks(compare_with_loader, 1, *place))
    if level == 2:
        return
    fitting: dict[str, ParallelConfig] = {}
    for layout, parallel in layouts.items():
        problems = [*parallel.problems("parallel."), *check_layout(parallel, checkpoint.arch)]
        if problems:
            report.skip(f"model on {layout}", "; ".join(problems))
            continue
        fitting[layout] = parallel
        report.add(f"model on {layout}", run_ranks(compare_with_model, parallel.world_size, *place, parallel))
    if level == 4:
        _verify_logits(checkpoint, fitting, report)


def _verify_logits(checkpoint: ToHf, layouts: dict[str, ParallelConfig], report: Report) -> None:
    """fp32 logits of random tokens against transformers, which reads the checkpoint exported to a folder."""
    from conversion.check_megatron import compute_logits
    from conversion.ranks import run_ranks

    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(0, checkpoint.arch.vocab_size, (length,), generator=generator)
        for length in _SEQUENCE_LENGTHS
    ]
    place = (checkpoint.reader.path, checkpoint.config_folder)
    with tempfile.TemporaryDirectory(dir=checkpoint.reader.path.parent) as scratch:
        exported, file = Path(scratch) / "hf", Path(scratch) / "logits"
        run_conversion(checkpoint, exported)
        expected = run_ranks(transformers_logits, 1, exported, sequences)
        for layout, parallel in layouts.items():
            run_ranks(compute_logits, parallel.world_size, *place, parallel, sequences, file)
            _compare_logits(f"logits on {layout}", torch.load(file, weights_only=True), expected, report)


def _compare_logits(what: str, found: torch.Tensor, expected: torch.Tensor, report: Report) -> None:
    worst = (found - expected).abs().max().item()
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    top1 = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    detail = f"max |d| {worst:.1e}, max KL {divergence.sum(-1).max().item():.1e}, same top-1 {top1:.1%}"
    is_bad = not worst <= LOGIT_TOLERANCE
    report.add(what, [f"{what}: {detail}; allowed: {LOGIT_TOLERANCE}"] if is_bad else [], detail)


@torch.no_grad()
def transformers_logits(folder: Path, sequences: list[torch.Tensor]) -> torch.Tensor:
    """[T, V] fp32 logits of the sequences, one after the other."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(sequence[None]).logits[0] for sequence in sequences])


def _is_hf_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Of the command line; the exit status: 1 if anything differs."""
    parser = build_parser(__doc__)
    parser.add_argument("path", type=Path, help="torch_dist checkpoint, or a converted Hugging Face folder")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="its model; weights there are compared too")
    parser.add_argument(
        "--level",
        type=int,
        choices=range(1, 5),
        default=1,
        help="1 hashes, 2 Megatron's loader, 3 in a model, 4 logits against transformers; each includes the "
        "ones before; default: %(default)s",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["tp1", "tp2", "pp2", "ep2"],
        help="for levels 3 and 4; default: %(default)s",
    )
    parser.add_argument("--workers", type=positive, default=min(4, os.cpu_count() or 1), help="processes")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _verify(arguments), is_resumable=False)


def _verify(arguments: argparse.Namespace) -> None:
    report = Report()
    if _is_hf_folder(arguments.path):
        if arguments.level > 1 or arguments.hf is not None:
            raise ConversionError(f"{arguments.path} is a Hugging Face folder: only level 1, without --hf")
        report.add("tensors", check_hf_folder(arguments.path, num_workers=arguments.workers))
    else:
        verify_checkpoint(
            arguments.path,
            arguments.hf,
            level=arguments.level,
            layouts=arguments.layouts,
            num_workers=arguments.workers,
            report=report,
        )
    if report.num_checks == 0:
        raise CheckpointError(
            f"{arguments.path}: nothing was compared: it has no hashes; give a folder with weights as --hf, "
            "or --level 2"
        )
    if report.problems:
        shown = report.problems[:20]
        if len(report.problems) > len(shown):
            shown.append(f"and {len(report.problems) - len(shown)} more")
        raise CheckpointError("\n  ".join([f"{len(report.problems)} problems:", *shown]))


if __name__ == "__main__":
    sys.exit(main())
