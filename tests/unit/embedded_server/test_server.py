"""The server ends with an error, not silently, when its generator fails."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_drpo.embedded_server.server import EmbeddedServer
from megatron_drpo.errors import ModelError


def test_a_failed_generator_ends_the_server(
    tiny_moe: Path,
    serve_in_thread: Callable[..., AbstractContextManager[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[str] = []

    def record(args: threading.ExceptHookArgs) -> None:
        failures.append(str(args.exc_value))

    monkeypatch.setattr(threading, "excepthook", record)
    server = EmbeddedServer(model_path=tiny_moe, dtype=torch.float32, num_slots=2, deterministic=False)

    def fail(tokens: list[int], positions: list[int]) -> torch.Tensor:
        raise MemoryError("no room")

    server.generator._runner.decode = fail  # pyrefly: ignore
    with (
        serve_in_thread(server.serve, lambda: None) as url,
        httpx.Client(trust_env=False, timeout=10) as http,
    ):
        response = http.post(f"{url}/generate", json={"input_ids": [3]})
    assert response.status_code == 500
    assert "stopped while generating" in response.json()["error"]["message"]
    assert failures == ["no room", "the generator has failed"]


def test_bfloat16_is_served_in_bfloat16(tiny_moe: Path) -> None:
    server = EmbeddedServer(model_path=tiny_moe, dtype=torch.bfloat16, num_slots=2, deterministic=True)
    assert {p.dtype for p in server.generator._runner.model.parameters()} == {torch.bfloat16}
    logits = server.generator.call(lambda: server.generator._runner.decode([3, 4], [0, 0])).result(10)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    server.generator.close()


def test_a_copy_of_tied_embeddings(
    hf_model: Callable[[str], Path],
    tmp_path: Path,
    serve_in_thread: Callable[..., AbstractContextManager[str]],
) -> None:
    """A folder with an equal copy is served and taken as an update; with another matrix it is neither."""
    tensors = load_file(hf_model("dense_tied") / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for name, head in (("equal", embedding.clone()), ("other", embedding + 1)):
        shutil.copytree(hf_model("dense_tied"), tmp_path / name)
        save_file({**tensors, "lm_head.weight": head}, tmp_path / name / "model.safetensors")
    expected = r"'lm_head\.weight' .+ is not 'model\.embed_tokens\.weight'"
    with pytest.raises(ModelError, match=expected):
        EmbeddedServer(model_path=tmp_path / "other", dtype=torch.float32, num_slots=2, deterministic=False)
    server = EmbeddedServer(
        model_path=tmp_path / "equal", dtype=torch.float32, num_slots=2, deterministic=False
    )
    with (
        serve_in_thread(server.serve, server.stop) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=10) as http,
    ):
        answers = [
            http.post(
                "/update_weights_from_disk",
                json={"model_path": str(tmp_path / name), "weight_version": name},
            )
            for name in ("equal", "other")
        ]
    assert [answer.json()["success"] for answer in answers] == [True, False]
    assert "'lm_head.weight'" in answers[1].json()["message"]
