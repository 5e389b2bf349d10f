"""Embedded servers, and a stand-in for SGLang that fails on demand, in threads of the test process."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_drpo.embedded_server.server import EmbeddedServer
from megatron_drpo.weight_sync.wire import decode_bucket
from tests.nccl_like import NcclLike, Options

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def model_path(hf_model: Callable[[str], Path]) -> Path:
    return hf_model("moe_renormalised")


@pytest.fixture
def new(model_path: Path) -> Tensors:
    """Other weights for the model of `model_path`."""
    torch.manual_seed(3)
    tensors = load_file(model_path / "model.safetensors")
    return {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def make_endpoint(
    model_path: Path, serve_in_thread: Callable[..., AbstractContextManager[str]]
) -> Iterator[Callable[[], str]]:
    """`make_endpoint()`: base URL of a new embedded server of `model_path`, version 0."""
    with ExitStack() as stack:

        def make() -> str:
            server = EmbeddedServer(
                model_path=model_path, dtype=torch.float32, num_slots=4, deterministic=False
            )
            return stack.enter_context(serve_in_thread(server.serve, server.stop))

        yield make


@pytest.fixture
def endpoint(make_endpoint: Callable[[], str]) -> str:
    return make_endpoint()


class StandIn:
    """Speaks SGLang's weight-update protocol, joins groups as SGLang does, and keeps what it is given.

    A group asked for as `nccl` has NCCL's habits. `faults`: path -> 500, reset or hang; what happens instead
    of an answer to it. `delays_s`: path -> seconds before the answer to it.
    """

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.delays_s: dict[str, float] = {}
        self.asked: list[str] = []
        self.received: Tensors = {}
        self.info: dict[str, Any] = {
            "tp_size": 1,
            "version": "0.5.23",
            "device": "cuda",
            "dtype": "bfloat16",
        }
        self.nccl = Options(device=f"of stand-in {id(self)}")
        self.broadcasts: list[list[str]] = []
        """The names in each."""
        self.version = "0"
        self.checksum = "same"
        self.compute_checksums: Callable[[Tensors], list[dict[str, str]]] | None = None
        """Of what it has received; not given: one parameter has `checksum`."""
        self.released = threading.Event()
        self._groups: dict[str, Any] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stand_in.handle(self)

            def do_POST(self) -> None:
                stand_in.handle(self)

            def log_message(self, format: str, *args: Any) -> None:  # quiet
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length", 0))) or "{}")
        self.asked.append(request.path)
        self.released.wait(self.delays_s.get(request.path, 0.0))
        fault = self.faults.get(request.path)
        if fault == "hang":
            self.released.wait(20)
        if fault in ("hang", "reset"):
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        answer = json.dumps(self._answer(request.path, body) if fault is None else {"message": "broken"})
        request.send_response(200 if fault is None else 500)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer.encode())

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"success": True, "message": ""}
        if path == "/server_info":
            return self.info
        if path == "/model_info":
            return {"weight_version": self.version}
        if path == "/weights_checker":
            ranks = [{"w": self.checksum}]
            if self.compute_checksums is not None:
                ranks = self.compute_checksums(self.received)
            return {**answer, "ranks": [{"checksums": checksums} for checksums in ranks]}
        if path == "/init_weights_update_group":
            self._groups[body["group_name"]] = _join(body, self.nccl)
        elif path == "/update_weights_from_distributed":
            self._receive(body)
        elif path == "/update_weights_from_tensor":
            self.received |= dict(decode_bucket(body["serialized_named_tensors"][0]))
        elif path == "/destroy_weights_update_group":
            del self._groups[body["group_name"]]
        self.version = body.get("weight_version") or self.version
        return answer

    def _receive(self, body: dict[str, Any]) -> None:
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in zip(body["shapes"], dtypes, strict=True)
        ]
        data = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.broadcasts.append(body["names"])
        self._groups[body["group_name"]].broadcast([data], options).wait()
        parts = zip(body["names"], data.split(sizes), dtypes, body["shapes"], strict=True)
        self.received |= {name: part.view(dtype).view(shape) for name, part, dtype, shape in parts}


def _join(body: dict[str, Any], nccl: Options) -> Any:
    """SGLang's init_custom_process_group, without a default group."""
    name = body["group_name"]
    rank, world_size = body["rank_offset"], body["world_size"]
    store: dist.Store = dist.TCPStore(
        body["master_address"],
        body["master_port"],
        world_size,
        is_master=False,
        timeout=timedelta(seconds=20),
    )
    is_nccl = body["backend"] == "nccl"
    for prefix in (name, f"{name}/", "cuda/" if is_nccl else "cpu/"):
        store = dist.PrefixStore(prefix, store)
    if is_nccl:
        return NcclLike(store, rank, world_size, nccl)
    return dist.ProcessGroupGloo(store, rank, world_size, timeout=timedelta(seconds=20))


@pytest.fixture
def make_stand_in() -> Iterator[Callable[[], StandIn]]:
    """`make_stand_in()`: a running `StandIn`."""
    with ExitStack() as stack:

        def make() -> StandIn:
            stand_in = StandIn()
            thread = threading.Thread(target=stand_in.http.serve_forever, args=(0.01,))
            thread.start()
            stack.callback(stand_in.http.server_close)
            stack.callback(thread.join, 10.0)
            stack.callback(stand_in.http.shutdown)
            stack.callback(stand_in.released.set)
            return stand_in

        yield make


@pytest.fixture
def stopwatch() -> Callable[[], float]:
    """`stopwatch()`: seconds since the test began."""
    start = time.monotonic()
    return lambda: time.monotonic() - start
