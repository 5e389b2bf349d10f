"""Commands, exit statuses, and that messages go where they belong."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from megatron_drpo import cli
from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import WeightSyncPath
from megatron_drpo.errors import RankError
from megatron_drpo.fleet import status as fleet_status
from megatron_drpo.launch import supervisor
from megatron_drpo.launch.resolve import resolve_config
from megatron_drpo.runtime.process_end import Terminated

GOLDEN_KEYS = Path(__file__).parents[1] / "golden" / "config_keys.txt"


@pytest.fixture
def arguments(hf_model: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """Of a run that can start."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return [
        f"policy.model_path={hf_model('moe')}",
        f"data.train_path={prompts}",
        f"run_dir={tmp_path / 'run'}",
        "reward.name=exact_match",
    ]


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """ "fleet up" -> its parser, of every command."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found[name] = inner
                found |= {f"{name} {below}": parser for below, parser in commands(inner).items()}
    return found


COMMANDS = commands(cli.build_parser())


def test_the_commands() -> None:
    assert list(COMMANDS) == ["train", "check", "report", "fleet", "fleet up", "fleet down", "fleet status"]


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["--help"]])
def test_help_of_all(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for command, parser in COMMANDS.items():
        if " " not in command:
            assert f"    {command} " in output.out
            assert parser.description is not None


@pytest.mark.parametrize("form", ["{} --help", "{} -h", "help {}", "{} seed=1 --help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each(capsys: pytest.CaptureFixture[str], command: str, form: str) -> None:
    """What it does, and one example that its own parser takes, with settings that exist."""
    if "=" in form and not COMMANDS[command].get_default("takes_settings"):
        return
    assert cli.main(form.format(command).split()) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.startswith(f"usage: megatron-drpo {command} ")
    (example,) = re.findall(rf"^example: megatron-drpo {command} (.*)$", output.out, re.MULTILINE)
    options, settings = cli.build_parser().parse_known_args([*command.split(), *example.split()])
    assert options.takes_settings or not settings
    known = {line.split(" = ")[0] for line in GOLDEN_KEYS.read_text().splitlines()}
    assert {setting.partition("=")[0] for setting in settings} <= known | {"config"}


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert re.match(r"megatron-drpo \d+\.\d+\.\d+, megatron-core [\d.]+, torch ", shown)
    assert f", torch {metadata.version('torch')}, " in shown
    monkeypatch.setattr(cli, "_DISTRIBUTIONS", ("no-such-distribution",))  # as in an export
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("no-such-distribution not installed, Python ")


def test_help_imports_nothing_heavy() -> None:
    """Nor does the module itself, which must be ready to answer a signal at once."""
    program = (
        "import sys; from megatron_drpo import cli; early = set(sys.modules); cli.main(['train', '--help']); "
        "print({'omegaconf', 'yaml', 'rich'} & early, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set() set()\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "megatron-drpo: error: argument {train,check,report,fleet}: invalid choice: 'trian'"),
        (["--wach"], "megatron-drpo: error: a command is required"),
        (["report"], "megatron-drpo report: error: the following arguments are required: RUN_DIR"),
        (["report", "a", "b"], "megatron-drpo report: error: unrecognized arguments: b"),
        (["fleet"], "megatron-drpo fleet: error: the following arguments are required: {up,down,status}"),
        (["fleet", "stop"], "megatron-drpo fleet: error: argument {up,down,status}: invalid choice: 'stop'"),
        (["fleet", "down"], "megatron-drpo fleet down: error: the following arguments are required: RUN_DIR"),
        (["fleet", "status", "--wach"], "megatron-drpo fleet status: error: unrecognized arguments: --wach"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert cli.main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: megatron-drpo ")
    assert message in output.err


def test_an_option_among_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--seed=1"]) == 1
    assert capsys.readouterr().err == (
        "ConfigError: argument '--seed=1': expected key.sub=value, for example train.num_steps=10\n"
    )


def test_check_prints_the_resolved_configuration(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    assert cli.main(["check", *arguments, "train.num_steps=7"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    (tmp_path / "resolved.yaml").write_text(output.out)
    resolved = load_config([f"config={tmp_path / 'resolved.yaml'}"])
    assert resolved.weight_sync.path is not WeightSyncPath.auto
    expected = load_config([*arguments, "train.num_steps=7"])
    resolve_config(expected)
    assert resolved == expected
    assert not (tmp_path / "run").exists()


def test_check_warns_on_stderr(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(["check", *arguments, "algorithm.loss.delta=2", "rollout.top_p=0.9"]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: algorithm.loss.delta=2.0: ")
    assert warnings[1].startswith("warning: rollout.top_p=0.9: ")


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("data.train_path=gone.jsonl", "gone.jsonl"),
        ("train.num_steps=0", "train.num_steps=0"),
        ("sede=1", "sede"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0"),
    ],
)
def test_warnings_come_with_problems(
    capsys: pytest.CaptureFixture[str], arguments: list[str], command: str, broken: str, named: str
) -> None:
    """Whether it is a file that is wrong, a number, a name, or two keys together."""
    assert cli.main([command, *arguments, "algorithm.loss.delta=2", broken]) == 1
    problem, warning = capsys.readouterr().err.splitlines()
    assert problem.startswith("ConfigError: ")
    assert named in problem
    assert warning.startswith("warning: algorithm.loss.delta=2.0: ")


def test_check_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(["check", *arguments, "algorithm.loss.name=none"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("ConfigError: algorithm.loss.name=none: unknown loss")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RankError("rank 1 stopped"), 1, "RankError: rank 1 stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(signal.SIGTERM), 143, "ended by SIGTERM\n"),
        (Terminated(signal.SIGHUP), 129, "ended by SIGHUP\n"),
        (None, 0, ""),
    ],
)
def test_exit_status_of_train(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: BaseException | None,
    status: int,
    message: str,
) -> None:
    def supervise(_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(supervisor, "supervise", supervise)
    assert cli.main(["train", *arguments]) == status
    assert capsys.readouterr().err == message


def test_report_wants_a_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "nowhere"]) == 1
    assert capsys.readouterr().err == "ConfigError: report: nowhere is no run folder\n"


def test_report_is_written_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 1.0}\n'
    )
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_s_variable_that_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fleet", "status", "--api-key-env", "NO_SUCH_VARIABLE"]) == 1
    message = "ConfigError: --api-key-env NO_SUCH_VARIABLE: that environment variable is not set\n"
    assert capsys.readouterr().err == message


def test_fleet_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a run folder, of a file, and of the default run; what the options become."""
    assert cli.main(["fleet", "status", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"RolloutError: {tmp_path}/fleet.json cannot be read: ")
    calls: list[tuple[str, dict[str, object]]] = []

    def status(target: str, **options: object) -> None:
        calls.append((target, options))

    monkeypatch.setattr(fleet_status, "status", status)
    monkeypatch.setenv("KEY", "secret")
    assert cli.main(["fleet", "status"]) == 0
    assert cli.main(["fleet", "status", "a/fleet.json", "--watch", "--json", "--api-key-env", "KEY"]) == 0
    assert calls == [
        ("runs/default", {"watch": False, "as_json": False, "api_key": None}),
        ("a/fleet.json", {"watch": True, "as_json": True, "api_key": "secret"}),
    ]
