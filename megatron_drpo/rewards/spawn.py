"""Worker processes that do not import the program that starts them."""

from __future__ import annotations

import sys
import threading
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType

_lock = threading.Lock()


class LightSpawnProcess(SpawnProcess):
    """A spawned process without the parent's `__main__`.

    A spawned child imports its parent's main module again, in case functions of that module were sent to it.
    A trainer's main module brings torch and Megatron: seconds and gigabytes in every worker. The standard
    library offers no switch, so an empty main module stands in while the child is being described.
    https://docs.python.org/3/library/multiprocessing.html#the-spawn-and-forkserver-start-methods
    """

    def start(self) -> None:
        with _lock:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                super().start()
            finally:
                sys.modules["__main__"] = main


class LightSpawnContext(SpawnContext):
    """multiprocessing's spawn context, with `LightSpawnProcess`."""

    Process = LightSpawnProcess
