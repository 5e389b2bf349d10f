"""Child processes that do not outlive their parent, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal

SUPERVISOR_PID = "MEGATRON_DRPO_SUPERVISOR_PID"
"""Environment variable of ranks that were started by the supervisor, which is their parent."""

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is dead, even by SIGKILL.

    Linux ties a child to the *thread* that started it: start children in a thread that lives as long as its
    process. https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

    Args:
        parent_pid: as the parent knows it. If it died before this call, this process ends here.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
