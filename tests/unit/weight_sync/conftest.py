"""Embedded servers in threads of the test process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from megatron_drpo.rollout.embedded.server import EmbeddedServer


@pytest.fixture(scope="session")
def model_path(hf_model: Callable[[str], Path]) -> Path:
    return hf_model("moe_renormalised")


@pytest.fixture
def make_endpoint(model_path: Path) -> Iterator[Callable[[], str]]:
    """`make_endpoint()`: base URL of a new server of `model_path`, version 0."""
    with ExitStack() as stack:

        def make() -> str:
            server = EmbeddedServer(
                model_path=model_path, dtype=torch.float32, num_slots=4, deterministic=False
            )
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            thread = threading.Thread(target=server.serve, args=(sock,))
            thread.start()
            stack.callback(thread.join, 10.0)
            stack.callback(server.stop)
            return f"http://127.0.0.1:{sock.getsockname()[1]}"

        yield make


@pytest.fixture
def endpoint(make_endpoint: Callable[[], str]) -> str:
    return make_endpoint()
