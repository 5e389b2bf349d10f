"""`megatron-drpo`: thin; the work is in the modules it names."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_drpo.config import Config
from megatron_drpo.config_io import read_config, to_yaml
from megatron_drpo.errors import ConfigError, DrpoError
from megatron_drpo.upstream_warnings import ignore_expected_warnings

USAGE = """\
megatron-drpo: reinforcement learning of mixture-of-experts language models on Megatron-Core

usage:
  megatron-drpo train  [config=run.yaml] [key.sub=value ...]   check, start the server and the ranks, train
  megatron-drpo check  [config=run.yaml] [key.sub=value ...]   check only; print the resolved configuration
  megatron-drpo report RUN_DIR                                 write report.png and rollouts/index.html again
  megatron-drpo fleet up [config=run.yaml] [key.sub=value ...] start the rollout servers and look after them
  megatron-drpo fleet down RUN_DIR                             end them
  megatron-drpo fleet status [RUN_DIR] [--watch] [--json]      which are up, with which weights, how busy

On a cluster the ranks are started by its own means: torchrun ... -m megatron_drpo.train config=run.yaml
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    commands = {"train": _train, "check": _check, "report": _report, "fleet": _fleet}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command = commands.get(arguments[0])
    if command is None:
        print(f"unknown command {arguments[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    ignore_expected_warnings()
    try:
        command(arguments[1:])
    except DrpoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _load(arguments: list[str]) -> Config:
    config, problems = read_config(arguments)
    if problems:
        from megatron_drpo.check import refuse_problems  # it imports torch

        refuse_problems(config, problems)
    return config


def _train(arguments: list[str]) -> None:
    config = _load(arguments)
    from megatron_drpo.supervisor import supervise  # after the configuration: it imports torch

    supervise(config)


def _check(arguments: list[str]) -> None:
    config = _load(arguments)
    from megatron_drpo.check import check_config, refuse_problems, warn_config

    refuse_problems(config, check_config(config))
    print(to_yaml(config), end="")
    for warning in warn_config(config):
        print(f"warning: {warning}", file=sys.stderr)


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise ConfigError("report: expected one run folder")
    from megatron_drpo.metrics.report import write_report
    from megatron_drpo.metrics.rollout_dump import write_index

    print(write_report(arguments[0]))
    if (Path(arguments[0]) / "rollouts").is_dir():
        print(write_index(arguments[0]))


def _fleet(arguments: list[str]) -> None:
    command, *rest = arguments or [""]
    commands = {"up": _fleet_up, "down": _fleet_down, "status": _fleet_status}
    if command not in commands:
        raise ConfigError(f"fleet {command}: expected fleet up, fleet down or fleet status")
    commands[command](rest)


def _fleet_up(arguments: list[str]) -> None:
    from megatron_drpo.rollout import fleet_command

    fleet_command.up(_load(arguments))


def _fleet_down(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ConfigError("fleet down: expected one run folder, or a fleet.json")
    from megatron_drpo.rollout import fleet_command

    fleet_command.down(arguments[0])


def _fleet_status(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="megatron-drpo fleet status")
    parser.add_argument(
        "run_dir", nargs="?", default=Config.run_dir, help="or its fleet.json; default: %(default)s"
    )
    parser.add_argument("--watch", action="store_true", help="show it again each second, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--api-key-env", metavar="NAME", help="as rollout.api_key_env of the run")
    options = parser.parse_args(arguments)
    from megatron_drpo.rollout import fleet_status

    name = options.api_key_env
    key = None if name is None else os.environ.get(name)
    if name is not None and not key:
        raise ConfigError(f"--api-key-env {name}: that environment variable is not set")
    fleet_status.status(options.run_dir, watch=options.watch, as_json=options.json, api_key=key)


if __name__ == "__main__":
    sys.exit(main())
