"""The walk that reads the numbers of sections, and how messages quote values."""

from __future__ import annotations

import math
import pwd
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_drpo.config.limits import Problems, Section, cut, file_path, host_name, limits, number, shown


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
        ("cap", "2", "cap='2': must be a number, at least 1 and at most 8, or null"),
        ("cap", False, "cap=False: must be a number, at least 1 and at most 8, or null"),
    ],
)
def test_number_that_cannot_be(field_name: str, value: Any, problem: str) -> None:
    assert list(Outer(**{field_name: value}).problems()) == [problem]


@pytest.mark.parametrize("value", [1, 8, 1.5, None])
def test_whole_numbers_and_null_where_they_are_allowed(value: float | None) -> None:
    assert list(Outer(cap=value).problems()) == []


def test_long_values_are_cut() -> None:
    assert cut("x" * 200) == "x" * 200
    assert cut("x" * 201) == "x" * 200 + "... (201 characters)"
    assert shown("x" * 201) == "'" + "x" * 199 + "... (203 characters)"
    assert shown(10**5000) == "(a number of over 4300 digits)"
    assert shown(None) == "None"


@dataclass(kw_only=True)
class Texts(Section):
    name: str = "free"
    names: list[str] = field(default_factory=list)
    folder: str = file_path("here")
    needed: str = file_path("")
    other: str | None = file_path(None)
    machine: str = host_name("127.0.0.1")


@pytest.mark.parametrize(
    ("field_name", "value", "rule"),
    [
        ("name", "\ud83d", "must be text that can be written as UTF-8"),
        ("names", ["fine", "a\0b"], "must not contain a null character"),
        ("name", "a\u2028b", "must not contain a line break other than \\n"),
        ("folder", "", "must name a file or folder"),
        ("other", "", "must name a file or folder"),
        ("folder", "a\0b", "must not contain a null character"),
        ("folder", "x" * 256, "must have at most 255 bytes in each name and 4095 in all"),
        ("folder", "ü" * 128, "must have at most 255 bytes in each name and 4095 in all"),
        ("folder", "x/" * 2048, "must have at most 255 bytes in each name and 4095 in all"),
        ("machine", "", "must be the name or address of a machine"),
        ("machine", "http://here", "must be the name or address of a machine"),
        ("machine", "x" * 254, "must be the name or address of a machine"),
    ],
)
def test_text_that_cannot_be(field_name: str, value: Any, rule: str) -> None:
    (problem,) = Texts(**{field_name: value}).problems("run.")
    assert problem == f"run.{field_name}={shown(value)}: {rule}"


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("name", ""),
        ("name", "x" * 100_000),
        ("names", ["ü", "two\nlines"]),
        ("folder", "x" * 255),
        ("folder", "ü" * 127),
        ("folder", "x/" * 2047),
        ("needed", ""),
        ("machine", "::1"),
        ("machine", "node-0.cluster"),
    ],
)
def test_text_that_can_be(field_name: str, value: Any) -> None:
    assert list(Texts(**{field_name: value}).problems()) == []


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is expanded in paths, also of sections within; another user's if there is one; nowhere else."""
    monkeypatch.setenv("HOME", "/homes/ann")

    @dataclass(kw_only=True)
    class Within(Section):
        texts: Texts = field(default_factory=Texts)

    within = Within(texts=Texts(name="~/a", folder="~/a", needed="~root/b", other="c/~", machine="here"))
    within.expand_paths()
    texts = within.texts
    assert (texts.name, texts.folder, texts.other) == ("~/a", "/homes/ann/a", "c/~")
    assert texts.needed == f"{pwd.getpwnam('root').pw_dir}/b"


@pytest.mark.parametrize("folder", ["~no_such_user/a", "~\0", "~\ud83d"])
def test_home_of_nobody(folder: str) -> None:
    texts = Texts(folder=folder)
    texts.expand_paths()
    (problem,) = texts.problems()
    assert problem.startswith(f"folder={folder!r}: must ")
