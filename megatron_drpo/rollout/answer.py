"""JSON that a server answered, checked where it enters.

A field that is missing or of another kind is an error that names the endpoint, the field and its value.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any, TypeVar

from megatron_drpo.errors import RolloutError

T = TypeVar("T", bool, int, float, str, list[Any], dict[str, Any])
_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


class Answer:
    """A JSON object of an answer."""

    def __init__(self, value: object, where: str, path: str = "") -> None:
        """
        Args:
            value: what the server sent.
            where: endpoint and request, for messages.
            path: of the object within the answer, such as `meta_info`; empty: it is the answer.

        Raises:
            RolloutError: the value is no object.
        """
        self.where = where
        self._path = path
        if type(value) is not dict:
            raise RolloutError(f"{where}: {path or 'the answer'} is {shorten(value)}; expected an object")
        self.fields: dict[str, Any] = value

    def get(self, key: str, kind: type[T]) -> T:
        """A field that must be there.

        Raises:
            RolloutError: it is missing or of another kind.
        """
        if key not in self.fields:
            raise RolloutError(f"{self.where}: the answer has no {self.name(key)!r}; expected {_NAMES[kind]}")
        value = self.fields[key]
        if kind is float and type(value) is int:
            return value  # pyrefly: ignore  a whole number is a number
        if type(value) is not kind:
            raise self.lie(key, value, _NAMES[kind])
        return value

    def find(self, key: str, kind: type[T]) -> T | None:
        """A field that may be missing or null.

        Raises:
            RolloutError: it is of another kind.
        """
        return None if self.fields.get(key) is None else self.get(key, kind)

    def raw(self, key: str) -> Any:
        """A field as it came; None if it is missing."""
        return self.fields.get(key)

    def nested(self, key: str) -> Answer:
        """A field that is an object.

        Raises:
            RolloutError: it is missing or none.
        """
        return Answer(self.get(key, dict), self.where, self.name(key))

    def objects(self, key: str) -> Iterator[Answer]:
        """A field that is a list of objects.

        Raises:
            RolloutError: it is missing or none.
        """
        for index, value in enumerate(self.get(key, list)):
            yield Answer(value, self.where, f"{self.name(key)}[{index}]")

    def lie(self, field: str, value: object, expected: str) -> RolloutError:
        """The error of a field, or of a part of it, that cannot be true."""
        return RolloutError(f"{self.where}: {self.name(field)} is {shorten(value)}; expected {expected}")

    def name(self, key: str) -> str:
        """Of a field, from the top of the answer."""
        return f"{self._path}.{key}" if self._path else key


def shorten(value: object) -> str:
    """A value as messages show it."""
    return _SHORT.repr(value)
