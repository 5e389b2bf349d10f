from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron_drpo.config.user_code import Failure
from megatron_drpo.rewards import worker
from megatron_drpo.types import Rollout

MODULE = """
import decimal, fractions, numpy, torch

class Odd:
    def __float__(self):
        raise KeyError("no float")
    def __repr__(self):
        raise KeyError("no text")

def score(rollout):
    return EXPRESSION
"""


@pytest.mark.parametrize(
    ("expression", "reward"),
    [
        ("0.25", 0.25),
        ("1", 1.0),
        ("True", 1.0),
        ("-2", -2.0),
        ("numpy.float16(0.5)", 0.5),
        ("numpy.float32(-0.5)", -0.5),
        ("numpy.int64(3)", 3.0),
        ("numpy.bool_(True)", 1.0),
        ("numpy.array(0.5)", 0.5),
        ("torch.tensor(0.5)", 0.5),
        ("torch.tensor(True)", 1.0),
        ("torch.tensor([0.5], dtype=torch.bfloat16)", 0.5),
        ("decimal.Decimal('0.125')", 0.125),
        ("fractions.Fraction(1, 4)", 0.25),
        ("3.4028234663852886e38", 3.4028234663852886e38),
    ],
)
def test_finite_numbers_become_floats(
    write_module: Callable[[str, str], None],
    make_rollout: Callable[..., Rollout],
    expression: str,
    reward: float,
) -> None:
    name = f"worker_number_{abs(hash(expression))}"
    write_module(name, MODULE.replace("EXPRESSION", expression))
    result = worker.score(f"{name}:score", make_rollout(""))
    assert result == reward
    assert type(result) is float


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("float('nan')", "it returned nan, expected a finite number"),
        ("float('inf')", "it returned inf, expected a finite number"),
        ("10**400", "expected a finite number"),
        ("10**5000", "it returned something of type int, expected a finite number"),
        ("1e39", "it returned 1e+39, expected a finite number"),  # infinite in the trainer's float32
        ("numpy.float16('inf')", "it returned np.float16(inf), expected a finite number"),
        ("numpy.float32('-inf')", "it returned np.float32(-inf), expected a finite number"),
        ("numpy.float32('nan')", "it returned np.float32(nan), expected a finite number"),
        ("numpy.float64('inf')", "it returned np.float64(inf), expected a finite number"),
        ("torch.tensor(float('inf'))", "it returned tensor(inf), expected a finite number"),
        ("torch.tensor([1.0, 2.0])", "it returned tensor([1., 2.]), expected a finite number"),
        ("decimal.Decimal('Infinity')", "it returned Decimal('Infinity'), expected a finite number"),
        ("decimal.Decimal('sNaN')", "it returned Decimal('sNaN'), expected a finite number"),
        ("decimal.Decimal('1e400')", "it returned Decimal('1E+400'), expected a finite number"),
        ("fractions.Fraction(10**400)", "expected a finite number"),
        ("Odd()", "it returned <Odd instance at "),
        ("b'1'", "it returned b'1', expected a finite number"),
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
    write_module(name, MODULE.replace("EXPRESSION", expression))
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
