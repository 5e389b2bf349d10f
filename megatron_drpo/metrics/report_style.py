"""How the panels of report.png look: colours, axes, and words for shares."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

INK, SOFT, GRID = "#22252a", "#70757d", "#e4e6ea"
BLUE, ORANGE, RED = "#2f5fc4", "#d9822b", "#c23b32"


def style(axes: Axes, title: str) -> None:
    """An empty panel."""
    axes.set_title(title, loc="left", size=11.5, weight="bold", color=INK, pad=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=SOFT, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def say(axes: Axes, text: str) -> None:
    """Words instead of a picture."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=SOFT, size=10)
    axes.set_yticks([])
    axes.set_xticks([])


def format_share(value: float) -> str:
    """A share that never rounds to a false 0 % or 100 %."""
    if 0 < value < 1e-4 or 1 - 1e-4 < value < 1:
        return "< 0.01 %" if value < 0.5 else "> 99.99 %"
    return f"{value:.2%}".replace("%", " %")
