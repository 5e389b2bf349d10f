"""`megatron-drpo fleet status`: what a fleet's owner says of its servers, and what they say themselves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.state import (
    FLEET_FILE,
    ServerState,
    ServerStatus,
    find_owner,
    read_fleet,
)
from megatron_drpo.rollout.client import ServerLoad, SGLangClient
from megatron_drpo.runtime.process_end import ends_in_order_on_sigterm

REFRESH_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_MAX_ERROR_CHARACTERS = 100
_PLAIN_WIDTH = 240
_COLOURS = {
    ServerStatus.up: "green",
    ServerStatus.starting: "yellow",
    ServerStatus.restarting: "yellow",
    ServerStatus.left: "red",
}
_UNKNOWN = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """One server: its owner's words and its own."""

    state: ServerState
    policy_version: str | None = None
    """Of the weights it has; None: it does not answer."""
    load: ServerLoad | None = None
    """None: it does not tell."""

    @property
    def answers(self) -> bool:
        return self.policy_version is not None

    @property
    def is_up(self) -> bool:
        """Its owner says so, and it answers."""
        return self.state.state is ServerStatus.up and self.answers

    def healthy_age_s(self, now: float) -> float | None:
        """Seconds since a generation last proved it alive, at the Unix time `now`; None: none has yet."""
        return max(now - self.state.last_healthy, 0.0) if self.state.last_healthy else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """All servers of a fleet, at one time."""

    path: str
    pid: int
    """Of the owner."""
    updated: float
    """Unix seconds of the owner's latest word."""
    servers: list[ServerReport] = field(default_factory=list)
    owner_runs: bool = True

    @property
    def problem(self) -> str:
        """Why nothing can be expected of this fleet, and what to do; empty if all is well."""
        if not self.owner_runs and not any(server.answers for server in self.servers):
            age = _age(time.time() - self.updated)
            return (
                f"{self.path}: its owner, process {self.pid}, does not run on this machine, no server "
                f"answers, and the file is {age} old. If the fleet runs on another machine, ask there; "
                "otherwise start it again with `megatron-drpo fleet up`"
            )
        if all(server.state.state is ServerStatus.left for server in self.servers):
            return f"{self.path}: no server is left; their logs say why"
        return ""

    def to_json(self) -> str:
        """One object; an element of `servers` has the fields of fleet.json, and what the server said."""
        servers = [
            {**asdict(server.state), "answers": server.answers, "policy_version": server.policy_version}
            | (dict.fromkeys(ServerLoad.__slots__) if server.load is None else asdict(server.load))
            for server in self.servers
        ]
        return json.dumps({**asdict(self), "servers": servers, "problem": self.problem}, indent=1)


def status(
    target: str,
    *,
    watch: bool = False,
    as_json: bool = False,
    api_key: str | None = None,
    console: Console | None = None,
) -> None:
    """Show the servers of a fleet.

    Args:
        target: run folder, or the fleet.json itself.
        watch: on a terminal, show it again each second until Ctrl-C.

    Raises:
        RolloutError: there is no fleet.json, or nothing can be expected of the fleet; says what to do. What
            is known has been shown then.
    """
    console = console or Console()
    if not console.is_terminal:  # the width of nothing; lines are not to be broken
        console = Console(file=console.file, width=_PLAIN_WIDTH)
    path = Path(target) / FLEET_FILE if Path(target).is_dir() else Path(target)
    if watch and console.is_terminal and not as_json:
        with ends_in_order_on_sigterm(lambda: "the fleet goes on"):
            _watch(path, api_key, console)
    report = look(path, api_key)
    if as_json:
        console.print(report.to_json(), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(_table(report, plain=not console.is_terminal))
    if report.problem:
        raise RolloutError(report.problem)


def look(path: str | Path, api_key: str | None = None) -> FleetReport:
    """What can be known now; takes seconds at most, also when servers hang.

    Raises:
        RolloutError: there is no such file, or it does not describe a fleet.
    """
    fleet = read_fleet(path)
    return FleetReport(
        path=str(path),
        pid=fleet.pid,
        updated=fleet.updated,
        servers=ask(fleet.servers, api_key),
        owner_runs=find_owner(fleet) is not None,
    )


def ask(servers: Sequence[ServerState], api_key: str | None = None) -> list[ServerReport]:
    """Ask all servers at once for their weights and their load."""

    async def ask_all() -> list[ServerReport]:
        return await asyncio.gather(*(_ask(server, api_key) for server in servers))

    return asyncio.run(ask_all())


async def _ask(server: ServerState, api_key: str | None) -> ServerReport:
    if not server.endpoint or server.state is ServerStatus.left:
        return ServerReport(state=server)
    try:
        async with SGLangClient(server.endpoint, timeout_s=_PROBE_TIMEOUT_S, api_key=api_key) as client:
            version, load = await asyncio.gather(client.weight_version(), client.load())
    except RolloutError:
        return ServerReport(state=server)
    return ServerReport(state=server, policy_version=version, load=load)


# ------------------------------------------------------------------------------------------ the table


def _watch(path: Path, api_key: str | None, console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                live.update(_table(look(path, api_key), plain=False), refresh=True)
            except RolloutError as error:  # the fleet may come back
                live.update(Text(str(error), style="red"), refresh=True)
            time.sleep(REFRESH_S)


def _table(report: FleetReport, *, plain: bool) -> RenderableType:
    """Plain: one line per server, whatever the width; otherwise errors and problems stand below."""
    table = Table(
        box=None if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2 if plain else 1, 0, 0)
    )
    table.add_column("server", no_wrap=True, min_width=9)
    table.add_column("endpoint", no_wrap=plain, overflow="fold")
    table.add_column("state", no_wrap=True, min_width=9)
    for name in ("weights", "running", "queued", "tokens/s", "failures", "restarts", "healthy"):
        table.add_column(name, justify="right", no_wrap=True)
    if plain:
        table.add_column("last error", no_wrap=True)
    for server in report.servers:
        table.add_row(*_row(server), *([_last_error(server)] if plain else []))
    if plain:
        return table
    errors = [
        Text(f"{s.state.name}: {_last_error(s)}", "yellow") for s in report.servers if s.state.last_error
    ]
    return Group(table, *errors, Text(report.problem, "red"))


def _row(server: ServerReport) -> list[str | Text]:
    state, load = server.state, server.load
    shown = Text(state.state.value, style=_COLOURS[state.state])
    if state.state is ServerStatus.up and not server.answers:
        shown = Text("no answer", style="red")
    age_s = server.healthy_age_s(time.time())
    return [
        state.name.removeprefix("rollout "),
        Text(state.endpoint or _UNKNOWN),
        shown,
        server.policy_version or _UNKNOWN,
        _UNKNOWN if load is None else str(load.num_running),
        _UNKNOWN if load is None else str(load.num_queued),
        _UNKNOWN if load is None or load.tokens_per_s is None else f"{load.tokens_per_s:,.0f}",
        str(state.num_failures),
        str(state.num_restarts),
        _UNKNOWN if age_s is None else _age(age_s),
    ]


def _last_error(server: ServerReport) -> str:
    """Its first line, short."""
    error = server.state.last_error.partition("\n")[0]
    return error if len(error) <= _MAX_ERROR_CHARACTERS else error[: _MAX_ERROR_CHARACTERS - 1] + "…"


def _age(seconds: float) -> str:
    """Rounded down to a unit that a person reads at a glance."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
