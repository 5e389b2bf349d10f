"""All that only a GPU can show, on a bare machine with one, in under 8 minutes: one table.

    python tools/gpu_proof.py               # needs a GPU; results in runs/gpu_proof/
    python tools/gpu_proof.py --dry-run     # everything that needs no GPU, on a CPU
    python tools/gpu_proof.py --parts model triton

The parts run one after the other, each in a process of its own under a time limit: one that fails is
reported, and the next one runs. A part whose packages are missing is skipped, and says what to install. Exit
status 1 if a part failed.

What the machine needs: this checkout and its test extra (`pip install -e '.[test]'`, which brings
megatron-core), a CUDA build of torch, and for the parts on layers Transformer Engine. Its core library is a
wheel. Its torch binding is built from source against the torch that is installed, which takes minutes, a C++
compiler and CUDA's headers, once:

    pip install transformer-engine-cu13==2.11.0          # or -cu12: as torch.version.cuda says
    pip install --no-build-isolation transformer-engine-torch==2.11.0
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S = 470.0
"""Of all parts together."""
PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "transformers", "sglang")

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")
TRAIN = (sys.executable, "-m", "megatron_drpo.cli", "train")
# A GPU run compiles the kernels. On a CPU an interpreter stands for Triton's, and to compile is slow.
_ON_A_CPU = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Part:
    """One command and what it shows."""

    name: str
    shows: str
    command: tuple[str, ...]
    dry_command: tuple[str, ...]
    """The nearest to it that needs no GPU."""
    modules: tuple[str, ...] = ("megatron.core",)
    """What must be importable; a dry run has its own stand-in for Transformer Engine."""
    limit_s: float = 120.0


@dataclass(frozen=True)
class Result:
    """How a part ended."""

    part: Part
    status: str
    """ok, FAILED, skipped."""
    detail: str
    seconds: float = 0.0


def build_parts(folder: Path, *, is_dry: bool) -> list[Part]:
    """In the order in which they run: what is quick and most telling first."""
    train = (*TRAIN, *_train_arguments(folder, "cpu" if is_dry else "cuda"))
    small = ("--num-tokens=64", "--vocab-size=512", "--hidden-size=64", "--repeats=1", "--tensor-size=1")
    kernels, stand_in = "tests/unit/policy/kernels", "tests/unit/platform/te_cpu"
    return [
        Part(
            "layers",
            "Transformer Engine's layers, attention, functions and optimizer against the CPU's stand-in",
            (*PYTEST, "-m", "gpu", "tests/gpu/test_transformer_engine.py"),
            (*PYTEST, f"{stand_in}/test_rope.py", f"{stand_in}/test_permutation.py"),
            modules=("megatron.core", "transformer_engine"),
        ),
        Part(
            "model",
            "the same model's logprobs, loss and gradient norm as on a CPU; repeatable; memory of a step",
            (*PYTEST, "-m", "gpu", "tests/gpu/test_model.py"),
            (*PYTEST, "tests/unit/policy/test_model.py", "-k", "both_kinds or asked_for"),
            modules=("megatron.core", "transformer_engine"),
            limit_s=240.0,
        ),
        Part(
            "triton",
            "the Triton kernels of the logprob op against torch",
            (*PYTEST, "-m", "gpu", kernels),
            (*PYTEST, f"{kernels}/test_triton_rows.py", "-k", "cpu", "-x"),
            modules=("triton",),
        ),
        Part(
            "ipc",
            "weights by CUDA IPC to a second process; memory let go of and taken back",
            (*PYTEST, "-m", "gpu", "tests/unit/weight_sync", "tests/unit/policy/test_offload.py"),
            (*PYTEST, "tests/unit/weight_sync/test_wire.py"),
        ),
        Part(
            "logprobs",
            "time of the LM head with its loss beside other libraries'",
            (
                sys.executable,
                "tools/bench_logprobs.py",
                "--repeats=3",
                f"--markdown={folder / 'logprobs.md'}",
            ),
            (sys.executable, "tools/bench_logprobs.py", *small, f"--markdown={folder / 'logprobs.md'}"),
            modules=(),
        ),
        Part(
            "train",
            "two steps of a tiny mixture-of-experts model, sampled, trained, synced and saved",
            (*train, "policy.dtype=bf16"),
            (*train, "policy.dtype=fp32"),
        ),
    ]


def _train_arguments(folder: Path, platform_name: str) -> Iterator[str]:
    yield f"policy.model_path={folder / 'model'}"
    yield f"run_dir={folder / 'train'}"
    yield f"platform={platform_name}"
    yield "data.train_path=examples/data/arithmetic_train.jsonl"
    yield "reward.name=tools.digit_reward:digit_share"
    sizes = {"num_prompts_per_step": 8, "num_samples_per_prompt": 4, "max_response_tokens": 8}
    yield from (f"rollout.{name}={value}" for name, value in sizes.items())
    yield from ("train.num_steps=2", "checkpoint.save_every_steps=2", "checkpoint.resume=false")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: what needs no GPU")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu_proof")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    parts = build_parts(folder, is_dry=options.dry_run)
    unknown = set(options.parts or ()) - {part.name for part in parts}
    if unknown:
        parser.error(f"no part {sorted(unknown)}; there are {', '.join(part.name for part in parts)}")
    hardware = describe_hardware()
    if hardware is None and not options.dry_run:
        parser.error("torch sees no GPU here; --dry-run runs what needs none")
    chosen = [part for part in parts if options.parts is None or part.name in options.parts]
    console = Console(highlight=False)
    results: list[Result] = []
    deadline = time.monotonic() + TIME_LIMIT_S
    for part in chosen:
        console.print(f"[dim]{part.name}:[/] {part.shows} ...", soft_wrap=True)
        remaining = deadline - time.monotonic()
        results.append(run_part(part, folder, remaining, is_dry=options.dry_run))
    machine = [hardware or f"no GPU, {platform.machine()} CPU, {os.cpu_count()} cores", *versions()]
    report(console, results, machine, folder, is_dry=options.dry_run)
    return 1 if any(result.status == "FAILED" for result in results) else 0


def run_part(part: Part, folder: Path, remaining_s: float, *, is_dry: bool) -> Result:
    """Run it, its output into `folder`/NAME.log."""
    missing = [name for name in part.modules if not _is_there(name, is_dry=is_dry)]
    if missing:
        return Result(part, "skipped", f"not installed: {', '.join(missing)}; see --help")
    if remaining_s < 10:
        return Result(part, "skipped", "no time left")
    if part.name == "train":
        _write_model(folder / "model")
    started = time.monotonic()
    log = folder / f"{part.name}.log"
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= _ON_A_CPU if is_dry else {}
    limit = min(part.limit_s, remaining_s)
    with log.open("w") as output:
        try:
            done = subprocess.run(
                part.dry_command if is_dry else part.command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ | {"PYTHONPATH": str(ROOT)},
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Result(part, "FAILED", f"not done after {limit:.0f} s, see {log.name}", limit)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        return Result(part, "FAILED", f"exit status {done.returncode}, see {log.name}", seconds)
    return Result(part, "ok", _find_detail(part, folder, log.read_text()), seconds)


def _find_detail(part: Part, folder: Path, output: str) -> str:
    """The figure that a part ends with."""
    if part.name == "train":
        lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        names = ("time/step_s", "mismatch/first_update_logprob_abs_mean", "optimizer/grad_norm")
        return ", ".join(f"{name} {last[name]:.3g}" for name in names if name in last)
    if part.name == "logprobs":
        return f"table in {folder.name}/logprobs.md"
    lines = [line for line in output.splitlines() if " passed" in line or " skipped" in line]
    return lines[-1].strip("= ") if lines else ""


def _write_model(folder: Path) -> None:
    from tools.tiny_model import write_tiny_moe

    if not (folder / "config.json").exists():
        write_tiny_moe(folder)


def _is_there(module: str, *, is_dry: bool) -> bool:
    if module == "transformer_engine" and is_dry:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def describe_hardware() -> str | None:
    """Name, memory and driver of the GPU, and torch's CUDA; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{properties.name}, {memory}, CUDA {torch.version.cuda}, NCCL {nccl}"


def versions() -> Iterator[str]:
    """Of Python and of the packages that matter."""
    yield f"Python {platform.python_version()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"


def report(
    console: Console, results: list[Result], machine: list[str], folder: Path, *, is_dry: bool
) -> None:
    """The table, on the terminal and as `table.md`."""
    table = Table(title="GPU proof, dry run on a CPU" if is_dry else "GPU proof")
    for heading in ("part", "what it shows", "status", "s", "detail"):
        table.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    colors = {"ok": "green", "FAILED": "red", "skipped": "yellow"}
    rows = []
    for result in results:
        row = [result.part.name, result.part.shows, result.status, f"{result.seconds:.0f}", result.detail]
        rows.append(row)
        table.add_row(*row[:2], f"[{colors[result.status]}]{result.status}[/]", *row[3:])
    console.print(table)
    console.print(f"[dim]{'; '.join(machine)}[/]", soft_wrap=True)
    lines = ["| part | what it shows | status | s | detail |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    (folder / "table.md").write_text("\n".join([*lines, "", f"{'; '.join(machine)}.", ""]))
    console.print(f"logs and table.md in {folder}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
