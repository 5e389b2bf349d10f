"""`megatron-drpo`: thin; the work is in the modules it names."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_drpo.config_io import load_config, to_yaml
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


def _train(arguments: list[str]) -> None:
    config = load_config(arguments)
    from megatron_drpo.supervisor import supervise  # after the configuration: it imports torch

    supervise(config)


def _check(arguments: list[str]) -> None:
    config = load_config(arguments)
    from megatron_drpo.check import check_config, warn_config

    problems = check_config(config)
    if problems:
        raise ConfigError(*problems)
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
    from megatron_drpo.rollout import fleet_command

    if command == "up":
        fleet_command.up(load_config(rest))
    elif command == "down" and len(rest) == 1:
        fleet_command.down(rest[0])
    else:
        raise ConfigError(f"fleet {' '.join(arguments)}: expected fleet up [...] or fleet down RUN_DIR")


if __name__ == "__main__":
    sys.exit(main())
