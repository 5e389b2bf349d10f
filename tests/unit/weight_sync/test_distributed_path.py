"""Broadcasts to stand-ins for SGLang: groups are kept, and a broken one is dropped. Over gloo, and over a
backend with NCCL's habits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.config.schema import WeightSyncConfig, WeightSyncPath
from megatron_drpo.weight_sync import group as group_module
from megatron_drpo.weight_sync import nccl_version
from megatron_drpo.weight_sync import push as push_module
from megatron_drpo.weight_sync.distributed_path import DistributedPath
from megatron_drpo.weight_sync.push import WeightPusher
from tests.nccl_like import NcclLike, Options

Tensors = dict[str, torch.Tensor]
StandIn = Any
"""conftest.py's."""
INIT = "/init_weights_update_group"
UPDATE = "/update_weights_from_distributed"


@pytest.fixture(params=["gloo", "nccl"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the groups are made of, with buckets on the CPU."""
    name: str = request.param

    def build(**settings: Any) -> DistributedPath:
        settings["backend"] = name
        return DistributedPath(**settings)

    monkeypatch.setattr(push_module, "DistributedPath", build)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NcclLike, raising=False)
    return name


@pytest.fixture
def make_pusher(backend: str, model_path: Path, tmp_path: Path) -> Iterator[Callable[..., WeightPusher]]:
    pushers: list[WeightPusher] = []

    def make(*, timeout_s: float = 10.0, servers_per_group: int = 1) -> WeightPusher:
        config = WeightSyncConfig(
            path=WeightSyncPath.distributed,
            bucket_bytes=100_000,
            timeout_s=timeout_s,
            servers_per_group=servers_per_group,
        )
        pushers.append(WeightPusher(config, model_path=model_path, run_dir=tmp_path))
        return pushers[-1]

    yield make
    for pusher in pushers:
        pusher.close()


def assert_has(server: StandIn, tensors: Tensors, version: int) -> None:
    assert server.version == str(version)
    assert server.received.keys() == tensors.keys()
    assert all(torch.equal(server.received[name], tensors[name]) for name in tensors)
    server.received.clear()


@pytest.mark.parametrize("servers_per_group", [1, 2])
def test_groups_stay_warm_and_new_servers_join(
    make_pusher: Callable[..., WeightPusher],
    make_stand_in: Callable[[], StandIn],
    new: Tensors,
    servers_per_group: int,
) -> None:
    """A restarted server has a new endpoint; the others keep their group, unless it was theirs too."""
    pusher = make_pusher(servers_per_group=servers_per_group)
    first, second, third = (make_stand_in() for _ in range(3))
    for version in (1, 2):
        assert pusher.push(new.items(), version, [first.endpoint, second.endpoint]).failed == {}
        assert_has(first, new, version)
        assert_has(second, new, version)
    assert [server.asked.count(INIT) for server in (first, second)] == [1, 1]
    assert pusher.push(new.items(), 3, [first.endpoint, third.endpoint]).failed == {}
    assert_has(first, new, 3)
    assert_has(third, new, 3)
    assert [server.asked.count(INIT) for server in (first, third)] == [servers_per_group, 1]
    pusher.close()
    assert first.asked[-1] == "/destroy_weights_update_group"


@pytest.mark.parametrize("fault", ["500", "reset", "hang"])
def test_a_server_that_stops_receiving_holds_nobody_up(
    make_pusher: Callable[..., WeightPusher],
    make_stand_in: Callable[[], StandIn],
    stopwatch: Callable[[], float],
    new: Tensors,
    fault: str,
) -> None:
    """Neither the other server, nor the pusher's end; the next update joins it anew."""
    bad, good = make_stand_in(), make_stand_in()
    pusher = make_pusher(timeout_s=6.0)
    assert pusher.push(new.items(), 1, [bad.endpoint, good.endpoint]).failed == {}
    bad.faults[UPDATE] = fault
    stream = iter(new.items())
    report = pusher.push(stream, 2, [bad.endpoint, good.endpoint])
    assert next(stream, None) is None
    assert report.updated == [good.endpoint]
    assert report.failed[bad.endpoint].startswith(bad.endpoint)
    assert bad.asked[-1] == UPDATE
    good.received.clear()
    bad.faults.clear()
    bad.received.clear()
    assert pusher.push(new.items(), 3, [bad.endpoint, good.endpoint]).failed == {}
    assert_has(bad, new, 3)
    assert_has(good, new, 3)
    assert [server.asked.count(INIT) for server in (bad, good)] == [2, 1]
    bad.faults["/destroy_weights_update_group"] = "reset"
    start = stopwatch()
    pusher.close()
    assert stopwatch() - start < 3


def test_a_failure_takes_its_group_along_and_no_other(
    make_pusher: Callable[..., WeightPusher], make_stand_in: Callable[[], StandIn], new: Tensors
) -> None:
    servers = [make_stand_in() for _ in range(3)]
    pusher = make_pusher(timeout_s=6.0, servers_per_group=2)
    servers[0].faults[UPDATE] = "500"
    report = pusher.push(new.items(), 1, [server.endpoint for server in servers])
    assert report.updated == [servers[2].endpoint]
    assert report.failed.keys() == {server.endpoint for server in servers[:2]}
    assert_has(servers[2], new, 1)


@pytest.mark.parametrize("fault", ["500", "hang"])
def test_a_group_that_does_not_form_is_tried_again_and_then_named(
    make_pusher: Callable[..., WeightPusher],
    make_stand_in: Callable[[], StandIn],
    monkeypatch: pytest.MonkeyPatch,
    new: Tensors,
    backend: str,
    fault: str,
) -> None:
    monkeypatch.setattr(group_module, "_HANDSHAKE_S", 1.0)
    bad, good = make_stand_in(), make_stand_in()
    bad.faults[INIT] = fault
    report = make_pusher().push(new.items(), 1, [bad.endpoint, good.endpoint])
    assert report.updated == [good.endpoint]
    assert bad.asked.count(INIT) == 3
    reason = report.failed[bad.endpoint]
    assert f"no {backend} group with {bad.endpoint} (SGLang 0.5.23) in 3 attempts" in reason
    assert f"torch {torch.__version__}" in reason


def test_ranks_meet_at_a_small_tensor_of_the_model(
    make_pusher: Callable[..., WeightPusher], make_stand_in: Callable[[], StandIn], new: Tensors
) -> None:
    """Once per group, and in an open update: a server would not take part in anything else."""
    server = make_stand_in()
    pusher = make_pusher()
    assert pusher.push(new.items(), 1, [server.endpoint]).failed == {}
    first, *buckets = server.broadcasts
    assert first == [min(buckets[0], key=lambda name: new[name].nbytes)]
    assert [name for bucket in buckets for name in bucket] == list(new)
    assert server.asked.index("/begin_weight_update") < server.asked.index(UPDATE)
    assert pusher.push(new.items(), 2, [server.endpoint]).failed == {}
    assert server.broadcasts[1 + len(buckets) :] == buckets


def test_a_server_that_does_not_come_to_the_first_broadcast_costs_a_handshake(
    make_pusher: Callable[..., WeightPusher],
    make_stand_in: Callable[[], StandIn],
    monkeypatch: pytest.MonkeyPatch,
    stopwatch: Callable[[], float],
    new: Tensors,
) -> None:
    monkeypatch.setattr(group_module, "_HANDSHAKE_S", 2.0)
    bad, good = make_stand_in(), make_stand_in()
    bad.faults[UPDATE] = "hang"
    pusher = make_pusher(timeout_s=60.0)
    start = stopwatch()
    report = pusher.push(new.items(), 1, [bad.endpoint, good.endpoint])
    assert report.updated == [good.endpoint]
    assert report.failed == {bad.endpoint: f"{bad.endpoint}: the first broadcast did not finish within 2 s"}
    assert stopwatch() - start < 15
    assert_has(good, new, 1)


@pytest.mark.parametrize("backend", ["nccl"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"version": "23003"}, "pip install nvidia-nccl-cu12==2.30.3"),
        ({"device": Options().device}, "Duplicate GPU detected : rank 0 and rank 1"),
    ],
)
def test_what_nccl_refuses_fences_the_server_alone(
    make_pusher: Callable[..., WeightPusher],
    make_stand_in: Callable[[], StandIn],
    new: Tensors,
    settings: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nccl_version, "cuda_version", lambda: "12.8")
    bad, good = make_stand_in(), make_stand_in()
    bad.nccl = Options(**settings)
    report = make_pusher().push(new.items(), 1, [bad.endpoint, good.endpoint])
    assert report.updated == [good.endpoint]
    assert report.failed.keys() == {bad.endpoint}
    assert told in report.failed[bad.endpoint]
    assert_has(good, new, 1)


def test_an_embedded_server_is_told_from_sglang(
    make_pusher: Callable[..., WeightPusher], endpoint: str, new: Tensors
) -> None:
    report = make_pusher().push(new.items(), 1, [endpoint])
    assert "set weight_sync.path to tensor" in report.failed[endpoint]
