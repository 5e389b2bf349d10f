"""Every key over every example with values that nobody means: `check` says no or yes, and nothing else.

    python tools/fuzz_config.py                    # all of over 60,000 cases: about an hour and a half
    python tools/fuzz_config.py --sample 1000 --seed 7
    python tools/fuzz_config.py --only optimizer.lr

A case is one key, in a file or on the command line, over an example whose model and data are replaced by tiny
ones. It holds if `megatron-drpo check` ends within 10 s with a ConfigError, or accepts the value and prints a
configuration that loads to the same. A number that is NaN, infinite, negative or has 23 digits is never
accepted. Exit status 1 if a case does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_drpo import cli
from megatron_drpo.config.io import declared_types, load_config, to_yaml
from megatron_drpo.config.limits import cut
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings
from tools.tiny_model import write_tiny_moe

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
TIME_LIMIT_S = 10.0
PROGRESS_S = 10.0

ABSURD_NUMBERS = [".nan", ".inf", "-.inf", "-1", "-1.5", "-1e22", "1e22", "1" + "0" * 22, "1" + "0" * 400]
VALUES = [
    *ABSURD_NUMBERS,
    *("0", "0.0", "1", "1.5", "7", "1e-30", "1e308", "1e999", "1" * 5000, "0x" + "f" * 5000, "1_000", "0o17"),
    *("true", "false", "yes", "null", "~", "", "''", "' '", "text", "2026-01-01", "1:30", "<<: *a"),
    *("[]", "{}", "[1, 2]", "[1.5, .nan]", "[[1]]", "[null]", "[text]", "{a: 1}", "{a: {b: [1]}}", "[" * 400),
    *('"\\0"', '"\\ud83d"', '"a\\nb"', '"\\x85\\u2028"', "ü✓日本", "'\U0001f600'", "'\u202e'", "'a: b # c'"),
    *("x" * 256, "x" * 5000, "x/" * 3000, "ü" * 200, "y" * 200_000),
    *("~/x", "~nobody_at_all/x", "..", "/", "/dev/null", "examples", "examples/README.md", "-", "--help"),
    *(
        "${run_dir}",
        "${nowhere}",
        "${run_dir",
        "${oc.env:NOT_SET}",
        "???",
        "!!python/name:os.system",
        "&a [*a]",
    ),
    *("http://", "http://[", "http://h:99999", "'h:1'", "[http://h:1, ftp://h]", "auto", "none"),
    *("json:loads", "json:nothing", "nowhere:f", "a:b:c", ":", "os:", "examples.second_try:ask", "..:f"),
]
"""As they stand in a YAML file or after `key=`."""


@dataclass(frozen=True)
class Case:
    example: Path
    key: str
    value: str
    in_file: bool

    def __str__(self) -> str:
        where = "in a file" if self.in_file else "on the command line"
        return f"{self.example.relative_to(ROOT)} with {self.key}: {cut(self.value)} {where}"


def all_cases() -> list[Case]:
    """In a fixed order; each value comes in a file with one example and on the command line with the next."""
    places = itertools.cycle([True, False])
    keys = ["base", *declared_types()]
    return [Case(*combination, next(places)) for combination in itertools.product(EXAMPLES, keys, VALUES)]


def choose_cases(num_cases: int, seed: int) -> list[Case]:
    """A random sample of all cases."""
    cases = all_cases()
    return random.Random(seed).sample(cases, min(num_cases, len(cases)))


class Fuzzer:
    """Runs cases in this process; its folder has a tiny model, data and the files of the latest case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ignore_expected_warnings()
        model, data = folder / "model", folder / "data.jsonl"
        write_tiny_moe(model, hidden_size=32, num_key_value_heads=4)  # the largest layout has 4 tensor ranks
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 32768}))
        (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        data.write_text('{"prompt": "1+1=", "answer": "2", "response": "2"}\n')
        self._site = {
            "run_dir": str(folder / "run"),
            "platform": "cpu",
            "policy": {"model_path": str(model)},
            "data": {"train_path": str(data), "eval_path": str(data)},
        }
        for example in EXAMPLES:  # as they are; and what is imported at first takes longer than a case may
            status, _, errors = self._check(self._write_site(example))
            if status != 0:
                raise RuntimeError(f"{example}: {errors}")

    def run(self, case: Case) -> tuple[bool, str | None]:
        """Whether the value was accepted, and what does not hold, if anything."""
        arguments = self._write_site(case.example)
        if case.in_file:
            *sections, name = case.key.split(".")
            lines = [*(f"{section}:" for section in sections), f"{name}: {case.value}"]
            text = "".join(f"{'  ' * depth}{line}\n" for depth, line in enumerate(lines))
            base = "" if case.key == "base" else f"base: {self._folder / 'site.yaml'}\n"
            (self._folder / "case.yaml").write_text(base + text)
            arguments = [f"config={self._folder / 'case.yaml'}"]
        else:
            arguments.append(f"{case.key}={case.value}")
        try:
            with _time_limit():
                status, output, errors = self._check(arguments)
        except BaseException as error:  # whatever it is, it does not hold
            if isinstance(error, KeyboardInterrupt):
                raise
            return False, traceback.format_exc(limit=-3)
        return status == 0, self._judge(case, status, output, errors)

    def _write_site(self, example: Path) -> list[str]:
        site = self._folder / "site.yaml"
        site.write_text(json.dumps({"base": str(example), **self._site}))
        return [f"config={site}"]

    def _check(self, arguments: list[str]) -> tuple[int, str, str]:
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = cli.main(["check", *arguments])
        return status, output.getvalue(), errors.getvalue()

    def _judge(self, case: Case, status: int, output: str, errors: str) -> str | None:
        if status == 1:
            return None if errors.startswith("ConfigError: ") else f"another error: {cut(errors)}"
        if status != 0:
            return f"exit status {status}"
        declared = declared_types().get(case.key)
        if case.value in ABSURD_NUMBERS and {int, float} & {declared, *get_args(declared)}:
            return "an absurd number is accepted"
        resolved = self._folder / "resolved.yaml"
        resolved.write_text(output)
        try:
            again = to_yaml(load_config([f"config={resolved}"]))
        except Exception:  # noqa: BLE001  whatever it is, it is a finding
            return f"what check prints does not load: {traceback.format_exc(limit=-1)}"
        return None if again == output else "what check prints loads to something else"


class _TooLongError(BaseException):
    """The time limit of a case; no handler of exceptions catches it."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise _TooLongError(f"over {TIME_LIMIT_S:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    remaining = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *remaining)
        signal.signal(signal.SIGALRM, previous)


def _describe(results: Counter[str], num_broken: int, seconds: float, total: int) -> str:
    done = results.total()
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(results.items()))
    left = seconds / done * (total - done)
    return f"{done:,} of {total:,} cases: {counts}, {num_broken} broken; {seconds:.0f} s, {left:.0f} s left"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose description contains it")
    options = parser.parse_args()
    cases = all_cases() if options.sample is None else choose_cases(options.sample, options.seed)
    cases = [case for case in cases if options.only in str(case)]
    results: Counter[str] = Counter()
    num_broken = 0
    start = told = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for case in cases:
            accepted, problem = fuzzer.run(case)
            results["accepted" if accepted else "refused"] += 1
            if problem is not None:
                num_broken += 1
                print(f"{case}\n  {problem}", flush=True)
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                print(_describe(results, num_broken, told - start, len(cases)), flush=True)
    if cases:
        print(_describe(results, num_broken, time.monotonic() - start, len(cases)))
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
