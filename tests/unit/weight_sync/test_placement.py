"""Which way of weight sync is taken and which are refused: servers here, elsewhere and on shared GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    FleetConfig,
    Placement,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.fleet.state import FleetState, ServerState, ServerStatus
from megatron_drpo.weight_sync.placement import (
    check_path,
    choose_path,
    file_system,
    find_places,
    is_on_this_machine,
    warn_path,
)

RECIPE = Path(__file__).parents[3] / "examples" / "qwen3_30b_a3b_math.yaml"
HERE, THERE = "http://127.0.0.1:30000", "http://node-1:30000"
EMBEDDED: dict[str, Any] = {}
LOCAL: dict[str, Any] = {"engine": RolloutEngineName.sglang}
RAY: dict[str, Any] = {**LOCAL, "fleet": FleetConfig(placement=Placement.ray)}
SHARED: dict[str, Any] = {**LOCAL, "colocated": True}
NODES: dict[str, Any] = {"endpoints": [HERE, THERE]}
SHARED_NODES: dict[str, Any] = {**NODES, "colocated": True}


def make_config(rollout: dict[str, Any], platform: PlatformName = PlatformName.cuda, **sync: Any) -> Config:
    return Config(
        platform=platform,
        data=DataConfig(train_path="train.jsonl"),
        policy=PolicyConfig(model_path="model"),
        rollout=RolloutConfig(**rollout),
        weight_sync=WeightSyncConfig(**sync),
    )


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        (EMBEDDED, "disk"),
        (LOCAL, "tensor"),
        (SHARED, "tensor"),
        (RAY, "distributed"),
        ({"endpoints": [HERE]}, "tensor"),
        (NODES, "distributed"),
        (SHARED_NODES, "disk"),
    ],
)
def test_the_default_follows_from_where_the_servers_are(rollout: dict[str, Any], expected: str) -> None:
    """On GPUs; whatever is chosen is not refused where servers find the trainer and its folder."""
    config = make_config(rollout, host="node-0")
    assert choose_path(config) == expected
    assert [problem for problem in check_path(config) if "is on a file system" not in problem] == []
    assert choose_path(make_config(rollout, PlatformName.cpu)) is WeightSyncPath.tensor
    for path in ("tensor", "distributed", "disk"):
        assert choose_path(make_config(rollout, path=WeightSyncPath(path))) == path


@pytest.mark.parametrize(
    ("path", "rollout", "expected"),
    [
        (
            "tensor",
            EMBEDDED,
            ["which the embedded server on the CPU cannot open; take weight_sync.path=disk"],
        ),
        (
            "tensor",
            RAY,
            ["but servers on a Ray cluster may be on other machines, and see their own GPUs alone"],
        ),
        ("tensor", NODES, [f"but {THERE} cannot open them: not on this machine; take weight_sync.path=dist"]),
        (
            "tensor",
            SHARED_NODES,
            [f"{THERE} cannot open them: not on this machine; take weight_sync.path=disk"],
        ),
        ("tensor", LOCAL, []),
        ("distributed", EMBEDDED, ["weight_sync.path=distributed needs rollout.engine=sglang"]),
        ("distributed", LOCAL, []),
        ("distributed", RAY, ["has servers on a Ray cluster connect to it; give the address of"]),
        (
            "distributed",
            NODES,
            [f"weight_sync.host=127.0.0.1: weight_sync.path=distributed has {THERE} connect"],
        ),
        ("distributed", SHARED, ["NCCL refuses two ranks of one GPU; take weight_sync.path=tensor"]),
        ("distributed", SHARED_NODES, ["take weight_sync.path=disk", "weight_sync.host=127.0.0.1"]),
    ],
)
def test_what_a_path_cannot_do(path: str, rollout: dict[str, Any], expected: list[str]) -> None:
    """On GPUs, with a host that is the trainer's own machine alone."""
    problems = check_path(make_config(rollout, path=WeightSyncPath(path)))
    assert len(problems) == len(expected), problems
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem


@pytest.mark.parametrize("rollout", [EMBEDDED, LOCAL, RAY, NODES, SHARED, SHARED_NODES])
def test_from_a_cpu_tensors_travel_whole(rollout: dict[str, Any]) -> None:
    assert check_path(make_config(rollout, PlatformName.cpu, path=WeightSyncPath.tensor)) == []


@pytest.mark.parametrize(
    ("host", "is_fine"), [("0.0.0.0", False), ("localhost", False), ("::1", False), ("10.0.0.1", True)]
)
def test_a_host_that_servers_reach(host: str, is_fine: bool) -> None:
    problems = check_path(make_config(NODES, path=WeightSyncPath.distributed, host=host))
    assert (problems == []) is is_fine
    assert all(problem.startswith(f"weight_sync.host={host}: ") for problem in problems)


Mount = namedtuple("Mount", ("mountpoint", "fstype"))


def test_a_folder_that_servers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that exists here alone is refused, one on a disk of this machine may be exported."""

    def mount(kind: str) -> None:
        mounts = [Mount("/", "ext4"), Mount(str(tmp_path / "runs"), kind)]

        def disk_partitions(*, all: bool) -> list[Mount]:
            return mounts

        monkeypatch.setattr(psutil, "disk_partitions", disk_partitions)

    def config(rollout: dict[str, Any]) -> Config:
        found = make_config(rollout, path=WeightSyncPath.disk)
        found.run_dir = str(tmp_path / "runs" / "a" / "b")
        return found

    mount("tmpfs")
    (problem,) = check_path(config(NODES))
    assert f"run_dir={tmp_path}/runs/a/b is on a file system of one machine alone (tmpfs): {THERE}" in problem
    assert check_path(config(LOCAL)) == warn_path(config(LOCAL)) == warn_path(config(NODES)) == []
    mount("xfs")
    assert check_path(config(NODES)) == []
    (warning,) = warn_path(config(NODES))
    assert warning.endswith(f"on a disk of this machine (xfs); {THERE} must find it under the same path")
    mount("nfs4")
    assert check_path(config(NODES)) == warn_path(config(NODES)) == []
    assert file_system(tmp_path) == "ext4"


def test_addresses_of_this_machine() -> None:
    own = [a.address for a in psutil.net_if_addrs()["lo"] if a.family is socket.AF_INET]
    hosts = ["localhost", "127.0.0.2", "[::1]", socket.gethostname().upper(), *own]
    assert [host for host in hosts if not is_on_this_machine(f"http://{host}:30000")] == []
    others = ["10.255.255.254", "node-1", "[2001:db8::1]", f"{socket.gethostname()}-1"]
    assert [host for host in others if is_on_this_machine(f"http://{host}:30000")] == []


@pytest.fixture
def start() -> Iterator[Callable[[str | None], int]]:
    """`start(visible)`: pid of a process that was started with that CUDA_VISIBLE_DEVICES."""
    with ExitStack() as stack:

        def start(visible: str | None) -> int:
            environment = {name: value for name, value in os.environ.items() if "CUDA" not in name}
            environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
            command = [sys.executable, "-c", "print(flush=True); input()"]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()  # from now on the environment is its own
            return process.pid

        yield start


@pytest.mark.parametrize(
    ("own", "visible", "sees"),
    [
        (None, None, True),
        (None, "0,1", True),
        (None, "4,5", False),
        ("2,3", "0,2", True),
        ("2,3", "3", False),
        ("2,3", "GPU-8932f937", True),
        ("GPU-8932f937", "1", True),
    ],
)
def test_servers_that_do_not_see_the_gpu(
    start: Callable[[str | None], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own: str | None,
    visible: str | None,
    sees: bool,
) -> None:
    """Of a fleet that runs here; what names a GPU otherwise may be the same one."""
    if own is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    path = tmp_path / "fleet.json"
    server = ServerState(name="rollout server 0", endpoint=HERE, state=ServerStatus.up, pid=start(visible))
    FleetState(pid=1, servers=[server]).write(path)
    config = make_config({"fleet_file": str(path)})
    assert (find_places(config).blind == ()) is sees
    assert choose_path(config) == ("tensor" if sees else "distributed")
    problems = check_path(make_config({"fleet_file": str(path)}, path=WeightSyncPath.tensor))
    assert [HERE in problem and "CUDA_VISIBLE_DEVICES" in problem for problem in problems] == [True] * (
        not sees
    )


def test_a_fleet_that_does_not_run_yet(tmp_path: Path) -> None:
    """The run's own settings say where it will be."""
    config = make_config({**RAY, "fleet_file": str(tmp_path / "fleet.json")}, host="node-0")
    assert choose_path(config) is WeightSyncPath.distributed
    config = make_config({**LOCAL, "fleet_file": str(tmp_path / "fleet.json")})
    assert choose_path(config) is WeightSyncPath.tensor


def test_memory_that_servers_could_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/pytorch/pytorch/issues/165685"""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    (problem,) = check_path(make_config(LOCAL, path=WeightSyncPath.tensor))
    assert "under PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True most containers keep" in problem
    assert check_path(make_config(LOCAL, path=WeightSyncPath.distributed)) == []
    assert check_path(make_config(LOCAL, PlatformName.cpu, path=WeightSyncPath.tensor)) == []


def test_the_recipe_of_the_30b_model() -> None:
    """On any machine: its servers are on other nodes, and reach the first one."""
    config = load_config([f"config={RECIPE}"])
    assert config.weight_sync.path is WeightSyncPath.auto
    assert choose_path(config) is WeightSyncPath.distributed
    assert check_path(config) == []
    config = load_config([f"config={RECIPE}", "weight_sync.host=127.0.0.1"])
    (problem,) = check_path(config)
    assert "http://rollout-node-0:30000, http://rollout-node-1:30000 connect to it" in problem
