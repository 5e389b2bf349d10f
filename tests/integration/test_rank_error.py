"""A rank that ends by an error which is not ours: with its traceback, at once, whatever still runs in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

TEARDOWN_S = 60
"""How long the interpreter would wait at its end: for a thread, which stands for the other ranks."""
RANK = f"""
import sys, threading, time
import torch
from megatron_drpo import train

def run(config):
    threading.Thread(target=time.sleep, args=({TEARDOWN_S},)).start()
    print("the run began", time.time())
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

train.run = run
train.main()
"""


@pytest.mark.timeout(240)
def test_out_of_memory_ends_a_rank_at_once(run_arguments: Callable[..., list[str]]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", RANK, *run_arguments("train.mode=sft")],
        env={**os.environ, "RANK": "3", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    end = time.time()
    assert ended.returncode == 1, ended.stderr
    began = float(ended.stdout.split("the run began ")[1].split()[0])
    assert end - began < TEARDOWN_S / 2
    assert "rank 3 ends by OutOfMemoryError:" in ended.stderr
    assert "Traceback (most recent call last)" in ended.stderr
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in ended.stderr
