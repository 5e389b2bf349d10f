"""One rollout server as a child process: how it is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from megatron_drpo.config.schema import Dtype, RolloutConfig, RoutingReplay
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.nccl_environment import build_nccl_environment
from megatron_drpo.fleet.run_sglang import API_KEY
from megatron_drpo.rollout.time_limits import startup_limit_s

_NUM_LOG_LINES = 20
_KILL_TIMEOUT_S = 10.0
_DTYPE_NAMES = {Dtype.fp32: "float32", Dtype.bf16: "bfloat16"}
_SGLANG_SCRIPT = Path(__file__).with_name("run_sglang.py")
_SGLANG_ON_CPU = Path(__file__).with_name("sglang_cpu")
_CPU_MAX_TOTAL_TOKENS = 16384
"""SGLang would take most of the machine's memory for its cache."""
_MIN_WATCHDOG_S = 300.0
"""SGLang's own default. It ends a server that makes no progress for so long amid requests, which is also one
that loads new weights from a disk; that takes no longer than the start did."""
NO_VERSION = "-1"
"""Of weights that no trainer has sent; what a server has when it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server is to serve."""

    path: str
    """HF folder."""
    dtype: Dtype
    """The policy's."""
    routing_replay: RoutingReplay = RoutingReplay.none


class Server(Protocol):
    """A server that has been started, here or elsewhere."""

    name: str
    endpoint: str

    @property
    def pid(self) -> int:
        """Of its process, where that runs."""
        ...

    def exit_code(self) -> int | None:
        """None while it runs."""
        ...

    def generates(self, *, timeout_s: float, api_key: str | None = None) -> bool:
        """See the function of this name."""
        ...

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        ...

    def kill(self) -> None:
        """End it and every process that it started, at once: it has no state worth saving. Repeatable."""
        ...


class ServerProcess:
    """A server on this machine; it leads a process group of its own."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        log_path: Path,
        process: subprocess.Popen[bytes],
        reserved_port: socket.socket | None = None,
    ) -> None:
        """
        Args:
            reserved_port: stays open until the server is killed.
        """
        self.name = name
        self.endpoint = endpoint
        self.log_path = log_path
        self.process = process
        self.reserved_port = reserved_port

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        return self.process.poll()

    def generates(self, *, timeout_s: float, api_key: str | None = None) -> bool:
        return generates(self.endpoint, timeout_s=timeout_s, api_key=api_key)

    def log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:]
        return "\n".join([f"the end of {self.log_path}:", *lines])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_KILL_TIMEOUT_S)
        if self.reserved_port is not None:
            self.reserved_port.close()


def generates(endpoint: str, *, timeout_s: float, api_key: str | None = None) -> bool:
    """Whether /health_generate answers in time: a token was sampled, or requests in flight made progress."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # No certificates for plain HTTP: loading them takes 20 ms.
        with httpx.Client(trust_env=False, verify=False, timeout=timeout_s, headers=headers) as http:
            return http.get(f"{endpoint}/health_generate").is_success
    except httpx.RequestError:
        return False


def server_name(index: int) -> str:
    """What messages call it."""
    return f"rollout server {index}"


class StartServer(Protocol):
    """Starts the server of that number; its output is appended to `log_path`. Does not wait until it
    answers."""

    def __call__(self, index: int, log_path: Path) -> Server: ...


def start_embedded(config: RolloutConfig, model: ServedModel, index: int, log_path: Path) -> ServerProcess:
    """The server of `embedded_server/`."""
    embedded = config.embedded
    # The server inherits a socket that is bound already: no other process can take its port meanwhile.
    with socket.create_server((embedded.host, 0)) as sock:
        host, port = sock.getsockname()[:2]
        command = [
            *(sys.executable, "-m", "megatron_drpo.embedded_server"),
            *("--model-path", model.path, "--dtype", _DTYPE_NAMES[model.dtype]),
            *("--fd", str(sock.fileno()), "--parent-pid", str(os.getpid())),
            *("--num-slots", str(embedded.num_slots), "--num-threads", str(embedded.num_threads)),
            *("--weight-version", NO_VERSION),
            *(["--deterministic"] if config.deterministic else []),
        ]
        environment = {
            "OMP_NUM_THREADS": str(embedded.num_threads),
            # Threads that spin while they wait make a machine with fewer cores than threads crawl.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        process = _start(command, environment, log_path, pass_fds=[sock.fileno()])
    return ServerProcess(server_name(index), f"http://{host}:{port}", log_path, process)


def start_sglang(
    config: RolloutConfig, model: ServedModel, index: int, log_path: Path, *, first_gpu: int | None
) -> ServerProcess:
    """sglang.launch_server in the environment of `rollout.sglang.python`.

    Args:
        first_gpu: of server 0; the servers' GPUs follow each other. None: on the CPU.

    Raises:
        RolloutError: that interpreter does not exist.
    """
    sglang = config.sglang
    if not Path(sglang.python).is_file():
        raise RolloutError(
            f"rollout.sglang.python={sglang.python}: there is no such file; `make sglang-env` builds the "
            "environment of SGLang"
        )
    reserved_port = reserve_port(sglang.host)
    port = reserved_port.getsockname()[1]
    on_cpu = first_gpu is None
    arguments = [
        *("--model-path", model.path, "--dtype", _DTYPE_NAMES[model.dtype]),
        *("--host", sglang.host, "--port", str(port), "--tp-size", str(sglang.tensor_parallel_size)),
        *("--weight-version", NO_VERSION, "--skip-server-warmup"),
        *("--watchdog-timeout", f"{max(startup_limit_s(config), _MIN_WATCHDOG_S):.0f}"),
        *(_cpu_arguments() if first_gpu is None else _gpu_arguments(config, first_gpu, index)),
        *_given("--context-length", sglang.context_length),
        *_given("--max-total-tokens", sglang.max_total_tokens or (_CPU_MAX_TOTAL_TOKENS if on_cpu else None)),
        *(["--enable-return-routed-experts"] if model.routing_replay is RoutingReplay.rollout else []),
        *(["--enable-deterministic-inference"] if config.deterministic else []),
        *sglang.arguments,
    ]
    command = [sglang.python, "-P", str(_SGLANG_SCRIPT), str(os.getpid()), *arguments]
    environment = (
        _cpu_environment(sglang.tensor_parallel_size)
        if on_cpu
        else build_nccl_environment(sglang.arguments, os.environ)
    )
    if config.api_key is not None:
        environment[API_KEY] = config.api_key
    process = _start(command, environment, log_path)
    endpoint = f"http://{sglang.host}:{port}"
    return ServerProcess(server_name(index), endpoint, log_path, process, reserved_port)


def reserve_port(host: str) -> socket.socket:
    """A free TCP port of this host for a server that is told the number, as SGLang is, and opens it later.

    While the socket is open, the kernel gives the port to nobody who asks for any port; a server that names
    it and sets SO_REUSEADDR, as they do, can listen on it, because this socket does not. A port that is only
    looked up and closed again can be another process's once the server has loaded its model.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


def _given(flag: str, value: int | None) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _cpu_arguments() -> list[str]:
    return [
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        # Idle processes that spin would take the cores from the trainer.
        *("--max-running-requests", "512", "--sleep-on-idle"),
    ]


def _gpu_arguments(config: RolloutConfig, first_gpu: int, index: int) -> list[str]:
    gpu = first_gpu + index * config.sglang.tensor_parallel_size
    return ["--base-gpu-id", str(gpu), *(["--enable-memory-saver"] if config.colocated else [])]


def _cpu_environment(tensor_parallel_size: int) -> dict[str, str]:
    return {
        "PYTHONPATH": str(_SGLANG_ON_CPU),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes minutes and a compiler of C++
        "OMP_NUM_THREADS": "1",
        # Memory that a weight update has received into stays for the next one: to get new pages from the
        # kernel can take longer than to receive into them.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        # One core for each tensor-parallel rank.
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(tensor_parallel_size)),
    }


def _start(
    command: list[str], environment: dict[str, str], log_path: Path, pass_fds: list[int] | None = None
) -> subprocess.Popen[bytes]:
    # PYTHONWARNINGS: a trainer's filters are not for a server.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds or [],
            env={**inherited, "HF_HUB_OFFLINE": "1", **environment},
            start_new_session=True,  # Ctrl-C reaches the owner alone, which then ends its servers
        )
