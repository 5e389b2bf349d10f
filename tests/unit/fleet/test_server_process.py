"""How SGLang is started, with an interpreter that writes down what it is told."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_drpo.config.schema import Dtype, RolloutConfig, RoutingReplay, SGLangServerConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.server_process import ServedModel, reserve_port, start_sglang

INTERPRETER = """#!{python}
import json, os, sys, time
with open({path!r} + ".part", "w") as file:
    json.dump({{"argv": sys.argv[1:], "environ": dict(os.environ)}}, file)
os.rename({path!r} + ".part", {path!r})
time.sleep(60)
"""


def started(
    tmp_path: Path, model: ServedModel, *, first_gpu: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Arguments and environment of the process; it is gone afterwards, with all that it started."""
    told, python = tmp_path / "told.json", tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable, path=str(told)))
    python.chmod(0o755)
    sglang = SGLangServerConfig(python=str(python), **fields.pop("sglang", {}))
    config = RolloutConfig(sglang=sglang, **fields)
    server = start_sglang(config, model, 2, tmp_path / "log", first_gpu=first_gpu)
    try:
        deadline = time.monotonic() + 20
        while not told.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.exit_code() is None
        assert server.generates(timeout_s=0.5) is False
    finally:
        server.kill()
    assert not psutil.pid_exists(server.process.pid)
    return {**json.loads(told.read_text()), "endpoint": server.endpoint}


def flags(argv: list[str]) -> dict[str, str]:
    """Flag -> its value, or nothing."""
    return {
        flag: (following if not following.startswith("--") else "")
        for flag, following in zip(argv, [*argv[1:], "--"], strict=True)
        if flag.startswith("--")
    }


def test_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    model = ServedModel(path="model", dtype=Dtype.fp32, routing_replay=RoutingReplay.rollout)
    told = started(tmp_path, model, sglang={"tensor_parallel_size": 2, "arguments": ["--x", "1"]})
    assert told["argv"][:1] == ["-P"]
    assert told["argv"][1].endswith("run_sglang.py")
    assert told["argv"][2] == str(os.getpid())
    given = flags(told["argv"])
    expected = {
        "--model-path": "model",
        "--dtype": "float32",
        "--device": "cpu",
        "--tp-size": "2",
        "--weight-version": "-1",
        "--max-total-tokens": "16384",
        "--enable-return-routed-experts": "",
        "--sleep-on-idle": "",
        "--x": "1",
    }
    assert {flag: given.get(flag) for flag in expected} == expected
    assert told["endpoint"] == f"http://127.0.0.1:{given['--port']}"
    assert told["environ"]["TORCHDYNAMO_DISABLE"] == "1"
    assert told["environ"]["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    assert told["environ"]["PYTHONPATH"].endswith("sglang_cpu")
    assert "PYTHONWARNINGS" not in told["environ"]


def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the CPU's, and the key in the environment, not among the arguments that all can see."""
    monkeypatch.setenv("KEY", "secret")
    model = ServedModel(path="model", dtype=Dtype.bf16)
    told = started(
        tmp_path,
        model,
        first_gpu=4,
        deterministic=True,
        api_key_env="KEY",
        colocated=True,
        sglang={"tensor_parallel_size": 2},
    )
    given = flags(told["argv"])
    assert given["--dtype"] == "bfloat16"
    assert given["--base-gpu-id"] == "8", "after two servers of two GPUs each"
    assert "--enable-memory-saver" in given
    assert "--enable-deterministic-inference" in given
    for flag in ("--device", "--max-total-tokens", "--sleep-on-idle", "--enable-return-routed-experts"):
        assert flag not in given
    assert "SGLANG_USE_CPU_ENGINE" not in told["environ"]
    assert told["environ"]["MEGATRON_DRPO_SGLANG_API_KEY"] == "secret"
    assert "secret" not in told["argv"]


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    config = RolloutConfig(sglang=SGLangServerConfig(python="nowhere/python"))
    model = ServedModel(path="model", dtype=Dtype.fp32)
    with pytest.raises(RolloutError, match="nowhere/python: there is no such file; `make sglang-env`"):
        start_sglang(config, model, 0, tmp_path / "log", first_gpu=None)


def any_port_of(port: int) -> int:
    """What the kernel gives to who asks for any port, if this were the only one there is."""
    ip_local_port_range = 51  # linux/in.h; since Linux 6.3
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, ip_local_port_range, struct.pack("I", port << 16 | port))
        except OSError:
            pytest.skip("this kernel has no port range per socket")
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_port_stays_the_servers_until_it_listens() -> None:
    """A server that loads its model for minutes found its port taken: exit code 3 of uvicorn."""
    with reserve_port("127.0.0.1") as reserved:
        host, port = reserved.getsockname()
        with pytest.raises(OSError, match="Address already in use"):
            any_port_of(port)
        with (
            socket.create_server((host, port)) as server,  # sets SO_REUSEADDR
            socket.create_connection((host, port), timeout=5) as client,
        ):
            assert client.getpeername() == server.getsockname()
    assert any_port_of(port) == port


def test_the_port_is_free_once_the_server_is_killed(tmp_path: Path) -> None:
    model = ServedModel(path="model", dtype=Dtype.fp32)
    config = RolloutConfig(sglang=SGLangServerConfig(python=sys.executable))
    server = start_sglang(config, model, 0, tmp_path / "log", first_gpu=None)
    port = int(server.endpoint.rpartition(":")[2])
    try:
        with pytest.raises(OSError, match="Address already in use"):
            any_port_of(port)
    finally:
        server.kill()
    assert any_port_of(port) == port
