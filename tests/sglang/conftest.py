"""Real SGLang servers on this machine's CPU.

A small launcher of its own, until the package's launcher of SGLang servers is merged: replace it then.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

_ROOT = Path(__file__).parents[2]
_PYTHON = _ROOT / ".venv-sglang" / "bin" / "python"
_SHIM = os.environ.get("SGLANG_CPU_SHIM")
"""The folder that makes SGLang importable without a GPU."""
_START_S = 150.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _SHIM is None or not _PYTHON.exists():
        for item in items:
            if item.get_closest_marker("sglang"):
                item.add_marker(pytest.mark.skip(reason="needs .venv-sglang and SGLANG_CPU_SHIM"))


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`sglang_server(model_path, tp=1)`: base URL of a server; the same one for the same arguments."""
    running: dict[tuple[Path, int], tuple[subprocess.Popen[bytes], str]] = {}

    def start(model_path: Path, tp: int = 1) -> str:
        key = (model_path, tp)
        if key not in running:
            log = tmp_path_factory.mktemp("sglang") / "log"
            running[key] = _start(model_path, tp, log)
            _wait(*running[key], log)
        return running[key][1]

    yield start
    for process, _ in running.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(model_path: Path, tp: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert _SHIM is not None
    options = (
        f"--model-path {model_path} --host 127.0.0.1 --port {port} --tp {tp} --dtype float32 --device cpu "
        "--attention-backend torch_native --sampling-backend pytorch --max-total-tokens 4096 "
        "--max-running-requests 16 --context-length 120 --weight-version 0 --sleep-on-idle"
    )
    environ = {
        **os.environ,
        "PYTHONPATH": _SHIM,
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp))),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [_PYTHON, "-m", "sglang.launch_server", *options.split()],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd=_ROOT,
            start_new_session=True,
        )
    return process, f"http://127.0.0.1:{port}"


def _wait(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{endpoint}/health", trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("\n".join(["the SGLang server did not start:", *log.read_text().splitlines()[-20:]]))
