"""What the supervisor starts, passes on and cleans up; real processes are in tests/integration."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Mode,
    ParallelConfig,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    TrainConfig,
)
from megatron_drpo.errors import ConfigError, RankError, RolloutError
from megatron_drpo.launch import supervisor
from megatron_drpo.runtime.process_end import SUPERVISOR_PID, Terminated


class Record:
    """Stands for servers and ranks, and writes down what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.launch: Any = None
        self.arguments: tuple[str, ...] = ()
        self.rank_error: BaseException | None = None
        self.server_is_dead = False

    def fleet(self, config: Config, *, num_trainer_gpus: int) -> Self:
        assert num_trainer_gpus == config.parallel.world_size
        return self

    def __enter__(self) -> Self:
        self.events.append("servers start")
        return self

    def __exit__(self, *_: object) -> None:
        self.events.append("servers stop")

    path = Path("runs/x/fleet.json")

    def check(self) -> None:
        if self.server_is_dead:
            raise RolloutError("rollout server 0 died")

    def elastic_launch(self, launch: Any, entry: str) -> Callable[..., None]:
        self.launch = launch

        def run(*arguments: str) -> None:
            self.events.append("ranks run")
            self.supervisor_pid = os.environ[SUPERVISOR_PID]
            self.arguments = arguments
            if self.rank_error is not None:
                raise self.rank_error

        return run


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    record = Record()
    monkeypatch.setattr(supervisor, "build_fleet", record.fleet)
    monkeypatch.setattr(supervisor, "elastic_launch", record.elastic_launch)
    return record


@pytest.fixture
def config(hf_model: Callable[[str], Path], tmp_path: Path) -> Config:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2", "response": "2"}\n')
    return Config(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(train_path=str(prompts)),
        policy=PolicyConfig(model_path=str(hf_model("moe"))),
        parallel=ParallelConfig(data_parallel_size=2, expert_parallel_size=2),
    )


def child_failed(*ranks: int) -> ChildFailedError:
    failures = {rank: ProcessFailure(local_rank=rank, pid=0, exitcode=1, error_file="") for rank in ranks}
    return ChildFailedError("train", failures)


def test_servers_live_around_the_ranks(record: Record, config: Config, tmp_path: Path) -> None:
    supervisor.supervise(config)
    assert record.events == ["servers start", "ranks run", "servers stop"]
    assert record.launch.nproc_per_node == 2
    assert record.launch.max_restarts == 0
    assert record.arguments == (
        "-m",
        "megatron_drpo.train",
        f"config={tmp_path / 'run' / 'config.yaml'}",
        "rollout.fleet_file=runs/x/fleet.json",
    )
    assert record.supervisor_pid == str(os.getpid())
    assert SUPERVISOR_PID not in os.environ
    ranks = load_config(list(record.arguments[2:]))
    assert ranks.rollout.fleet_file == str(record.path)
    ranks.rollout.fleet_file = None
    assert ranks == config


@pytest.mark.parametrize("engine", RolloutEngineName)
def test_running_servers_are_only_used(record: Record, config: Config, engine: RolloutEngineName) -> None:
    config.rollout = RolloutConfig(engine=engine, endpoints=["http://server:30000"])
    supervisor.supervise(config)
    assert record.events == ["ranks run"]
    assert load_config(list(record.arguments[2:])).rollout.endpoints == ["http://server:30000"]


def test_sft_has_no_server(record: Record, config: Config) -> None:
    config.train = TrainConfig(mode=Mode.sft)
    supervisor.supervise(config)
    assert record.events == ["ranks run"]


def test_problems_start_and_write_nothing(record: Record, config: Config, tmp_path: Path) -> None:
    config.policy = PolicyConfig(model_path="nowhere")
    with pytest.raises(ConfigError, match=r"policy\.model_path: nowhere"):
        supervisor.supervise(config)
    assert record.events == []
    assert not (tmp_path / "run").exists()


def test_a_run_dir_that_cannot_be_written(record: Record, config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config.run_dir = str(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"run_dir=.*/file/run: cannot be written: "):
        supervisor.supervise(config)
    assert record.events == []


def test_failed_ranks_are_named(record: Record, config: Config) -> None:
    record.rank_error = child_failed(1, 0)
    with pytest.raises(RankError, match=r"^rank 0, 1 stopped with an error, see above; logs: .*/run/logs$"):
        supervisor.supervise(config)
    assert record.events[-1] == "servers stop"


def test_a_dead_server_is_the_better_explanation(record: Record, config: Config) -> None:
    record.rank_error, record.server_is_dead = child_failed(0), True
    with pytest.raises(RolloutError, match="rollout server 0 died"):
        supervisor.supervise(config)
    assert record.events[-1] == "servers stop"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the launcher")])
def test_servers_stop_on_every_way_out(record: Record, config: Config, error: BaseException) -> None:
    record.rank_error = error
    with pytest.raises(type(error)):
        supervisor.supervise(config)
    assert record.events[-1] == "servers stop"


def send_to_self(number: signal.Signals) -> Callable[..., Callable[..., None]]:
    """A launcher whose ranks send this process a signal."""

    def run(*_: str) -> None:
        os.kill(os.getpid(), number)

    def launch(*_: object) -> Callable[..., None]:
        return run

    return launch


def test_sigterm_while_ranks_run(record: Record, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(supervisor, "elastic_launch", send_to_self(signal.SIGTERM))
    with pytest.raises(Terminated, match=r"^ended by SIGTERM\b") as caught:
        supervisor.supervise(config)
    assert record.events == ["servers start", "servers stop"]
    assert caught.value.__notes__ == [f"{config.run_dir} has no complete checkpoint"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_servers_start(
    record: Record, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The checkpoint is named."""
    latest = tmp_path / "run" / "checkpoints" / "latest"

    def start(*_: object, **__: object) -> None:
        latest.parent.mkdir()
        latest.write_text("step_000004\n")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(supervisor, "build_fleet", start)
    kept = f"{tmp_path}/run/checkpoints/step_000004 is kept"
    with pytest.raises(Terminated) as caught:
        supervisor.supervise(config)
    assert caught.value.__notes__ == [f"{kept}; the same command goes on from it"]
    shutil.rmtree(latest.parent)
    config.checkpoint.resume = False
    with pytest.raises(Terminated) as caught:
        supervisor.supervise(config)
    assert caught.value.__notes__ == [kept]
    assert record.events == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_what_the_launcher_makes_of_signals(
    record: Record, config: Config, number: signal.Signals, kind: type[BaseException]
) -> None:
    record.rank_error = SignalException("of the launcher", sigval=number)
    with pytest.raises(kind) as caught:
        supervisor.supervise(config)
    assert caught.value.__notes__ == [f"{config.run_dir} has no complete checkpoint"]
    if isinstance(caught.value, Terminated):
        assert caught.value.status == 128 + number


def test_the_launcher_s_handlers_do_not_stay(
    record: Record, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}

    def launch(*_: object) -> Callable[..., None]:
        def run(*_: str) -> None:
            for number in before:
                signal.signal(number, signal.SIG_IGN)

        return run

    monkeypatch.setattr(supervisor, "elastic_launch", launch)
    supervisor.supervise(config)
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_launcher_is_silent(record: Record, config: Config) -> None:
    """Each of its modules has a logger with a level of its own."""
    supervisor.supervise(config)
    assert not logging.getLogger("torch.distributed.elastic.agent.server.api").isEnabledFor(logging.ERROR)
