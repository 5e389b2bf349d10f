"""Kills a process with SIGKILL just before its n-th change of a folder, at each in turn."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
}
"""Audit events: https://docs.python.org/3/library/audit_events.html. And `open` for writing."""


class CrashPoint:
    """Of this process, or of each of its children to come; there is no way to remove it again."""

    def __init__(self, change: int, folder: Path, *, in_children: bool = False) -> None:
        """
        Args:
            change: counted from 1.
            folder: changes in and below it count.
            in_children: the processes that this one forks die there, not this one.
        """
        self._change = change
        self._folder = str(folder)
        self._in_children = in_children
        self._parent = os.getpid()
        self._count = 0
        self._count_of = self._parent
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            path = arguments[0]
        else:
            return
        if isinstance(path, int):  # os.truncate of a descriptor
            path = os.readlink(f"/proc/self/fd/{path}")
        is_child = os.getpid() != self._parent
        if is_child is not self._in_children or not self._is_below(os.fsdecode(path), event, arguments):
            return
        self._count += 1
        if self._count == self._change:
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_below(self, path: str, event: str, arguments: tuple[Any, ...]) -> bool:
        # rmtree removes what lies in a folder by its name alone, relative to a descriptor.
        has_descriptor = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        return has_descriptor or path.startswith(self._folder)
