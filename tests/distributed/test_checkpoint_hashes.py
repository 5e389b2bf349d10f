"""Hashes of a run's checkpoints, on two ranks: computed while writing, compared before resuming.

Megatron is imported by the ranks alone: that takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.config.schema import CheckpointConfig, ParallelConfig, PlatformName
from megatron_drpo.platform.base import build_platform

NUM_VALUES = 2**18
"""Of each of a rank's two tensors: a megabyte."""


@dataclass
class Architecture:
    num_layers: int = 1


class Tensors:
    """The part of a `Policy` that a checkpointer sees, on one of two ranks."""

    def __init__(self, parallel: Any) -> None:
        self.parallel = parallel
        self.architecture = Architecture()
        self.optimizer_step = self.num_updates = 0
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.tensors = [torch.randn(NUM_VALUES, generator=generator) for _ in range(2)]
        self.loaded: dict[str, Any] = {}

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        return {
            str(i): ShardedTensor.from_rank_offsets(
                str(i), torch.zeros_like(tensor) if is_loading else tensor, (0, dist.get_rank(), 2)
            )
            for i, tensor in enumerate(self.tensors)
        }

    def load_state(self, state: dict[str, Any], *, optimizer_step: int, num_updates: int) -> None:
        self.loaded = state


def build_policy() -> Any:
    from megatron_drpo.policy.parallel import initialise_parallel

    platform = build_platform(PlatformName.cpu)
    layout = ParallelConfig(data_parallel_size=2)
    return Tensors(initialise_parallel(layout, platform.backend, platform.prepare(0)))


def bytes_read() -> int:
    """By this process, with read calls, from the page cache too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def load_outcome(path: Path, policy: Any, **fields: Any) -> list[str]:
    """The messages of a load, and its error."""
    from megatron_drpo.checkpoint.checkpointer import Checkpointer
    from megatron_drpo.errors import CheckpointError

    said: list[str] = []
    policy.loaded.clear()
    try:
        Checkpointer(str(path.parent.parent), CheckpointConfig(**fields)).load(path, policy, said.append)
    except CheckpointError as error:
        said.append(str(error))
    dist.barrier()
    return said


def on_rank_0(action: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def flip_16_values(file: Path) -> None:
    """The sign bits of 16 numbers in the middle of a tensor, so that every size stays. Tensors are in zip
    archives, one behind the other, whose largest entries are their values."""
    content = bytearray(file.read_bytes())
    entries = [found.start() for found in re.finditer(b"PK\x03\x04", content)]
    start, end = max(pairwise([*entries, len(content)]), key=lambda entry: entry[1] - entry[0])
    for number in range(16):
        content[(start + end) // 2 + 64 * number] ^= 0x80
    file.write_bytes(content)


def forget_hashes(file: Path) -> None:
    """As if it were from before there were any."""
    state = json.loads(file.read_text())
    del state["has_hashes"], state["run_id"]
    file.write_text(json.dumps(state))


def two_ranks(run_dir: Path) -> dict[str, Any]:
    from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState

    policy = build_policy()
    checkpointer = Checkpointer(str(run_dir), CheckpointConfig(keep_last=9))
    checkpointer.save(policy, RunState(step=1))  # imports what a save needs
    before = bytes_read()
    path = checkpointer.save(policy, RunState(step=2))
    outcome: dict[str, Any] = {"bytes_read": bytes_read() - before}
    outcome["good"] = load_outcome(path, policy)
    outcome["num_loaded"] = len(policy.loaded)

    copy = run_dir / "copy" / "checkpoints" / "step_000002"
    names = sorted(file.name for file in path.glob("*.distcp"))  # one or two of each rank
    for name in (names[0], names[-1]):
        on_rank_0(lambda: shutil.copytree(path, copy))
        on_rank_0(lambda name=name: flip_16_values(copy / name))
        outcome[name] = load_outcome(copy, policy)
        outcome[f"{name}, not verified"] = load_outcome(copy, policy, verify_on_load=False)
        on_rank_0(lambda: shutil.rmtree(copy))
    on_rank_0(lambda: flip_16_values(path / names[-1]))
    outcome["own"] = load_outcome(path, policy)

    on_rank_0((path / "integrity.json").unlink)
    outcome["no list"] = load_outcome(path, policy)
    on_rank_0(lambda: forget_hashes(path / "run_state.json"))
    outcome["from before"] = load_outcome(path, policy)
    return outcome


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_hashes_of_a_checkpoint(run_distributed: Callable[..., Any], tmp_path: Path) -> None:
    """Of four megabytes. Both ranks say the same, whose part the damaged file may be."""
    outcome, other = run_distributed(two_ranks, 2, tmp_path)
    path = tmp_path / "checkpoints" / "step_000002"
    for rank in (outcome, other):
        assert rank["bytes_read"] < 200_000, "a save reads none of the files with tensors"
        assert (rank["good"], rank["num_loaded"]) == ([], 2)
    names = sorted(file.name for file in path.glob("*.distcp"))
    assert {name[:4] for name in names} == {"__0_", "__1_"}
    for name in (names[0], names[-1]):
        [message] = outcome[name]
        assert f"step_000002 cannot be read: {name} has other content than was written" in message
        assert "There is no older checkpoint" in message
        assert other[name] == [message]
        assert outcome[f"{name}, not verified"] == [], "nothing else would notice"
    [message] = outcome["own"]
    assert message == (
        f"{path} cannot be read: {names[-1]} has other content than was written: its SHA-256 is not the one "
        f"in integrity.json. To go back to an older checkpoint (step_000001), write step_000001 into "
        f"{path.parent}/latest and start the run again"
    )
    assert outcome["no list"][0].startswith(f"{path} cannot be read: integrity.json is missing. To go back")
    assert outcome["from before"] == [
        f"{path} is from before checkpoints had hashes: its values are not verified"
    ]
    state = json.loads((tmp_path / "checkpoints" / "step_000001" / "run_state.json").read_text())
    listed = json.loads((tmp_path / "checkpoints" / "step_000001" / "integrity.json").read_text())["files"]
    assert listed.keys() == {*state["files"], "run_state.json"}
    assert set(names) < listed.keys()
    for name, digest in listed.items():
        file = tmp_path / "checkpoints" / "step_000001" / name
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
