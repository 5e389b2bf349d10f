"""Embedded servers as child processes of the supervisor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from megatron_drpo.config import Dtype, RolloutConfig
from megatron_drpo.errors import RolloutError

_POLL_S = 0.1
_STOP_TIMEOUT_S = 5.0
_NUM_LOG_LINES = 20
_DTYPE_NAMES = {Dtype.fp32: "float32", Dtype.bf16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class _Server:
    name: str
    endpoint: str
    log_path: Path
    process: subprocess.Popen[bytes]

    def log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:]
        return "\n".join([f"the end of {self.log_path}:", *lines])


class EmbeddedServers:
    """Starts servers on free ports of this machine and stops them in every way out.

    A context manager: entering starts all servers and waits until they answer. Should this process be
    killed, each server notices within a second and exits.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str | Path,
        dtype: Dtype,
        run_dir: str | Path,
        num_servers: int = 1,
        weight_version: int = 0,
    ) -> None:
        """
        Args:
            dtype: of the served weights: the policy's.
            run_dir: each server's output goes to logs/rollout_server_N.log below it.
            weight_version: of the weights in `model_path`.
        """
        self._config = config
        self._model_path = model_path
        self._dtype = dtype
        self._log_dir = Path(run_dir) / "logs"
        self._num_servers = num_servers
        self._weight_version = weight_version
        self._servers: list[_Server] = []

    @property
    def endpoints(self) -> list[str]:
        """Base URLs, in order."""
        return [server.endpoint for server in self._servers]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all servers and wait until they answer /health.

        Raises:
            RolloutError: a server died or did not answer within rollout.startup_timeout_s; shows the end of
                its log. None is left running then.
        """
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            for index in range(self._num_servers):
                self._servers.append(self._spawn(index))
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raise RolloutError, with the end of its log, if a server has died."""
        for server in self._servers:
            code = server.process.poll()
            if code is not None:
                raise RolloutError(
                    f"{server.name} ({server.endpoint}) died, exit code {code}; {server.log_tail()}"
                )

    def stop(self) -> None:
        """End all servers; harmless when there are none."""
        for server in self._servers:
            server.process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for server in self._servers:
            try:
                server.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()
        self._servers = []

    def _spawn(self, index: int) -> _Server:
        embedded = self._config.embedded
        log_path = self._log_dir / f"rollout_server_{index}.log"
        # The server inherits a socket that is bound already: no other process can take its port meanwhile.
        with socket.create_server((embedded.host, 0)) as sock, log_path.open("ab") as log:
            host, port = sock.getsockname()[:2]
            command = [
                *(sys.executable, "-m", "megatron_drpo.rollout.embedded"),
                *("--model-path", str(self._model_path), "--dtype", _DTYPE_NAMES[self._dtype]),
                *("--fd", str(sock.fileno()), "--parent-pid", str(os.getpid())),
                *("--num-slots", str(embedded.num_slots), "--num-threads", str(embedded.num_threads)),
                *("--weight-version", str(self._weight_version)),
                *(["--deterministic"] if self._config.deterministic else []),
            ]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[sock.fileno()],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(embedded.num_threads),
                    # Threads that spin while they wait make a machine with fewer cores than threads crawl.
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "HF_HUB_OFFLINE": "1",
                },
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which then stops the servers
            )
        return _Server(f"rollout server {index}", f"http://{host}:{port}", log_path, process)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._config.startup_timeout_s
        with httpx.Client(trust_env=False, timeout=1.0) as http:
            for server in self._servers:
                while not _answers(http, server.endpoint):
                    self.check()
                    if time.monotonic() > deadline:
                        raise RolloutError(
                            f"{server.name} ({server.endpoint}) did not answer within rollout."
                            f"startup_timeout_s={self._config.startup_timeout_s:g}; {server.log_tail()}"
                        )
                    time.sleep(_POLL_S)


def _answers(http: httpx.Client, endpoint: str) -> bool:
    try:
        return http.get(f"{endpoint}/health").is_success
    except httpx.TransportError:
        return False
