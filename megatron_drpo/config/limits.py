"""What a value of a configuration may be: declared beside its default, and read by one walk.

A number is finite and within its limits; "no limit" is `null`, for the keys whose type allows it. Text can be
written as UTF-8, a path names something that a file system can hold, a host something that can be looked up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

Problems = Iterator[str]

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
"""Of a file's name and of a path on Linux and macOS."""


_FORM = "form"
"""Metadata of a text that has one: what is wrong with a value, if anything."""
MAX_SHOWN = 200
"""Characters of a value in a message."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The smallest and the largest value, both allowed."""

    at_least: float
    at_most: float


def limits(*, at_least: float, at_most: float) -> dict[type, Limits]:
    """Metadata of a dataclass field that holds a number, or a list of numbers."""
    return {Limits: Limits(at_least, at_most)}


def number(default: float | None, *, at_least: float, at_most: float) -> Any:
    """A dataclass field that holds a number, or None if its declared type says so."""
    return field(default=default, metadata=limits(at_least=at_least, at_most=at_most))


def file_path(default: str | None) -> Any:
    """A dataclass field that holds the path of a file or folder; `~` is a home folder."""
    return field(default=default, metadata={_FORM: _path_rule})


def host_name(default: str) -> Any:
    """A dataclass field that holds the name or address of a machine."""
    return field(default=default, metadata={_FORM: _host_rule})


@dataclass(kw_only=True)
class Section:
    """A part of the configuration, of numbers, other values and further sections."""

    def rules(self) -> Problems:
        """One sentence per broken rule that limits do not say: between keys, and of other values."""
        yield from ()

    def problems(self, prefix: str = "") -> Problems:
        """Everything wrong with this section and those within it; its own rules are read if all those hold.

        Args:
            prefix: of its keys, "optimizer." for example.
        """
        found = [problem for f in fields(self) for problem in self._problems_of(f, prefix)]
        yield from found or self.rules()

    def expand_paths(self) -> None:
        """`~` and `~user` at the head of a path become the home folder, in this section and those within."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Section):
                value.expand_paths()
            elif f.metadata.get(_FORM) is _path_rule and isinstance(value, str) and not _text_rule(value):
                setattr(self, f.name, os.path.expanduser(value))

    def _problems_of(self, f: Field[Any], prefix: str) -> Problems:
        value = getattr(self, f.name)
        if isinstance(value, Section):
            yield from value.problems(f"{prefix}{f.name}.")
        elif value is not None:
            rules = (_broken_rule(item, f) for item in (value if isinstance(value, list) else [value]))
            rule = next(filter(None, rules), None)
            if rule is not None:
                yield f"{prefix}{f.name}={shown(value)}: must {rule}"


def shown(value: object) -> str:
    """A value as messages quote it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of over 4300 digits
        return "(a number of over 4300 digits)"
    return cut(text)


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _broken_rule(value: object, f: Field[Any]) -> str | None:
    if Limits in f.metadata:
        return _number_rule(value, f.metadata[Limits], str(f.type))
    if not isinstance(value, str):
        return None
    if value == f.default == "":  # what has no default is asked for by its section's rules
        return None
    return _text_rule(value) or f.metadata.get(_FORM, _text_rule)(value)


def _number_rule(value: object, allowed: Limits, declared: str) -> str | None:
    is_whole = "int" in declared
    rule = f"be at least {allowed.at_least} and at most {allowed.at_most}"
    if "None" in declared:
        rule += ", or null"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):  # a bool is an int
        return rule.replace("be", "be a whole number," if is_whole else "be a number,", 1)
    return None if allowed.at_least <= value <= allowed.at_most else rule  # no comparison with NaN is true


def _text_rule(value: str) -> str | None:
    try:
        value.encode()
    except UnicodeEncodeError:
        return "be text that can be written as UTF-8"
    if re.search("[\x85\u2028\u2029]", value):  # PyYAML writes them so that it reads spaces
        return "not contain a line break other than \\n"
    return "not contain a null character" if "\0" in value else None


def _path_rule(value: str) -> str | None:
    if not value:
        return "name a file or folder"
    if value.startswith("~"):  # expand_paths knows no such user
        return "not begin with ~ and no user's name; write ./~ for a name that begins so"
    longest = max(len(name.encode()) for name in value.split("/"))
    if longest > MAX_NAME_BYTES or len(value.encode()) > MAX_PATH_BYTES:
        return f"have at most {MAX_NAME_BYTES} bytes in each name and {MAX_PATH_BYTES} in all"
    return None


def _host_rule(value: str) -> str | None:
    return None if re.fullmatch(r"[\w.:%\[\]-]{1,253}", value) else "be the name or address of a machine"
