"""The fixtures that run ranks and servers must themselves fail loudly and in time."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]


@dataclass
class _Payload:
    values: torch.Tensor


def _sum_over_ranks(payload: _Payload, factor: float) -> tuple[int, _Payload, str, int]:
    total = payload.values * factor * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), _Payload(total), os.environ["DRPO_TEST_VALUE"], torch.get_num_threads()


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one cannot go on")
    dist.barrier()


def _hang_in_function() -> None:
    time.sleep(60)


def test_results_come_back_in_rank_order(
    run_distributed: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRPO_TEST_VALUE", "set by the test")
    results = run_distributed(_sum_over_ranks, 2, _Payload(torch.tensor([1.0, 2.0])), 10.0)
    assert [result[0] for result in results] == [0, 1]
    for _, payload, variable, num_threads in results:
        assert payload.values.tolist() == [30.0, 60.0]
        assert variable == "set by the test"
        assert num_threads == 1


def test_a_failing_rank_fails_the_test_with_its_traceback(run_distributed: Callable[..., list[Any]]) -> None:
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="rank one cannot go on") as failure:
        run_distributed(_fail_on_rank_one, 2)
    assert "_fail_on_rank_one" in str(failure.value)
    assert time.monotonic() - start < 30


def test_a_hang_is_ended_and_shows_where_it_hangs(run_distributed: Callable[..., list[Any]]) -> None:
    with pytest.raises(pytest.fail.Exception, match="_hang_in_function"):
        run_distributed(_hang_in_function, 2, timeout_s=2.0)


def test_a_server_that_does_not_stop_fails_the_test(
    serve_in_thread: Callable[..., AbstractContextManager[str]],
) -> None:
    stopped = threading.Event()

    def deaf(_: socket.socket) -> None:
        stopped.wait()

    with (
        pytest.raises(pytest.fail.Exception, match=r"server http://.* within 0.1 s(.|\n)*stopped\.wait\(\)"),
        serve_in_thread(deaf, lambda: None, stop_s=0.1),
    ):
        pass
    stopped.set()
