from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_drpo.config.schema import OnRewardError, RewardConfig
from megatron_drpo.errors import RewardError
from megatron_drpo.rewards import pool as pool_module
from megatron_drpo.rewards.pool import RewardPool, find_answer_problems, group_by_shape
from megatron_drpo.types import Rollout

MakeRollout = Callable[..., Rollout]
WriteModule = Callable[[str, str], None]

pytestmark = [pytest.mark.timeout(30)]

MIXED = """
import time
import numpy

def score(rollout):
    if rollout.text == "hang":
        time.sleep(3600)
    if rollout.text == "die":
        import os
        os._exit(9)
    if rollout.text.startswith("float"):
        return getattr(numpy, rollout.text)("inf")
    if rollout.text == "huge":
        return 10**5000
    return float(rollout.text)
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rewards_come_back_in_order(make_rollout: MakeRollout) -> None:
    rollouts = [make_rollout(f"\\boxed{{{i % 3}}}", str(i % 2), prompt_id=i) for i in range(60)]
    with RewardPool(RewardConfig()) as pool:
        assert pool.score(rollouts) == [float(i % 3 == i % 2) for i in range(60)]
        assert pool.score([]) == []


def test_rewards_carry_neither_the_most_probable_ids_nor_routes(
    make_rollout: MakeRollout, write_module: WriteModule
) -> None:
    """They are larger than all the rest of a rollout, which keeps them."""
    write_module("pool_topk", "def score(r): return float(r.topk_ids is r.topk_logprobs is r.routes is None)")
    rollout = make_rollout("1")
    rollout.topk_ids, rollout.topk_logprobs = [[1, 2]] * 3, [[-1.0, -2.0]] * 3
    rollout.routes = torch.zeros(4, 2, 2, dtype=torch.uint8)
    with RewardPool(RewardConfig(name="pool_topk:score")) as pool:
        assert pool.score([rollout]) == [1.0]
    assert rollout.topk_ids == [[1, 2]] * 3


def test_zero_counts_failures_and_goes_on(make_rollout: MakeRollout, write_module: WriteModule) -> None:
    write_module("pool_mixed", MIXED)
    config = RewardConfig(name="pool_mixed:score", timeout_s=2.0, on_error=OnRewardError.zero)
    texts = ["1", "hang", "two", "die", "nan", "0.5", "2", "float16", "float32", "huge"]
    expected = [1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 2.0, 0.0, 0.0, 0.0]
    with RewardPool(config) as pool:
        assert pool.score([make_rollout(text) for text in texts]) == expected
        assert (pool.num_errors, pool.num_timeouts) == (6, 1)
        assert pool.score([make_rollout("3")]) == [3.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hang", "no result within reward.timeout_s=2.0"),
        ("die", "its worker process died with exit code 9"),
        ("two", "ValueError: could not convert string to float: 'two' .*pool_error.py line 15"),
        ("inf", "it returned inf, expected a finite number"),
        ("float32", r"it returned np.float32\(inf\), expected a finite number"),
    ],
)
def test_error_names_the_response_and_what_happened(
    make_rollout: MakeRollout, write_module: WriteModule, text: str, reason: str
) -> None:
    write_module("pool_error", MIXED)
    rollouts = [make_rollout("1"), make_rollout(text, prompt_id=17, sample_index=3), make_rollout("1")]
    with RewardPool(RewardConfig(name="pool_error:score", timeout_s=2.0, num_workers=1)) as pool:
        with pytest.raises(RewardError, match=f"pool_error:score: prompt 17, sample 3: {reason}"):
            pool.score(rollouts)
        assert pool.score([make_rollout("5")]) == [5.0]


def test_what_math_verify_cannot_decide_scores_zero(make_rollout: MakeRollout) -> None:
    rollouts = [make_rollout("\\boxed{9^{9^{9^9}}}"), make_rollout("\\boxed{42}")]
    with RewardPool(RewardConfig(timeout_s=2.0)) as pool:
        assert pool.score(rollouts) == [0.0, 1.0]
        assert (pool.num_errors, pool.num_timeouts) == (0, 1)


@pytest.mark.timeout(90)
def test_ground_truths_that_nothing_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed once, within the time limit; plain numbers and other rewards need no worker."""
    answers = ["$18", "\\sqrt{2}", "2 \\frac{", "3 \\frac{", "1/0", "3 \\frac{", "#### ", "x+1"]
    config = RewardConfig()
    problems = find_answer_problems(config, answers)
    assert problems == {
        "1/0": "expected an `answer` that equals itself, found '1/0'",
        "2 \\frac{": r"expected an `answer` that math-verify can parse, found '2 \\frac{'",
        "3 \\frac{": r"expected an `answer` that math-verify can parse, found '3 \\frac{'",
        "#### ": "expected an `answer` that math-verify can parse, found '#### '",
    }
    limit = "expected an `answer` that math-verify can parse within reward.timeout_s=0.001"
    slow = "\\int_0^1 \\sqrt{x^2 + \\sin x} dx"
    impatient = RewardConfig(timeout_s=0.001)
    assert find_answer_problems(impatient, [slow]) == {slow: limit}
    with RewardPool(impatient) as pool:  # as a run, which must find the same at any load
        assert pool.find_answer_problems([slow], tolerates_timeouts=True) == {}
    monkeypatch.delattr(pool_module, "RewardPool")
    assert find_answer_problems(config, ["$18", "50%", "1.5e-5", "3/4"] * 1000) == {}
    assert find_answer_problems(RewardConfig(name="exact_match"), answers) == {}


def test_ground_truths_of_one_shape() -> None:
    answers = ["2\\pi", "18", "31\\pi", "0\\pi", "$2\\pi$", "x", "2\\pi"]
    assert group_by_shape(RewardConfig(), answers) == [["2\\pi", "31\\pi", "$2\\pi$"], ["0\\pi"], ["x"]]
    assert group_by_shape(RewardConfig(name="exact_match"), answers) == []


def test_workers_killed_while_idle_are_replaced(make_rollout: MakeRollout) -> None:
    with RewardPool(RewardConfig(name="exact_match")) as pool:
        pool.score([make_rollout("42")])
        for process in psutil.Process().children():
            if "spawn_main" in " ".join(process.cmdline()):
                process.kill()
        time.sleep(1.0)  # pebble looks every 0.1 s
        assert pool.score([make_rollout("42")]) == [1.0]


TALKATIVE = """
import os, subprocess, sys
print("imported")

def score(rollout):
    print("to stdout", rollout.text)
    print("to stderr", rollout.text, file=sys.stderr)
    os.write(1, b"from C\\n")
    subprocess.run(["echo", "from a child"], check=True)
    if rollout.text == "die":
        print("last words \\ud83d")
        os._exit(9)
    return 1.0
"""


def test_what_a_reward_prints_goes_to_its_log(
    make_rollout: MakeRollout,
    write_module: WriteModule,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of both workers, of the one that takes the place of another, and up to the last line before it died."""
    write_module("pool_talks", TALKATIVE)
    config = RewardConfig(name="pool_talks:score", num_workers=2, on_error=OnRewardError.zero)
    log = tmp_path / "run" / "logs" / "reward_rank_0.log"
    with RewardPool(config, log) as pool:
        texts = ["one", "die", "two", "three"]
        assert pool.score([make_rollout(text) for text in texts]) == [1.0, 0.0, 1.0, 1.0]
    lines = log.read_text().splitlines()
    for text in texts:
        assert lines.count(f"to stdout {text}") == 1
        assert lines.count(f"to stderr {text}") == 1
    assert lines.count("from C") == lines.count("from a child") == 4
    assert lines.count("last words \\ud83d") == 1
    assert 2 <= lines.count("imported") <= 3
    with RewardPool(config, log) as pool:
        pool.score([make_rollout("four")])
    assert log.read_text().startswith("\n".join(lines)), "a resumed run appends"
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_close_leaves_no_process(make_rollout: MakeRollout, write_module: WriteModule) -> None:
    write_module("pool_close", "import os\ndef score(rollout):\n    return os.getpid()\n")
    with RewardPool(RewardConfig(name="pool_close:score")) as pool:
        pids = {int(pid) for pid in pool.score([make_rollout("")] * 50)}
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_die_with_a_killed_parent_and_do_not_import_its_main_module(tmp_path: Path) -> None:
    """A main module that would take an hour to import, a reward that hangs, and kill -9."""
    (tmp_path / "hanging.py").write_text(
        "import os, time\n"
        "def score(rollout):\n"
        "    open(f'worker_{os.getpid()}', 'w').close()\n"
        "    time.sleep(3600)\n"
    )
    (tmp_path / "main.py").write_text(
        "import time\n"
        "from megatron_drpo.config.schema import RewardConfig\n"
        "from megatron_drpo.rewards.pool import RewardPool\n"
        "from megatron_drpo.types import FinishReason, Prompt, Rollout\n"
        "if __name__ != '__main__':\n"
        "    time.sleep(3600)\n"
        "prompt = Prompt(id=0, text='', token_ids=())\n"
        "rollout = Rollout(prompt=prompt, sample_index=0, response_ids=[], rollout_logprobs=[],\n"
        "                  policy_versions=[], finish_reason=FinishReason.stop, text='')\n"
        "RewardPool(RewardConfig(name='hanging:score', timeout_s=3600)).score([rollout, rollout])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment)
    try:
        wait_for(lambda: len(list(tmp_path.glob("worker_*"))) == 2)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pids = [int(path.name.removeprefix("worker_")) for path in tmp_path.glob("worker_*")]
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
