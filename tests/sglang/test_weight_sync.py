"""Weights pushed to real SGLang servers: the bytes they then hold, what they answer, and what happens to one
that is stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_drpo.config.schema import WeightSyncConfig, WeightSyncPath
from megatron_drpo.embedded_server.runner import load_model
from megatron_drpo.fleet import server_process
from megatron_drpo.fleet.fleet import Fleet
from megatron_drpo.weight_sync import push as push_module
from megatron_drpo.weight_sync.client import WeightClient
from megatron_drpo.weight_sync.distributed_path import DistributedPath
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weight_sync.served_layout import compute_served_checksums, known_layout
from megatron_drpo.weights.hf_folder import HfFolder
from tests import nccl_like

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(300)]
Tensors = dict[str, torch.Tensor]
Serve = Callable[..., str]


@pytest.fixture(scope="session")
def model_path(hf_model: Callable[[str], Path]) -> Path:
    return hf_model("moe_renormalised")


@pytest.fixture
def make_pusher(model_path: Path, tmp_path: Path) -> Iterator[Callable[..., WeightPusher]]:
    pushers: list[WeightPusher] = []

    def make(path: WeightSyncPath, **settings: Any) -> WeightPusher:
        settings = {"timeout_s": 60.0, "bucket_bytes": 200_000, **settings}
        config = WeightSyncConfig(path=path, **settings)
        pushers.append(WeightPusher(config, model_path=model_path, run_dir=tmp_path / "run"))
        return pushers[-1]

    yield make
    for pusher in pushers:
        pusher.close()


def perturbed(model_path: Path, seed: int) -> Tensors:
    torch.manual_seed(seed)
    tensors = load_file(model_path / "model.safetensors")
    return {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def post(endpoint: str, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{endpoint}{path}", json=body, trust_env=False, timeout=60).json()


def checksums(endpoint: str) -> list[dict[str, str]]:
    return [rank["checksums"] for rank in post(endpoint, "/weights_checker", {"action": "checksum"})["ranks"]]


def expected_checksums(endpoint: str, model_path: Path, tensors: Tensors) -> list[dict[str, str]]:
    info = httpx.get(f"{endpoint}/server_info", trust_env=False, timeout=60).json()
    layout = known_layout(
        WeightClient.parse_info(info, endpoint),
        HfFolder(model_path).config,
    )
    assert layout is not None
    return compute_served_checksums(tensors.items(), layout)


@pytest.mark.parametrize("path", [p for p in WeightSyncPath if p is not WeightSyncPath.auto])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_server_holds_exactly_the_weights_pushed(
    sglang_server: Serve,
    make_pusher: Callable[..., WeightPusher],
    model_path: Path,
    tmp_path: Path,
    path: WeightSyncPath,
    tp: int,
) -> None:
    """By SGLang's own checksums of every parameter, and by its logprobs against transformers'."""
    endpoint = sglang_server(model_path, tp=tp)
    pusher = make_pusher(path)
    for seed in (1, 2):
        new = perturbed(model_path, 10 * tp + seed)
        expected = expected_checksums(endpoint, model_path, new)
        assert checksums(endpoint) != expected
        report = pusher.push(iter(new.items()), 10 * tp + seed, [endpoint])
        assert report.failed == {}
        assert report.updated == [endpoint]
        assert report.notes == []
        assert checksums(endpoint) == expected
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_path / "config.json").read_text())
    reference = load_model(tmp_path, torch.float32)
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    body = {
        "input_ids": [4, 5, 6],
        "sampling_params": params,
        "return_logprob": True,
        "extra_key": f"{path}{tp}",
    }
    meta = post(endpoint, "/generate", body)["meta_info"]
    tokens = [entry[1] for entry in meta["output_token_logprobs"]]
    logprobs = reference(torch.tensor([[4, 5, 6, *tokens]])).logits[0, 2:-1].log_softmax(-1)
    actual = torch.tensor([entry[0] for entry in meta["output_token_logprobs"]])
    torch.testing.assert_close(
        actual, logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=2e-5, rtol=0
    )
    assert meta["weight_version"] == str(10 * tp + 2)


@pytest.fixture
def nccl_like_server(
    start_fleet: Callable[..., Fleet], model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """An endpoint of two tensor-parallel ranks whose broadcast groups have NCCL's habits, and so have those
    of pushers here."""

    def build(**settings: Any) -> DistributedPath:
        settings["backend"] = nccl_like.NAME
        return DistributedPath(**settings)

    monkeypatch.setattr(push_module, "DistributedPath", build)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl_like.NcclLike, raising=False)
    shims = (Path(__file__).parent / "with_nccl_like", server_process._SGLANG_ON_CPU)
    monkeypatch.setattr(server_process, "_SGLANG_ON_CPU", os.pathsep.join(map(str, shims)))
    return start_fleet(model_path, tp=2).endpoints[0]


def test_ranks_with_the_habits_of_nccl_take_part(
    nccl_like_server: str, make_pusher: Callable[..., WeightPusher], model_path: Path
) -> None:
    """Over a group that connects at its first broadcast, which the servers enter with their request."""
    pusher = make_pusher(WeightSyncPath.distributed)
    for version in (1, 2):
        new = perturbed(model_path, 100 + version)
        expected = expected_checksums(nccl_like_server, model_path, new)
        report = pusher.push(new.items(), version, [nccl_like_server])
        assert report.failed == {}
        assert checksums(nccl_like_server) == expected


def test_wrong_weights_are_found_out(
    sglang_server: Serve,
    make_pusher: Callable[..., WeightPusher],
    model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One last bit of one expert, changed on the way."""
    endpoint = sglang_server(model_path)
    pusher = make_pusher(WeightSyncPath.distributed)
    new = perturbed(model_path, 5)
    sent = WeightClient.update_weights_from_distributed

    async def swap_names(client: WeightClient, *, names: list[str], **fields: Any) -> None:
        a, b = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (2, 3))
        swapped = [{a: b, b: a}.get(name, name) for name in names]
        await sent(client, names=swapped, **fields)

    monkeypatch.setattr(WeightClient, "update_weights_from_distributed", swap_names)
    report = pusher.push(new.items(), 50, [endpoint])
    assert report.updated == []
    assert "rank 0: model.layers.1.mlp.experts.w13_weight has checksum" in report.failed[endpoint]
    monkeypatch.undo()
    assert pusher.push(new.items(), 51, [endpoint]).failed == {}


def test_running_requests_go_on_with_the_new_weights(
    sglang_server: Serve, make_pusher: Callable[..., WeightPusher], model_path: Path
) -> None:
    """Each says which version sampled which of its tokens."""
    endpoint = sglang_server(model_path)
    params = {"max_new_tokens": 100, "ignore_eos": True, "temperature": 0}
    answers: list[dict[str, Any]] = []

    def generate() -> None:
        body = {"input_ids": [[4, 5]] * 4, "sampling_params": params, "extra_key": "spans"}
        answers.extend(post(endpoint, "/generate", body))

    pusher = make_pusher(WeightSyncPath.distributed, verify_every=0)
    new = perturbed(model_path, 6)
    assert pusher.push(new.items(), 60, [endpoint]).failed == {}  # makes the group
    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.3)
    version = 60
    while thread.is_alive():
        version += 1
        assert pusher.push(new.items(), version, [endpoint]).failed == {}
    thread.join()
    assert version > 61
    for answer in answers:
        spans = answer["meta_info"]["weight_versions"]
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == 100
        assert len({span["version"] for span in spans}) == len(spans) > 1


def test_a_stopped_server_holds_nobody_up(
    sglang_server: Serve, make_pusher: Callable[..., WeightPusher], model_path: Path
) -> None:
    """All its processes get SIGSTOP in a warm group; the other server is updated, and the pusher closes."""
    good, bad = sglang_server(model_path), sglang_server(model_path, tp=2)
    pusher = make_pusher(WeightSyncPath.distributed, timeout_s=8.0)
    new = perturbed(model_path, 7)
    assert pusher.push(new.items(), 70, [good, bad]).failed == {}
    port = int(bad.rpartition(":")[2])
    [launcher] = [
        c.pid
        for c in psutil.net_connections("tcp")
        if c.laddr and c.laddr.port == port and c.status == "LISTEN"
    ]
    family = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    for process in family:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        report = pusher.push(new.items(), 71, [good, bad])
        assert report.updated == [good]
        assert bad in report.failed
        assert time.monotonic() - start < 16
        start = time.monotonic()
        pusher.close()
        assert time.monotonic() - start < 8
    finally:
        for process in family:
            os.kill(process.pid, signal.SIGCONT)
