"""Runs in SGLang's environment, as a script: `python -P run_sglang.py PARENT_PID [arguments of
launch_server]`.

The server ends with the process that started it, however that ends; SGLang's own processes end with the
server.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

API_KEY = "MEGATRON_DRPO_SGLANG_API_KEY"
"""Environment variable with the key to ask for: arguments of a process are visible to everybody."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; `lifetime.py` says more, but this environment does not have it."""


def main() -> None:
    parent_pid = int(sys.argv.pop(1))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    if API_KEY in os.environ:
        sys.argv += ["--api-key", os.environ.pop(API_KEY)]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":  # SGLang's processes import this file once more
    main()
