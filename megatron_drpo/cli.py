"""`megatron-drpo`: thin; the work is in the modules it names.

Imports nothing heavy before a command runs, so that a signal finds somebody who answers.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_drpo.errors import ConfigError, DrpoError
from megatron_drpo.runtime.process_end import (
    Terminated,
    ends_at_once_on_sigterm,
    ends_in_order_on_sigterm,
    tell_end,
)

if TYPE_CHECKING:
    from megatron_drpo.config.schema import Config

SETTINGS = "[config=FILE.yaml] [key.sub=value ...]"
_KEYS = f"""\
config=FILE.yaml names a file of settings, key.sub=value sets one and wins over the file. Every setting, with
its default and its rule: {Path(__file__).parent / "config" / "schema.py"}"""
_EPILOG = """\
On a cluster the ranks are started by its own means: torchrun ... -m megatron_drpo.train config=run.yaml

exit status: 0 done, 1 an error that the message explains, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM

example: megatron-drpo train config=examples/quickstart/rl.yaml"""
_DISTRIBUTIONS = ("megatron-drpo", "megatron-core", "torch", "transformers")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    with ends_at_once_on_sigterm("before anything was started or written"):
        try:
            _run(sys.argv[1:] if argv is None else argv)
        except DrpoError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        except SystemExit as end:  # argparse has written help or what was wrong
            return int(end.code or 0)
        except (KeyboardInterrupt, Terminated) as end:
            return tell_end(end)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Of the whole command line. A command's namespace has `run`, which takes it and the settings."""
    parser = argparse.ArgumentParser(
        prog="megatron-drpo",
        description="Reinforcement learning of mixture-of-experts language models on Megatron-Core.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show versions: of this, of what it stands on")
    commands = parser.add_subparsers(title="commands")
    _add(
        commands,
        "train",
        _train,
        "check, start the servers and the ranks, train",
        "config=run.yaml seed=1",
        _KEYS,
    )
    _add(commands, "check", _check, "check only; print the resolved configuration", "config=run.yaml", _KEYS)
    report = _add(
        commands, "report", _report, "write report.png and rollouts/index.html again", "runs/default"
    )
    report.add_argument("run_dir", metavar="RUN_DIR")
    fleet = _add(commands, "fleet", None, "rollout servers that outlive a run", "up config=run.yaml")
    _add_fleet_commands(fleet.add_subparsers(title="commands", required=True))
    return parser


def _add_fleet_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from megatron_drpo.config.schema import Config

    example = "config=run.yaml rollout.fleet.num_servers=4"
    _add(commands, "up", _fleet_up, "start the rollout servers and look after them", example, _KEYS)
    down = _add(commands, "down", _fleet_down, "end the rollout servers", "runs/default")
    down.add_argument("run_dir", metavar="RUN_DIR", help="or its fleet.json")
    what = "which servers are up, with which weights, how busy"
    status = _add(commands, "status", _fleet_status, what, "runs/default --watch")
    status.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        nargs="?",
        default=Config.run_dir,
        help="or its fleet.json; default: %(default)s",
    )
    status.add_argument("--watch", action="store_true", help="show it again each second, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--api-key-env", metavar="NAME", help="as rollout.api_key_env of the run")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, list[str]], None] | None,
    what: str,
    example: str,
    settings: str = "",
) -> argparse.ArgumentParser:
    """A command; with `settings`, the words that explain them, it takes those too."""
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}." + (f"\n\n{settings}" if settings else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.epilog = f"example: {parser.prog} {example}"
    if settings:
        parser.usage = f"%(prog)s [-h] {SETTINGS}"
    parser.set_defaults(parser=parser, run=run, takes_settings=bool(settings))
    return parser


def _run(arguments: list[str]) -> None:
    parser = build_parser()
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    options, rest = parser.parse_known_args(arguments or ["--help"])
    if options.version:
        print(_versions())
        return
    if "run" not in options:
        parser.error("a command is required, see --help")
    if rest and not options.takes_settings:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings

    ignore_expected_warnings()
    options.run(options, rest)


def _versions() -> str:
    """In one line, for a report of a fault."""
    from importlib import metadata

    found = []
    for name in _DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _load(settings: list[str]) -> Config:
    from megatron_drpo.config.io import read_config

    config, problems = read_config(settings)
    if problems:
        from megatron_drpo.launch.check import refuse_problems  # it imports torch

        refuse_problems(config, problems)
    return config


def _train(_: argparse.Namespace, settings: list[str]) -> None:
    config = _load(settings)
    from megatron_drpo.launch.supervisor import supervise  # after the configuration: it imports torch

    supervise(config)


def _check(_: argparse.Namespace, settings: list[str]) -> None:
    config = _load(settings)
    from megatron_drpo.config.io import to_yaml
    from megatron_drpo.launch.check import check_config, refuse_problems, warn_config
    from megatron_drpo.launch.resolve import resolve_config

    resolve_config(config)
    refuse_problems(config, check_config(config))
    print(to_yaml(config), end="")
    for warning in warn_config(config):
        print(f"warning: {warning}", file=sys.stderr)


def _report(options: argparse.Namespace, _: list[str]) -> None:
    if not Path(options.run_dir).is_dir():
        raise ConfigError(f"report: {options.run_dir} is no run folder")
    from megatron_drpo.metrics.report import write_report
    from megatron_drpo.metrics.rollout_dump import write_index

    with ends_in_order_on_sigterm(lambda: "the same command writes the report again"):
        print(write_report(options.run_dir))
        if (Path(options.run_dir) / "rollouts").is_dir():
            print(write_index(options.run_dir))


def _fleet_up(_: argparse.Namespace, settings: list[str]) -> None:
    from megatron_drpo.fleet.command import up

    up(_load(settings))


def _fleet_down(options: argparse.Namespace, _: list[str]) -> None:
    from megatron_drpo.fleet.command import down

    down(options.run_dir)


def _fleet_status(options: argparse.Namespace, _: list[str]) -> None:
    from megatron_drpo.fleet.status import status

    name = options.api_key_env
    key = None if name is None else os.environ.get(name)
    if name is not None and not key:
        raise ConfigError(f"--api-key-env {name}: that environment variable is not set")
    status(options.run_dir, watch=options.watch, as_json=options.json, api_key=key)


if __name__ == "__main__":
    sys.exit(main())
