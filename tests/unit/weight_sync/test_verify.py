"""Which servers are believed: those with the trainer's checksums, or with each other's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.config.schema import WeightSyncConfig, WeightSyncPath
from megatron_drpo.weight_sync.bucket import Bucket
from megatron_drpo.weight_sync.path import Failures, Server
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weight_sync.served_layout import Layout, compute_served_checksums
from megatron_drpo.weight_sync.tensor_path import TensorPath

Tensors = dict[str, torch.Tensor]
StandIn = Any
"""conftest.py's: it says that it runs on a GPU, and has a parameter that no model has."""
Q, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"
Flip = Callable[[str | None], None]


@pytest.fixture
def flip(monkeypatch: pytest.MonkeyPatch) -> Flip:
    """`flip(name)`: from now on one bit of that tensor changes when it is packed and not yet sent."""
    send = TensorPath.send
    wanted: list[str | None] = [None]

    async def damage_and_send(path: TensorPath, servers: Sequence[Server], bucket: Bucket) -> Failures:
        for name, tensor in bucket.tensors():
            if name == wanted[0]:
                tensor.view(torch.uint8)[1, 2] ^= 1
        return await send(path, servers, bucket)

    monkeypatch.setattr(TensorPath, "send", damage_and_send)

    def flip(name: str | None) -> None:
        wanted[0] = name

    return flip


@pytest.fixture
def make_gpu_server(make_stand_in: Callable[[], StandIn]) -> Callable[..., StandIn]:
    """`make_gpu_server(permuted="")`: a server that holds a Qwen3-MoE as SGLang does on a GPU, but for
    parameters whose name contains `permuted`, which lie otherwise."""

    def make(permuted: str = "") -> StandIn:
        server = make_stand_in()
        server.info |= {"dtype": "float32"}

        def compute_checksums(received: Tensors) -> list[dict[str, str]]:
            [own] = compute_served_checksums(received.items(), Layout(1, torch.float32, 8, "cuda"))
            return [
                {
                    name: digest[::-1] if permuted and permuted in name else digest
                    for name, digest in own.items()
                }
            ]

        server.compute_checksums = compute_checksums
        return server

    return make


@pytest.fixture
def pusher(model_path: Path, tmp_path: Path) -> Iterator[WeightPusher]:
    config = WeightSyncConfig(path=WeightSyncPath.tensor, timeout_s=30.0)
    pusher = WeightPusher(config, model_path=model_path, run_dir=tmp_path)
    yield pusher
    pusher.close()


def test_a_bit_that_flips_between_packing_and_sending(
    pusher: WeightPusher, endpoint: str, new: Tensors, flip: Flip
) -> None:
    """What the policy gave counts, not what lies in the bucket."""
    flip(Q)
    report = pusher.push(new.items(), 1, [endpoint])
    assert report.failed[endpoint].startswith(f"{endpoint}: rank 0: {Q} has checksum ")
    flip(None)
    assert pusher.push(new.items(), 2, [endpoint]).failed == {}


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(Q, "model.layers.1.self_attn.qkv_proj.weight"), (GATE, "model.layers.1.mlp.experts.w13_weight")],
)
def test_a_bit_that_flips_on_its_way_to_a_gpu(
    pusher: WeightPusher,
    make_gpu_server: Callable[..., StandIn],
    new: Tensors,
    flip: Flip,
    name: str,
    parameter: str,
) -> None:
    """With one server alone, which nothing can be compared with but what the policy gave."""
    server = make_gpu_server()
    flip(name)
    report = pusher.push(new.items(), 1, [server.endpoint])
    assert report.failed[server.endpoint].startswith(f"{server.endpoint}: rank 0: {parameter} has checksum ")
    flip(None)
    report = pusher.push(new.items(), 2, [server.endpoint])
    assert (report.updated, report.notes) == ([server.endpoint], [])


def test_parameters_that_lie_otherwise_on_a_gpu(
    pusher: WeightPusher, make_gpu_server: Callable[..., StandIn], new: Tensors, flip: Flip
) -> None:
    """They are told once, and compared with those of the server's kind; all others are known."""
    servers = [make_gpu_server("w13") for _ in range(2)]
    endpoints = [server.endpoint for server in servers]
    report = pusher.push(new.items(), 1, endpoints)
    assert report.failed == {}
    assert report.updated == endpoints
    assert len(report.notes) == 1
    flip(Q)
    assert pusher.push(new.items(), 2, endpoints).updated == []
    flip(None)
    servers[1].compute_checksums = make_gpu_server("mlp.experts").compute_checksums
    report = pusher.push(new.items(), 3, endpoints)
    assert report.updated == [endpoints[0]]
    assert "mlp.experts.w2_weight has checksum" in report.failed[endpoints[1]], "it was known before"


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
