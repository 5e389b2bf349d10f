from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron_drpo.rewards import worker
from megatron_drpo.types import Rollout
from megatron_drpo.user_code import Failure


@pytest.mark.parametrize(("expression", "reward"), [("0.25", 0.25), ("1", 1.0), ("True", 1.0), ("-2", -2.0)])
def test_finite_numbers_become_floats(
    write_module: Callable[[str, str], None],
    make_rollout: Callable[..., Rollout],
    expression: str,
    reward: float,
) -> None:
    name = f"worker_number_{abs(hash(expression))}"
    write_module(name, f"def score(rollout):\n    return {expression}\n")
    result = worker.score(f"{name}:score", make_rollout(""))
    assert result == reward
    assert isinstance(result, float)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("float('nan')", "it returned nan, expected a finite number"),
        ("float('inf')", "it returned inf, expected a finite number"),
        ("10**400", "expected a finite number"),
        ("None", "it returned None, expected a finite number"),
        ("'1'", "it returned '1', expected a finite number"),
        ("1j", "it returned 1j, expected a finite number"),
        ("rollout.absent", "AttributeError: 'Rollout' object has no attribute 'absent'"),
        ("exit(4)", "SystemExit: 4"),
    ],
)
def test_anything_else_is_a_failure(
    write_module: Callable[[str, str], None],
    make_rollout: Callable[..., Rollout],
    expression: str,
    reason: str,
) -> None:
    name = f"worker_failure_{abs(hash(expression))}"
    write_module(name, f"def score(rollout):\n    return {expression}\n")
    result = worker.score(f"{name}:score", make_rollout(""))
    assert isinstance(result, Failure)
    assert reason in result.reason


def test_a_worker_imports_nothing_heavy() -> None:
    """Everything a worker process imports, the built-in rewards included."""
    program = (
        "import sys, megatron_drpo.rewards.worker, megatron_drpo.rewards.spawn, megatron_drpo.rewards.pool\n"
        "import megatron_drpo.rewards.math, megatron_drpo.rewards.exact\n"
        "print({'torch', 'numpy', 'transformers', 'megatron'} & set(sys.modules))\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout == "set()\n"
