"""How a bench ends: with its table, an error in words, or a signal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from megatron_drpo.errors import DrpoError
from megatron_drpo.runtime.process_end import Terminated, ends_in_order_on_sigterm, tell_end


def run_bench(action: Callable[[], None], console: Console, kept: str = "nothing is kept") -> int:
    """Measure; the exit status.

    Args:
        console: where an error is told.
        kept: what a signal leaves, in words.
    """
    try:
        with ends_in_order_on_sigterm(lambda: kept):
            action()
    except DrpoError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, soft_wrap=True)
        return 1
    except (KeyboardInterrupt, Terminated) as end:
        return tell_end(end)
    return 0
