"""The walk that reads the numbers of sections, and how messages quote values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_drpo.limits import Problems, Section, limits, number, shown


@dataclass(kw_only=True)
class Inner(Section):
    rate: float = number(0.5, at_least=0.25, at_most=2)
    ids: list[int] = field(default_factory=list, metadata=limits(at_least=0, at_most=9))


@dataclass(kw_only=True)
class Outer(Section):
    size: int = number(1, at_least=1, at_most=4)
    cap: float | None = number(None, at_least=1, at_most=8)
    name: str = "free"
    inner: Inner = field(default_factory=Inner)

    def rules(self) -> Problems:
        if self.size > 2 and self.cap is None:
            yield f"size={self.size} needs a cap"


def test_defaults_are_within_limits() -> None:
    assert list(Outer().problems()) == []


def test_problems_come_in_the_order_of_the_fields_with_their_keys() -> None:
    outer = Outer(size=3, inner=Inner(rate=3.0, ids=[1, 10]))
    assert list(outer.problems("run.")) == [
        "run.inner.rate=3.0: must be at least 0.25 and at most 2",
        "run.inner.ids=[1, 10]: must be at least 0 and at most 9",
    ]


def test_rules_are_read_where_all_else_holds() -> None:
    assert list(Outer(size=3).problems("run.")) == ["size=3 needs a cap"]
    assert list(Outer(size=5).problems("run.")) == ["run.size=5: must be at least 1 and at most 4"]


@pytest.mark.parametrize(
    ("field_name", "value", "problem"),
    [
        ("size", 0, "size=0: must be at least 1 and at most 4"),
        ("size", True, "size=True: must be a whole number, at least 1 and at most 4"),
        ("size", 2.0, "size=2.0: must be a whole number, at least 1 and at most 4"),
        ("size", math.nan, "size=nan: must be a whole number, at least 1 and at most 4"),
        ("cap", math.nan, "cap=nan: must be at least 1 and at most 8, or null"),
        ("cap", math.inf, "cap=inf: must be at least 1 and at most 8, or null"),
        ("cap", "2", "cap=2: must be a number, at least 1 and at most 8, or null"),
        ("cap", False, "cap=False: must be a number, at least 1 and at most 8, or null"),
    ],
)
def test_number_that_cannot_be(field_name: str, value: Any, problem: str) -> None:
    assert list(Outer(**{field_name: value}).problems()) == [problem]


@pytest.mark.parametrize("value", [1, 8, 1.5, None])
def test_whole_numbers_and_null_where_they_are_allowed(value: float | None) -> None:
    assert list(Outer(cap=value).problems()) == []


def test_long_values_are_cut() -> None:
    assert shown("x" * 200) == "x" * 200
    assert shown("x" * 201) == "x" * 200 + "... (201 characters)"
    assert shown(10**5000) == "(a number of over 4300 digits)"
    assert shown(None) == "None"
