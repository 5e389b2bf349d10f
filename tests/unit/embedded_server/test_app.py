"""The endpoints, over HTTP."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from megatron_drpo.weight_sync.bucket import BucketPacker
from megatron_drpo.weight_sync.checksum import compute_checksum
from megatron_drpo.weight_sync.wire import encode_bucket
from megatron_drpo.weights.hf_folder import HfWriter

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def http(serve: Serve) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serve(num_slots=4), trust_env=False, timeout=10) as client:
        yield client


@pytest.fixture
def tensors(tiny_moe: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_moe / "model.safetensors")


def message_of(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def update_body(tensors: dict[str, torch.Tensor], version: str | None) -> dict[str, Any]:
    [bucket] = BucketPacker(2**20, torch.device("cpu")).pack(tensors.items())
    payload = encode_bucket(bucket).decode()
    return {
        "serialized_named_tensors": [payload],
        "load_format": "flattened_bucket",
        "weight_version": version,
        "flush_cache": False,
    }


def version_of(http: httpx.Client) -> str:
    return http.get("/model_info").json()["weight_version"]


def test_one_response_has_sglangs_shape(http: httpx.Client) -> None:
    params = {"max_new_tokens": 3, "temperature": 0}
    body = {"input_ids": [4, 5], "rid": "mine", "return_logprob": True, "sampling_params": params}
    response = http.post("/generate", json=body).json()
    meta = response["meta_info"]
    assert {"output_ids", "meta_info"} <= response.keys()
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", 2, 3)
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": 3}]
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [
        [i, None] for i in response["output_ids"]
    ]
    assert meta["e2e_latency"] > 0
    batch = http.post("/generate", json={**body, "input_ids": [[4, 5]]}).json()
    assert [item["output_ids"] for item in batch] == [response["output_ids"]]


def test_the_models_own_end_token_stops(http: httpx.Client) -> None:
    """generation_config.json of the tiny model names token 1."""
    params = {"max_new_tokens": 200, "sampling_seed": 3}
    response = http.post("/generate", json={"input_ids": [[4]] * 4, "sampling_params": params}).json()
    ended = [item for item in response if item["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended
    for item in ended:
        assert item["output_ids"].index(1) == len(item["output_ids"]) - 1
        assert item["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/generate", b"no json", "the body is not JSON"),
        ("/generate", b"[1]", "must be a JSON object"),
        ("/generate", b'{"input_ids": [99]}', "input id 99"),
        ("/abort_request", b"{}", "give rid"),
        ("/weights_checker", b'{"action": "snapshot"}', "action must be 'checksum'"),
        ("/update_weights_from_tensor", b'{"serialized_named_tensors": []}', "list of one base64 string"),
        (
            "/update_weights_from_tensor",
            b'{"serialized_named_tensors": ["AA=="], "load_format": "direct"}',
            "load_format must be flattened_bucket or null",
        ),
    ],
)
def test_bad_bodies_are_400_with_a_reason(
    http: httpx.Client, path: str, content: bytes, message: str
) -> None:
    assert message in message_of(http.post(path, content=content))


def test_health_and_information(http: httpx.Client, tiny_moe: Path) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/health_generate").status_code == 200
    info = http.get("/server_info").json()
    assert info["tp_size"] == 1
    assert info["context_length"] == 256
    assert info["enable_deterministic_inference"] is False
    assert info["model_path"] == str(tiny_moe)


def test_an_update_over_http_is_verified_by_its_checksum(
    http: httpx.Client, tensors: dict[str, torch.Tensor]
) -> None:
    new = {name: tensor * 1.5 for name, tensor in tensors.items()}
    assert http.post("/begin_weight_update", json={}).json()["success"] is True
    assert http.post("/update_weights_from_tensor", json=update_body(new, "7")).json()["success"] is True
    before = version_of(http)
    assert http.post("/end_weight_update", json={}).json()["success"] is True
    assert version_of(http) == "7" != before
    answer = http.post("/weights_checker", json={"action": "checksum"}).json()
    assert answer["per_engine_checksum"] == compute_checksum(new.items())
    assert answer["ranks"][0]["checksums"].keys() == new.keys()


def test_a_refused_update_says_why_and_keeps_the_version(
    http: httpx.Client, tensors: dict[str, torch.Tensor]
) -> None:
    version = version_of(http)
    http.post("/begin_weight_update", json={})
    first, *others = tensors
    some = {name: tensors[name] for name in others}
    response = http.post(
        "/update_weights_from_tensor", json=update_body({**some, "x.y": tensors[first]}, "99")
    )
    assert "unknown tensor 'x.y'" in message_of(response)
    assert response.json()["success"] is False
    http.post("/begin_weight_update", json={})
    http.post("/update_weights_from_tensor", json=update_body(some, "99"))
    assert first in message_of(http.post("/end_weight_update", json={}))
    assert version_of(http) == version


def test_a_pause_holds_requests_in_place(http: httpx.Client, tensors: dict[str, torch.Tensor]) -> None:
    """Nothing is sampled until they continue; the update in between splits the response's versions."""
    params = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
    answers: list[httpx.Response] = []

    def generate() -> None:
        answers.append(http.post("/generate", json={"input_ids": [4], "sampling_params": params}))

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.05)
    assert http.post("/pause_generation", json={"mode": "in_place"}).status_code == 200
    thread.join(1.0)
    assert thread.is_alive()
    http.post("/begin_weight_update", json={})
    http.post("/update_weights_from_tensor", json=update_body(tensors, "paused"))
    http.post("/end_weight_update", json={})
    assert http.post("/continue_generation", json={}).status_code == 200
    thread.join(10.0)
    spans = answers[0].json()["meta_info"]["weight_versions"]
    assert (spans[0]["start"], spans[-1]["end"], spans[-1]["version"]) == (0, 200, "paused")
    assert len(spans) == 2
    assert "in_place" in message_of(http.post("/pause_generation", json={"mode": "abort"}))


def test_an_update_from_disk(
    http: httpx.Client, tensors: dict[str, torch.Tensor], tiny_moe: Path, tmp_path: Path
) -> None:
    new = {name: tensor * 0.5 for name, tensor in tensors.items()}
    with HfWriter(tmp_path / "new", source=tiny_moe) as writer:
        for name, tensor in new.items():
            writer.add(name, tensor)
    body = {"model_path": str(tmp_path / "new"), "weight_version": "disk"}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
    assert version_of(http) == "disk"
    answer = http.post("/weights_checker", json={"action": "checksum"}).json()
    assert answer["per_engine_checksum"] == compute_checksum(new.items())
    body["model_path"] = str(tmp_path / "none")
    assert "no such folder" in message_of(http.post("/update_weights_from_disk", json=body))
    assert version_of(http) == "disk"


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_and_not_run(http: httpx.Client, tmp_path: Path) -> None:
    payload = base64.b64encode(pickle.dumps([("a", _Hostile(tmp_path / "made"))])).decode()
    http.post("/begin_weight_update", json={})
    response = http.post("/update_weights_from_tensor", json={"serialized_named_tensors": [payload]})
    assert "posix.mkdir is not allowed" in message_of(response)
    assert not (tmp_path / "made").exists()


def test_a_client_that_goes_away_frees_its_slots(serve: Serve) -> None:
    """Four slots busy for long, the client hangs up, and the next request is served at once."""
    url = serve(num_slots=4)
    host, port = url.removeprefix("http://").split(":")
    body = httpx.Request(
        "POST",
        f"{url}/generate",
        json={"input_ids": [[4]] * 400, "sampling_params": {"max_new_tokens": 250, "ignore_eos": True}},
    )
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body.content)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body.content)
        time.sleep(0.2)
    start = time.monotonic()
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
        assert http.get("/health_generate").status_code == 200
    assert time.monotonic() - start < 5  # all 100,000 tokens would take several times as long


def test_abort_over_http(http: httpx.Client) -> None:
    """An unknown id is no error, as in SGLang."""
    assert http.post("/abort_request", json={"rid": "unknown"}).status_code == 200
    assert http.post("/abort_request", json={"abort_all": True}).status_code == 200
    assert http.get("/health_generate").status_code == 200
