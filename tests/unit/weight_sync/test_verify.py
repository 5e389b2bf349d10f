"""Which servers are believed: those with the trainer's checksums, or with each other's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.config import WeightSyncConfig, WeightSyncPath
from megatron_drpo.weight_sync.push import WeightPusher

Tensors = dict[str, torch.Tensor]
StandIn = Any
"""conftest.py's: its layout is not known, for it says that it runs on a GPU."""


@pytest.fixture
def pusher(model_path: Path, tmp_path: Path) -> Iterator[WeightPusher]:
    config = WeightSyncConfig(path=WeightSyncPath.tensor, timeout_s=5.0)
    pusher = WeightPusher(config, model_path=model_path, run_dir=tmp_path)
    yield pusher
    pusher.close()


def test_servers_of_an_unknown_layout_must_agree(
    pusher: WeightPusher, make_stand_in: Callable[[], StandIn], new: Tensors
) -> None:
    """The one that differs fails; without a majority all do. That they were only compared is said once."""
    servers = [make_stand_in() for _ in range(3)]
    endpoints = [server.endpoint for server in servers]
    report = pusher.push(new.items(), 1, endpoints)
    assert report.updated == endpoints
    [note] = report.notes
    assert all(endpoint in note for endpoint in endpoints)
    servers[1].checksum = "other"
    report = pusher.push(new.items(), 2, endpoints)
    assert report.updated == [endpoints[0], endpoints[2]]
    assert "differ from those of the other servers" in report.failed[endpoints[1]]
    assert report.notes == []
    assert pusher.push(new.items(), 3, endpoints[:2]).updated == []


def test_a_late_server_is_compared_with_those_updated_earlier(
    pusher: WeightPusher, make_stand_in: Callable[[], StandIn], new: Tensors
) -> None:
    early, late = make_stand_in(), make_stand_in()
    assert pusher.push(new.items(), 7, [early.endpoint]).failed == {}
    late.checksum = "other"
    assert pusher.push(new.items(), 7, [late.endpoint]).updated == []
    assert pusher.push(new.items(), 8, [late.endpoint]).updated == [late.endpoint]


def test_kinds_are_not_compared_with_each_other(
    pusher: WeightPusher, make_stand_in: Callable[[], StandIn], endpoint: str, new: Tensors
) -> None:
    """An embedded server has checksums of its own kind, which are known here."""
    other = make_stand_in()
    assert pusher.push(new.items(), 1, [other.endpoint, endpoint]).updated == [other.endpoint, endpoint]
