"""Runs in SGLang's environment, as a script: `python -P run_sglang.py PARENT_PID [arguments of the server]`.

SGLang starts processes of its own, which notice the end of the server only once they are up. So this script
guards all of them: it ends its whole process group as soon as the process that started it is gone, however
that ended.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys

API_KEY = "MEGATRON_DRPO_SGLANG_API_KEY"
"""Environment variable with the key to ask for: arguments of a process are visible to everybody."""
_SERVE = "serve"
"""First argument of the server itself, which the guard starts."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; `runtime/process_end.py` says more, but this environment does not have it."""


def main() -> None:
    if sys.argv[1] == _SERVE:
        del sys.argv[1]
        serve()
    else:
        sys.exit(guard(parent_pid=int(sys.argv[1]), arguments=sys.argv[2:]))


def guard(parent_pid: int, arguments: list[str]) -> int:
    """Run the server as a child; its exit code, as a shell gives it."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    _send_at_death_of_parent(signal.SIGTERM)
    if os.getppid() != parent_pid:
        return 1
    server = subprocess.Popen([sys.executable, "-P", __file__, _SERVE, *arguments])
    code = server.wait()
    return 128 - code if code < 0 else code


def serve() -> None:
    """SGLang's own entry point, in this process."""
    _send_at_death_of_parent(signal.SIGKILL)
    if API_KEY in os.environ:
        sys.argv += ["--api-key", os.environ.pop(API_KEY)]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _send_at_death_of_parent(number: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


if __name__ == "__main__":  # SGLang's processes import this file once more
    main()
