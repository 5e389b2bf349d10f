"""Commands, exit statuses, and that messages go where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_drpo import cli, supervisor
from megatron_drpo.config_io import load_config
from megatron_drpo.errors import RankError
from megatron_drpo.rollout import fleet_status


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


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["--help"]])
def test_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 0
    output = capsys.readouterr()
    assert output.out == cli.USAGE
    for command in ("train", "check", "report"):
        assert f"megatron-drpo {command} " in output.out


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("unknown command 'trian'\n")
    assert output.out == ""


def test_check_prints_the_resolved_configuration(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    assert cli.main(["check", *arguments, "train.num_steps=7"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    (tmp_path / "resolved.yaml").write_text(output.out)
    resolved = load_config([f"config={tmp_path / 'resolved.yaml'}"])
    assert resolved == load_config([*arguments, "train.num_steps=7"])
    assert not (tmp_path / "run").exists()


def test_check_warns_on_stderr(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(["check", *arguments, "algorithm.loss.delta=2", "rollout.top_p=0.9"]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: algorithm.loss.delta=2.0: ")
    assert warnings[1].startswith("warning: rollout.top_p=0.9: ")


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


@pytest.mark.parametrize("argv", [[], ["nowhere"], ["a", "b"]])
def test_report_wants_one_run_folder(
    capsys: pytest.CaptureFixture[str], argv: list[str], tmp_path: Path
) -> None:
    assert cli.main(["report", *argv]) == 1
    assert capsys.readouterr().err == "ConfigError: report: expected one run folder\n"


def test_report_is_written_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 1.0}\n'
    )
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_usage_names_the_fleet_s_commands() -> None:
    for command in ("up", "down", "status"):
        assert f"megatron-drpo fleet {command} " in cli.USAGE


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "fleet : expected fleet up, fleet down or fleet status"),
        (["stop"], "fleet stop: expected fleet up, fleet down or fleet status"),
        (["down"], "fleet down: expected one run folder, or a fleet.json"),
        (
            ["status", "--api-key-env", "NO_SUCH_VARIABLE"],
            "--api-key-env NO_SUCH_VARIABLE: that environment variable is not set",
        ),
    ],
)
def test_fleet_commands_that_are_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(["fleet", *argv]) == 1
    assert capsys.readouterr().err == f"ConfigError: {message}\n"


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


def test_fleet_status_with_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["fleet", "status", "--wach"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --wach" in capsys.readouterr().err
