"""The status of servers that run, that hang, and of fleets that are gone."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.state import FleetState, ServerState, ServerStatus
from megatron_drpo.fleet.status import look, status
from megatron_drpo.rollout.client import ServerLoad

pytestmark = pytest.mark.server

LOADS = [
    {"num_running_reqs": 48, "num_waiting_reqs": 3, "gen_throughput": 1200.5},
    {"num_running_reqs": 2, "num_waiting_reqs": 0, "gen_throughput": 34.0},
]
"""Of two schedulers."""


def busy_server(api_key: str | None = None) -> Starlette:
    """Answers as SGLang does with --dp-size 2."""

    def guarded(answer: object) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            if api_key is not None and request.headers.get("Authorization") != f"Bearer {api_key}":
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            return JSONResponse(answer)

        return endpoint

    return Starlette(
        routes=[
            Route("/model_info", guarded({"model_path": "m", "weight_version": "12"})),
            Route("/v1/loads", guarded({"version": "0.5.23", "loads": LOADS})),
        ]
    )


@pytest.fixture
def owner() -> Iterator[int]:
    """The pid of a process that looks like the owner of a fleet."""
    code = "import sys; sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, "megatron-drpo"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def write_fleet(folder: Path, pid: int, *servers: ServerState) -> None:
    FleetState(pid=pid, servers=list(servers)).write(folder / "fleet.json")


def lines_of(folder: Path, **options: Any) -> list[str]:
    stream = io.StringIO()
    status(str(folder), console=Console(file=stream), **options)
    return stream.getvalue().splitlines()


def test_servers_that_run(
    serve: Callable[..., str], serve_app: Callable[[Any], str], owner: int, tmp_path: Path
) -> None:
    """The embedded server does not tell its load."""
    now = time.time()
    busy, embedded = serve_app(busy_server()), serve()
    up = ServerStatus.up
    servers = [
        ServerState(name="rollout server 0", endpoint=busy, state=up, num_restarts=1, last_healthy=now - 130),
        ServerState(
            name="rollout server 1",
            endpoint=embedded,
            state=up,
            num_failures=2,
            last_error="died, exit code -9\nmore",
            last_healthy=now - 30,
        ),
    ]
    write_fleet(tmp_path, owner, *servers)
    report = look(tmp_path / "fleet.json")
    assert report.problem == ""
    assert report.owner_runs
    assert [server.is_up for server in report.servers] == [True, True]
    assert [server.policy_version for server in report.servers] == ["12", "0"]
    assert report.servers[0].load == ServerLoad(num_running=50, num_queued=3, tokens_per_s=1234.5)
    assert report.servers[1].load is None
    head, *rows = lines_of(tmp_path)
    assert head.split() == [
        *("server", "endpoint", "state", "weights", "running", "queued", "tokens/s", "failures", "restarts"),
        *("healthy", "last", "error"),
    ]
    assert [" ".join(row.split()) for row in rows] == [
        f"server 0 {busy} up 12 50 3 1,234 0 1 2 min",
        f"server 1 {embedded} up 0 – – – 2 0 30 s died, exit code -9",
    ]
    shown = json.loads("\n".join(lines_of(tmp_path, as_json=True)))
    assert shown["servers"][0] == {
        **asdict(servers[0]),
        "answers": True,
        "policy_version": "12",
        "num_running": 50,
        "num_queued": 3,
        "tokens_per_s": 1234.5,
    }
    assert shown["servers"][1]["num_running"] is None


def test_a_server_that_wants_a_key(serve_app: Callable[[Any], str], owner: int, tmp_path: Path) -> None:
    endpoint = serve_app(busy_server(api_key="secret"))
    write_fleet(tmp_path, owner, ServerState(name="a", endpoint=endpoint, state=ServerStatus.up))
    path = tmp_path / "fleet.json"
    assert [look(path, key).servers[0].is_up for key in (None, "wrong", "secret")] == [False, False, True]


def test_servers_that_do_not_answer(serve_app: Callable[[Any], str], owner: int, tmp_path: Path) -> None:
    async def hang(request: Request) -> Response:
        await asyncio.sleep(10)
        return Response()

    hanging = serve_app(Starlette(routes=[Route("/{path:path}", hang)]))
    states = (ServerStatus.up, ServerStatus.up, ServerStatus.starting)
    endpoints = (hanging, "http://127.0.0.1:1", "")
    servers = [
        ServerState(name=f"s{i}", endpoint=endpoint, state=state)
        for i, (endpoint, state) in enumerate(zip(endpoints, states, strict=True))
    ]
    write_fleet(tmp_path, owner, *servers)
    start = time.monotonic()
    rows = [row.split()[2:5] for row in lines_of(tmp_path)[1:]]
    assert time.monotonic() - start < 5.0, "asked at once, 2 s at most"
    assert rows == [["no", "answer", "–"], ["no", "answer", "–"], ["starting", "–", "–"]]


def test_a_fleet_whose_owner_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    state = ServerState(name="s", endpoint="http://127.0.0.1:1", state=ServerStatus.up)
    write_fleet(tmp_path, gone.pid, state)
    stream = io.StringIO()
    with pytest.raises(RolloutError) as caught:
        status(str(tmp_path), console=Console(file=stream))
    assert str(caught.value) == (
        f"{tmp_path}/fleet.json: its owner, process {gone.pid}, does not run on this machine, no server "
        "answers, and the file is 0 s old. If the fleet runs on another machine, ask there; otherwise start "
        "it again with `megatron-drpo fleet up`"
    )
    assert "no answer" in stream.getvalue()


def test_an_owner_elsewhere_whose_servers_answer(serve_app: Callable[[Any], str], tmp_path: Path) -> None:
    """The pid is another program's here: it says nothing of the servers."""
    endpoint = serve_app(busy_server())
    write_fleet(tmp_path, 1, ServerState(name="s", endpoint=endpoint, state=ServerStatus.up))
    report = look(tmp_path / "fleet.json")
    assert (report.owner_runs, report.problem) == (False, "")


def test_a_fleet_that_has_lost_all_servers(owner: int, tmp_path: Path) -> None:
    write_fleet(
        tmp_path, owner, ServerState(name="s", state=ServerStatus.left, last_error="died, exit code 1")
    )
    with pytest.raises(RolloutError, match=r"fleet\.json: no server is left; their logs say why"):
        lines_of(tmp_path)


@pytest.mark.parametrize(
    "content", [None, "{", '{"pid": 1}', '{"pid": 1, "updated": 0, "servers": [{"x": 1}]}']
)
def test_a_file_that_tells_nothing(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "fleet.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RolloutError, match=r"fleet\.json (cannot be read|does not describe a fleet)"):
        status(str(path))


def test_watching_goes_on_until_ctrl_c(serve_app: Callable[[Any], str], owner: int, tmp_path: Path) -> None:
    """In a terminal of its own; the second look sees what has changed since the first."""
    endpoint = serve_app(busy_server())
    server = ServerState(name="rollout server 0", endpoint=endpoint, state=ServerStatus.up)
    write_fleet(tmp_path, owner, server)
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "megatron_drpo.cli", "fleet", "status", str(tmp_path), "--watch"]
    environ = {**os.environ, "COLUMNS": "150", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environ)
    os.close(terminal)
    shown = ""
    try:
        while "50" not in shown:
            shown += os.read(main, 65536).decode(errors="replace")
        server.state, server.last_error = ServerStatus.restarting, "hangs"
        write_fleet(tmp_path, owner, server)
        while "rollout server 0: hangs" not in shown:
            shown += os.read(main, 65536).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
        process.wait()
        os.close(main)
