"""What a person watches while a run runs: a live display on a terminal, one line per step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_drpo.metrics.writer import Metrics

SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "eval/accuracy", "{:.1%}"),
    ("length", "response/length_mean", "{:.1f} tokens"),
    ("truncated", "response/truncated_share", "{:.1%}"),
    ("mismatch |dlogp|", "mismatch/first_update_logprob_abs_mean", "{:.2e}"),
    ("faulty tokens", "mismatch/faulty_tokens", "{:.0f}"),
    ("outside trust region", "trust_region/outside_share", "{:.2%}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("loss", "loss/value", "{:.4g}"),
    ("grad norm", "optimizer/grad_norm", "{:.3g}"),
    ("throughput", "throughput/tokens_per_s", "{:,.0f} tokens/s"),
)
"""(label, metric, format), in display order."""
ONLY_IF_ANY = {"mismatch/faulty_tokens"}
"""Not shown while it is 0, as it is in every healthy run."""

PHASE_COLOURS = {
    "rollout": "blue",
    "reward": "cyan",
    "logprobs": "bright_magenta",
    "forward_backward": "magenta",
    "optimizer": "green",
    "weight_sync": "yellow",
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_TREND_STEPS = 40


class Progress:
    """Shows where a run is. Use as a context manager, in one process only.

    Args:
        num_steps: steps of the whole run.
        live: redraw a panel in place if `console` is a terminal; otherwise print one line per step.
        console: where to; standard output by default.
    """

    def __init__(self, num_steps: int, *, live: bool, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._console = console or Console()
        self._step = 0
        self._phase = "starting"
        self._phase_began = time.perf_counter()
        self._metrics: dict[str, float | str | Sequence[float]] = {}
        self._history: dict[str, list[float]] = {}
        self._step_seconds: list[float] = []
        self._live: Live | None = None
        if live and self._console.is_terminal:
            # Drawn by rich's own thread, twice a second, so that the clock of a long phase moves.
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=2, transient=False
            )

    def phase(self, name: str) -> None:
        """What the run does from now on."""
        self._phase = name
        self._phase_began = time.perf_counter()

    def step(self, step: int, metrics: Metrics) -> None:
        """Show what was measured when `step` steps were finished (0: before the first).

        Values not measured this time keep standing on the live display.
        """
        self._step = step
        self._metrics.update(metrics)
        for name, value in metrics.items():
            if not isinstance(value, Sequence):  # a sentence is one, too
                self._history.setdefault(name, []).append(value)
        if "time/step_s" in metrics:
            # All of the step, including an evaluation or a save.
            parts = (_number(metrics, f"time/{name}_s") for name in ("step", "eval", "checkpoint"))
            self._step_seconds.append(sum(part for part in parts if part is not None))
        if self._live is None:
            self.message(self._line(metrics))

    def message(self, text: str) -> None:
        """Print a line that stays, above the display if that is live."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = "done" if error is None else "failed"
        self._phase_began = time.perf_counter()
        if self._live is not None:
            self._live.stop()

    # ------------------------------------------------------------------------------ one line per step

    def _line(self, metrics: Metrics) -> str:
        parts = [f"step {self._step}/{self._num_steps}"]
        for label, name, template in _shown(metrics):
            value = _number(metrics, name)
            if value is not None:
                parts.append(f"{label} {template.format(value)}")
        seconds = _number(metrics, "time/step_s")
        if seconds is not None:
            shares = ", ".join(f"{name} {value / seconds:.0%}" for name, value in _phases(metrics) if seconds)
            parts.append(f"{seconds:.2f} s ({shares})" if shares else f"{seconds:.2f} s")
        parts.append(f"ETA {self._eta()}")
        return " | ".join(parts)

    def _eta(self) -> str:
        """Time left, from the last ten steps: earlier ones had other lengths."""
        recent = self._step_seconds[-10:]
        if not recent:
            return "--:--"
        return _clock(sum(recent) / len(recent) * (self._num_steps - self._step))

    # ----------------------------------------------------------------------------------- live display

    def _render(self) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(
            Text(f"step {self._step}/{self._num_steps}", style="bold"),
            ProgressBar(total=self._num_steps, completed=self._step),
            Text(f"ETA {self._eta()}", style="dim"),
        )
        seconds = time.perf_counter() - self._phase_began
        now = Text.assemble((self._phase.replace("_", " "), "bold cyan"), (f"  {seconds:.0f} s", "dim"))
        return Panel(Group(head, now, Text(), self._table(), Text(), self._time_bar()), title="megatron-drpo")

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        for label, name, template in _shown(self._metrics):
            value = _number(self._metrics, name)
            shown = "–" if value is None else template.format(value)
            trend = _sparkline(self._history.get(name, [])[-_TREND_STEPS:])
            table.add_row(Text(label, style="dim"), Text(shown, style="bold"), Text(trend, style="blue"))
        return table

    def _time_bar(self) -> RenderableType:
        """One bar of the last step's length, split by phase, with its legend."""
        phases = _phases(self._metrics)
        total = sum(value for _, value in phases)
        if total <= 0:
            return Text("no step finished yet", style="dim")
        bar, legend = Text(no_wrap=True, overflow="crop"), Text()
        for name, value in phases:
            colour = PHASE_COLOURS.get(name, "bright_black")
            bar.append("█" * round(60 * value / total), style=colour)
            entry = f"■ {name.replace('_', ' ')} {value:.2f} s".replace(" ", "\N{NO-BREAK SPACE}")
            legend.append(entry, style=colour)
            legend.append("   ")
        return Group(bar, legend)


def _shown(metrics: Metrics) -> list[tuple[str, str, str]]:
    """The rows of `SHOWN` that have a place on the display."""
    return [row for row in SHOWN if row[1] not in ONLY_IF_ANY or _number(metrics, row[1])]


def _number(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    return None if value is None or isinstance(value, Sequence) else value


def _phases(metrics: Metrics) -> list[tuple[str, float]]:
    """(phase, seconds) of the last step, the known phases first, then all the rest as `other`."""
    step_s = _number(metrics, "time/step_s") or 0.0
    phases = [(name, _number(metrics, f"time/{name}_s") or 0.0) for name in PHASE_COLOURS]
    known = [(name, value) for name, value in phases if value > 0]
    other = step_s - sum(value for _, value in known)
    return [*known, ("other", other)] if other > 0 else known


def _sparkline(values: list[float]) -> str:
    """A value per character; NaN and infinity are blank."""
    finite = [value for value in values if abs(value) < float("inf")]
    if len(finite) < 2:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((v - low) / span * top)] if v in finite else " " for v in values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
