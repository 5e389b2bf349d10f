"""An embedded server in a thread of the test process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_drpo.rollout.embedded.server import EmbeddedServer


@pytest.fixture(scope="session")
def model_path(hf_model: Callable[[str], Path]) -> Path:
    return hf_model("moe_renormalised")


@pytest.fixture
def endpoint(model_path: Path) -> Iterator[str]:
    """Base URL of a new server of `model_path`, version 0."""
    server = EmbeddedServer(model_path=model_path, dtype=torch.float32, num_slots=4, deterministic=False)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.serve, args=(sock,))
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.stop()
        thread.join(10)
