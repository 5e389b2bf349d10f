"""What a checkpoint folder holds after kills, errors and damage. tests/distributed resumes real policies."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState, check_checkpoint, read_run_state
from megatron_drpo.config.schema import CheckpointConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.models.base import ArchitectureConfig, MoeConfig
from megatron_drpo.policy.parallel import ParallelState

ARCHITECTURE = ArchitectureConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=8,
    ffn_hidden_size=32,
    norm_eps=1e-6,
    qk_norm=True,
    rope_theta=1e4,
    max_position_embeddings=64,
    vocab_size=40,
    tie_word_embeddings=False,
    moe=MoeConfig(
        num_experts=4,
        num_experts_per_token=2,
        ffn_hidden_size=8,
        renormalise=True,
        is_moe_layer=(True, True),
    ),
)


@dataclass
class OneTensor:
    """The part of `Policy` that a checkpointer sees, with one parameter, all of whose values are the step."""

    parallel: ParallelState
    architecture: ArchitectureConfig = ARCHITECTURE
    tensor: torch.Tensor = field(default_factory=lambda: torch.zeros(1000))
    optimizer_step: int = 0
    num_updates: int = 0

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        return {"tensor": ShardedTensor.from_rank_offsets("tensor", self.tensor)}

    def load_state(self, state: dict[str, Any], *, optimizer_step: int, num_updates: int) -> None:
        self.tensor = state["tensor"]
        self.optimizer_step = optimizer_step
        self.num_updates = num_updates


@pytest.fixture
def policy(one_rank: ParallelState) -> Any:
    """Stands for a `Policy`."""
    return OneTensor(one_rank)


def checkpointer(run_dir: Path, **fields: Any) -> Checkpointer:
    return Checkpointer(str(run_dir), CheckpointConfig(**fields))


def save(run_dir: Path, policy: Any, step: int, **fields: Any) -> Path:
    """As a run does that starts or goes on in this folder."""
    policy.tensor = torch.full((1000,), float(step))
    policy.optimizer_step = policy.num_updates = 2 * step
    run = checkpointer(run_dir, **fields)
    run.claim()
    return run.save(policy, RunState(step=step, policy_version=step))


def load(path: Path, policy: Any) -> RunState:
    """Load and check that all parts belong to one step."""
    policy.tensor = torch.zeros(1000)
    state = Checkpointer(str(path.parent.parent), CheckpointConfig()).load(path, policy)
    assert policy.tensor.unique().tolist() == [state.step]
    assert (state.policy_version, policy.optimizer_step, policy.num_updates) == (
        state.step,
        *2 * (2 * state.step,),
    )
    return state


def saved_steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


# ----------------------------------------------------------------------------------- save and find


def test_everything_comes_back(tmp_path: Path, policy: Any) -> None:
    state = RunState(
        step=3, policy_version=3, metrics_position=17, cursor={"low_water": 5, "exceptions": [9]}
    )
    policy.tensor, policy.optimizer_step, policy.num_updates = torch.full((1000,), 3.0), 6, 6
    torch.manual_seed(11)
    before = torch.get_rng_state()
    path = checkpointer(tmp_path).save(policy, state)
    drawn = torch.rand(4)
    found = checkpointer(tmp_path).find()
    assert found == path
    loaded = load(path, policy)
    assert loaded == replace(state, architecture=loaded.architecture)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(4), drawn)


def test_where_a_run_starts(tmp_path: Path, policy: Any) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    other = save(there, policy, 7)
    assert checkpointer(here).find() is None
    assert checkpointer(here, load_path=str(other)).find() == other
    own = save(here, policy, 2)
    assert checkpointer(here, load_path=str(other)).find() == own, "run_dir's own goes first"
    assert checkpointer(here, load_path=str(other), resume=False).find() == other
    assert checkpointer(here, resume=False).find() is None
    assert checkpointer(here).is_own(own)
    assert not checkpointer(here).is_own(other)


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_old_checkpoints_are_deleted(tmp_path: Path, policy: Any, keep_last: int, kept: list[int]) -> None:
    for step in range(1, 5):
        newest = save(tmp_path, policy, step, keep_last=keep_last)
        assert checkpointer(tmp_path).find() == newest
    assert saved_steps(tmp_path) == [f"step_{step:06d}" for step in kept]


def test_a_run_started_over_keeps_its_own_checkpoints(tmp_path: Path, policy: Any) -> None:
    """An earlier run in the folder came further: its checkpoints are not in force and not deleted."""
    save(tmp_path, policy, 10)
    save(tmp_path, policy, 1_000_000)
    again = checkpointer(tmp_path, resume=False, keep_last=1)
    again.claim()
    with pytest.raises(CheckpointError, match="is of another run"):  # after a kill before the first save
        checkpointer(tmp_path).find()
    for step in (4, 6, 10):
        policy.tensor = torch.full((1000,), float(step))
        policy.optimizer_step = policy.num_updates = 2 * step
        saved = again.save(policy, RunState(step=step, policy_version=step))
        assert saved == checkpointer(tmp_path).find()
    assert saved_steps(tmp_path) == ["step_000010", "step_1000000"]
    assert load(tmp_path / "checkpoints" / "step_000010", policy).step == 10


# ------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_before_operation(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """SIGKILL before the `number`-th change of the file system. The writing of tensors counts as one change
    and leaves half of its files; so does the deletion of a folder."""
    left = count(number, -1)
    inside = [False]

    def before(
        owner: Any, name: str, half_done: Callable[..., None], *, is_opaque: bool = False
    ) -> Callable[..., Any]:
        original = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return original(*args, **kwargs)
            if next(left) == 0:
                half_done(*args)
                raise Killed
            inside[0] = is_opaque
            try:
                return original(*args, **kwargs)
            finally:
                inside[0] = False

        return operation

    def nothing(*_: Any) -> None: ...

    def half_deleted(folder: Path) -> None:
        for file in sorted(folder.iterdir())[::2]:
            file.unlink()

    def half_written(_: Any, folder: str, *__: Any) -> None:
        (Path(folder) / "__0_0.distcp").write_bytes(b"half")

    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "write_text"),
            (torch, "save"),
            (os, "fsync"),
        ):
            patch.setattr(owner, name, before(owner, name, nothing))
        patch.setattr(shutil, "rmtree", before(shutil, "rmtree", half_deleted, is_opaque=True))
        patch.setattr(
            dist_checkpointing, "save", before(dist_checkpointing, "save", half_written, is_opaque=True)
        )
        yield


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint_in_force(
    tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every single change of the file system that a save makes, with an old checkpoint to delete and
    an abandoned one of the same step in the way."""
    origin = tmp_path / "origin"
    save(origin, policy, 2, keep_last=9)
    save(origin, policy, 6, keep_last=9)
    save(origin, policy, 4, keep_last=9)
    outcomes = []
    for number in count():
        run_dir = tmp_path / f"run_{number}"
        shutil.copytree(origin, run_dir)
        try:
            with killed_before_operation(monkeypatch, number):
                save(run_dir, policy, 6, keep_last=1)
        except Killed:
            path = checkpointer(run_dir).find()
            assert path is not None
            outcomes.append(load(path, policy).step)
            for name in saved_steps(run_dir):
                load(run_dir / "checkpoints" / name, policy)
            assert load(save(run_dir, policy, 8, keep_last=1), policy).step == 8
        assert not list((run_dir / "checkpoints").glob(".*"))
        if len(outcomes) == number:
            break
    assert outcomes == sorted(outcomes), "once the new one is in force it stays so"
    assert set(outcomes) == {4, 6}
    assert len(outcomes) > 15


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_at_any_moment_of_the_first_save_loses_no_complete_checkpoint(
    tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """Without and with checkpoints of an earlier run, one of the same step."""
    adopted = 0
    for number in count():
        run_dir = tmp_path / f"run_{number}"
        if earlier:
            save(run_dir, policy, 1)
            save(run_dir, policy, 9)
        first_id = read_id(run_dir)
        try:
            with killed_before_operation(monkeypatch, number):
                save(run_dir, policy, 1, resume=False)
            break
        except Killed:
            has_latest = (run_dir / "checkpoints" / "latest").exists()
            states = [read_run_state(run_dir / "checkpoints" / name) for name in saved_steps(run_dir)]
            own = [state.step for state in states if state.run_id == read_id(run_dir)]
            if has_latest or own or not states:
                path = checkpointer(run_dir).find()
                assert (path is None) == (not has_latest and not own)
                assert path is None or load(path, policy).step == max(own)
                adopted += not has_latest and read_id(run_dir) != first_id and own == [1]
            else:
                with pytest.raises(CheckpointError, match="is of another run"):
                    checkpointer(run_dir).find()
    assert adopted >= 3, "between the renaming of the folder and the writing of `latest`"


def read_id(run_dir: Path) -> str | None:
    file = run_dir / "checkpoints" / "run_id"
    return file.read_text().strip() if file.exists() else None


def test_what_a_kill_left_is_never_loaded(tmp_path: Path, policy: Any) -> None:
    path = save(tmp_path, policy, 2)
    partial = path.rename(path.with_name(".partial_step_000002"))
    with pytest.raises(CheckpointError, match=r"step_000002 is not a complete checkpoint"):
        checkpointer(tmp_path).find()
    with pytest.raises(CheckpointError, match=r"\.partial_step_000002 is not a complete checkpoint"):
        checkpointer(tmp_path / "new", load_path=str(partial)).find()


# ------------------------------------------------------------------------------------------ errors


@contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """No file may become longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 100, 1500, 4500])
def test_a_full_disk_is_a_checkpoint_error(tmp_path: Path, policy: Any, num_bytes: int) -> None:
    before = save(tmp_path, policy, 2)
    with (
        disk_full_after(num_bytes),
        pytest.raises(CheckpointError, match=r"step_000004 cannot be written: .+"),
    ):
        save(tmp_path, policy, 4)
    assert checkpointer(tmp_path).find() == before
    assert saved_steps(tmp_path) == ["step_000002"]
    assert load(save(tmp_path, policy, 4), policy).step == 4


def test_an_unwritable_folder_is_a_checkpoint_error(tmp_path: Path, policy: Any) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written: .+checkpoints"):
        checkpointer(tmp_path).claim()
    with pytest.raises(CheckpointError, match=r"step_000004 cannot be written: .+checkpoints"):
        checkpointer(tmp_path).save(policy, RunState(step=4))


def test_another_model_is_refused_by_name(tmp_path: Path, policy: Any) -> None:
    assert ARCHITECTURE.moe is not None
    path = save(tmp_path, policy, 2)
    policy.architecture = replace(ARCHITECTURE, hidden_size=24, moe=replace(ARCHITECTURE.moe, num_experts=8))
    expected = "another model (hidden_size: 16 there, 24 here, moe.num_experts: 4 there, 8 here)"
    with pytest.raises(CheckpointError) as caught:
        load(path, policy)
    assert expected in str(caught.value)
    policy.architecture = replace(ARCHITECTURE, moe=None)
    with pytest.raises(CheckpointError, match=r"moe\.num_experts: 4 there, None here"):
        load(path, policy)


def test_what_would_stop_a_resume_is_known_before_the_start(tmp_path: Path, policy: Any) -> None:
    config = CheckpointConfig()
    assert check_checkpoint(str(tmp_path), config, ARCHITECTURE) == []
    path = save(tmp_path, policy, 1)
    assert check_checkpoint(str(tmp_path), config, ARCHITECTURE) == []
    (problem,) = check_checkpoint(str(tmp_path), config, replace(ARCHITECTURE, hidden_size=24))
    assert "another model (hidden_size: " in problem
    (path / ".metadata").unlink()
    (problem,) = check_checkpoint(str(tmp_path), config, ARCHITECTURE)
    assert ".metadata is missing" in problem
    (path / "run_state.json").unlink()
    (problem,) = check_checkpoint(str(tmp_path), config, ARCHITECTURE)
    assert f"{path} is not a complete checkpoint" in problem


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path) -> None:
    file.write_bytes(b"x" * file.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, overwrite])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "rng.pt"])
def test_a_damaged_checkpoint_is_a_checkpoint_error(
    tmp_path: Path, policy: Any, name: str, damage: Callable[[Path], None]
) -> None:
    path = save(tmp_path, policy, 2)
    if not (path / name).exists():
        pytest.skip("this megatron-core keeps it beside the tensors")
    damage(path / name)
    with pytest.raises(CheckpointError, match=r"step_000002 cannot be read: .+"):
        load(path, policy)


def test_run_state_is_plain_json(tmp_path: Path, policy: Any) -> None:
    values = json.loads((save(tmp_path, policy, 2) / "run_state.json").read_text())
    assert (values["step"], values["num_updates"], values["architecture"]["moe"]["num_experts"]) == (2, 4, 4)


def test_a_device_out_of_memory_is_no_matter_of_the_disk(
    tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's error is a RuntimeError, as is a full disk."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("megatron_drpo.checkpoint.checkpointer._save_hashed", fail)
    with pytest.raises(torch.OutOfMemoryError):
        save(tmp_path, policy, 1)
