"""The numbers of a configuration: every one declares its limits beside its default, and one walk reads them.

A number is finite and within its limits; "no limit" is `null`, for the keys whose type allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

Problems = Iterator[str]


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

    def _problems_of(self, f: Field[Any], prefix: str) -> Problems:
        value = getattr(self, f.name)
        if isinstance(value, Section):
            yield from value.problems(f"{prefix}{f.name}.")
        elif Limits in f.metadata and value is not None:
            broken = [_broken_rule(item, f) for item in (value if isinstance(value, list) else [value])]
            rule = next(filter(None, broken), None)
            if rule is not None:
                yield f"{prefix}{f.name}={shown(value)}: must be {rule}"


def _broken_rule(value: object, f: Field[Any]) -> str | None:
    declared, allowed = str(f.type), f.metadata[Limits]
    is_whole = "int" in declared
    rule = f"at least {allowed.at_least} and at most {allowed.at_most}"
    if "None" in declared:
        rule += ", or null"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):  # a bool is an int
        return f"a {'whole ' if is_whole else ''}number, {rule}"
    return None if allowed.at_least <= value <= allowed.at_most else rule  # no comparison with NaN is true


def shown(value: object) -> str:
    """A value as messages quote it; a long one is cut."""
    try:
        text = str(value)
    except ValueError:  # Python writes no integer of over 4300 digits
        return "(a number of over 4300 digits)"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
