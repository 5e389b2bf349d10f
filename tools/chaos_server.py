"""Stands where SGLang's interpreter should and does harm: the server behind a proxy that can hurt it.

`rollout.sglang.python` names a script that calls this one (`write_interpreter`). It starts the real server on
another port and passes requests on. When a request arrives for which a fault is planned (`plan_fault`), it
claims the plan and carries it out.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from megatron_drpo.runtime.process_end import die_with_parent

_FOLDER = "CHAOS_FOLDER"
_PYTHON = "CHAOS_PYTHON"
_PLAN = "next.json"
_MAX_DELAY_S = 0.15
"""A fault strikes while the server works on the request, at a random moment."""


class Fault(StrEnum):
    kill = "kill"
    """kill -9 of the server."""
    stop = "stop"
    """SIGSTOP of the server and all its processes."""
    reset = "reset"
    """The server gets the request, the client a TCP reset."""
    failure = "failure"
    """HTTP 500, and the server never sees the request."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One fault that waits for its request."""

    number: int
    fault: Fault
    path: str
    """Prefix of the requests that it strikes, such as /generate."""


def write_interpreter(folder: Path, python: Path) -> Path:
    """A script to give as rollout.sglang.python; plans and claims lie in the same folder."""
    script = folder / "python"
    proxy = Path(__file__).resolve()
    script.write_text(
        f'#!/bin/sh\n{_FOLDER}={folder} {_PYTHON}={python} exec {sys.executable} {proxy} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def plan_fault(folder: Path, plan: Plan) -> None:
    """The next request to any server whose path fits is struck."""
    partial = folder / "plan.partial"
    partial.write_text(json.dumps(asdict(plan)))
    partial.rename(folder / _PLAN)


def withdraw_fault(folder: Path) -> bool:
    """Take the plan back; False if it has been claimed."""
    try:
        (folder / _PLAN).rename(folder / "withdrawn.json")
    except FileNotFoundError:
        return False
    return True


def is_claimed(folder: Path, plan: Plan) -> bool:
    return (folder / f"claimed_{plan.number}.json").exists()


# ------------------------------------------------------------------------------------ in the proxy


class _Proxy:
    """One server's proxy."""

    def __init__(self, folder: Path, server: subprocess.Popen[bytes], port: int) -> None:
        self.folder = folder
        self.server = server
        self.port = port

    async def serve(self, host: str, port: int) -> int:
        """Until the server ends; its exit code."""
        listener = await asyncio.start_server(self.handle, host, port, limit=2**30)
        async with listener:
            while (code := self.server.poll()) is None:
                await asyncio.sleep(0.05)
        return code

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while head := await _read_head(reader):
                request = head + await reader.readexactly(_content_length(head))
                plan = self.claim(head.split(b" ", 2)[1].decode())
                if plan is not None and plan.fault is Fault.failure:
                    writer.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 5\r\n\r\nchaos")
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection("127.0.0.1", self.port, limit=2**30)
                upstream[1].write(request)
                await upstream[1].drain()
                if plan is not None and not await self.strike(plan, writer):
                    return
                answer = await _read_head(upstream[0])
                if not answer:
                    return
                writer.write(answer + await upstream[0].readexactly(_content_length(answer)))
                await writer.drain()
        except (OSError, EOFError):  # one side is gone: so is the other
            pass
        finally:
            writer.close()
            if upstream is not None:
                upstream[1].close()

    def claim(self, path: str) -> Plan | None:
        """The plan, if it is for this path and no other server was faster."""
        try:
            values = json.loads((self.folder / _PLAN).read_text())
            plan = Plan(values["number"], Fault(values["fault"]), values["path"])
            if not path.startswith(plan.path):
                return None
            (self.folder / _PLAN).rename(self.folder / f"claimed_{plan.number}.json")
        except FileNotFoundError:
            return None
        return plan

    async def strike(self, plan: Plan, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection to the client still stands."""
        await asyncio.sleep(random.random() * _MAX_DELAY_S)
        if plan.fault is Fault.reset:
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        server, *others = psutil.Process(self.server.pid).children(recursive=True)
        if plan.fault is Fault.kill:
            server.kill()
        else:
            for process in (server, *others):
                process.suspend()
        return True


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """Up to the empty line; nothing at the end of the connection."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def _start_server(arguments: list[str], port: int) -> subprocess.Popen[bytes]:
    """The real server with its guard on `port`, in a process group of its own, ended with this process."""
    given = list(arguments)
    given[given.index("--port") + 1] = str(port)
    given[2] = str(os.getpid())  # -P script PARENT_PID ...
    return subprocess.Popen([os.environ[_PYTHON], *given], process_group=0)


def main() -> int:
    arguments = sys.argv[1:]
    die_with_parent(int(arguments[2]))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        inner_port = sock.getsockname()[1]
    host, port = (arguments[arguments.index(flag) + 1] for flag in ("--host", "--port"))
    server = _start_server(arguments, inner_port)
    proxy = _Proxy(Path(os.environ[_FOLDER]), server, inner_port)
    try:
        return asyncio.run(proxy.serve(host, int(port)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
