"""Reading prompt files: one JSON object per line, and what is wrong with a line that is not one.

Fields of a line: `prompt` (text) or `messages` (chat), `answer` (text or number), `response` (text, the
demonstration of `train.mode=sft`), `tools` (list of JSON schemas) and `chat_template_kwargs` (object) for the
chat template; every other field is kept as metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from megatron_drpo.config.schema import OWN_TEMPLATE_ARGUMENTS, Mode

MAX_DEPTH = 100
"""Of lists and objects within each other: far below what the parser, pickle and templates bear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One valid line. Exactly one of `prompt` and `messages` is given."""

    index: int
    """Line number from 0, blank lines counted."""
    prompt: str | None
    messages: list[dict[str, Any]] | None
    answer: str | None
    response: str | None
    tools: list[dict[str, Any]] | None
    """None: the line says nothing."""
    chat_template_kwargs: dict[str, Any]
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """One broken line."""

    index: int
    problem: str
    """What was expected and what was found."""


class _Problem(ValueError):
    """What is wrong with the line being parsed."""


def read_lines(path: str | Path, mode: Mode, *, needs_answer: bool = False) -> Iterator[PromptLine | BadLine]:
    """Every line that is not blank, parsed.

    A byte order mark and Windows line ends are accepted.

    Args:
        mode: with `sft` each line must have a `response`.
        needs_answer: whether each line must have an `answer`.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for index, raw in enumerate(file):
            try:
                text = raw.decode("utf-8-sig" if index == 0 else "utf-8").strip()
                if text:
                    yield _parse_line(index, text, mode, needs_answer)
            except UnicodeDecodeError as error:
                yield BadLine(index=index, problem=f"expected UTF-8 text, found {error.reason}")
            except _Problem as problem:
                yield BadLine(index=index, problem=str(problem))


def describe_bad_line(path: str | Path, line: BadLine) -> str:
    """The problem of a line in words, with the line number as editors count, from 1."""
    return f"{path} line {line.index + 1}: {line.problem}"


def _parse_line(index: int, text: str, mode: Mode, needs_answer: bool) -> PromptLine:
    fields = _parse_object(text)
    for name, value in fields.items():
        _check_value(name, name)
        _check_value(name, value)
    prompt, messages = _take_text(fields, "prompt"), _take_messages(fields)
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise _Problem(f"expected either `prompt` (text) or `messages` (a chat), found {found}")
    line = PromptLine(
        index=index,
        prompt=prompt,
        messages=messages,
        answer=_take_answer(fields),
        response=_take_text(fields, "response"),
        tools=_take_tools(fields),
        chat_template_kwargs=_take_template_kwargs(fields),
        metadata=fields,
    )
    if mode is Mode.sft and line.response is None:
        raise _Problem("expected a `response` to learn from (train.mode=sft), found none")
    if needs_answer and line.answer is None:
        raise _Problem("expected an `answer` for the reward, found none")
    return line


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_int=_parse_int, parse_float=_parse_float
        )
    except json.JSONDecodeError as error:
        found = f"invalid JSON: {error.msg} at column {error.colno}"
        raise _Problem(f"expected a JSON object, found {found}") from None
    except RecursionError:
        raise _Problem("expected a JSON object, found one nested too deeply") from None
    if not isinstance(value, dict):
        raise _Problem(f"expected a JSON object, found {_json_type(value)}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _Problem(f"expected a JSON object, found {name}, which is not JSON")


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's limit, since the time it takes grows with the square of the digits
        raise _Problem(f"expected a JSON object, found a number of {len(text)} digits") from None


def _parse_float(text: str) -> float:
    value = float(text)
    is_zero = not any(digit in "123456789" for digit in text.lower().partition("e")[0])
    if math.isinf(value) or (value == 0 and not is_zero):
        shown = text if len(text) <= 30 else f"{text[:30]}..."
        raise _Problem(f"expected a JSON object, found the number {shown}, which no float can hold")
    return value


def _check_value(name: str, value: object, depth: int = 1) -> None:
    """Refuse what JSON can write and nothing behind it can work with, wherever it is in a field."""
    if depth > MAX_DEPTH:
        raise _Problem("expected a JSON object, found one nested too deeply")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"\\u{ord(value[error.start]):04x}, one half of a surrogate pair"
            shown = name.encode(errors="backslashreplace").decode()
            raise _Problem(f"expected `{shown}` to be text, found {found}") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(name, key, depth)
            _check_value(name, item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(name, item, depth + 1)


def _take_text(fields: dict[str, Any], name: str) -> str | None:
    """Remove and return a text field; None if it is absent or null."""
    value = fields.pop(name, None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _Problem(f"expected `{name}` to be text, found {_json_type(value)}")
    if not value.strip():
        raise _Problem(f"expected `{name}` to be text, found an empty string")
    return value


def _take_answer(fields: dict[str, Any]) -> str | None:
    value = fields.pop("answer", None)
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")  # 1e-05 is no number to a reader of mathematics
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    found = "an empty string" if isinstance(value, str) else _json_type(value)
    raise _Problem(f"expected `answer` to be text or a number, found {found}")


def _take_messages(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    messages = fields.pop("messages", None)
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else _json_type(messages)
        raise _Problem(f"expected `messages` to be a list of chat messages, found {found}")
    for number, message in enumerate(messages):
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if texts and texts[1] is None and message.get("tool_calls"):
            texts = texts[:1]  # as OpenAI writes a call of a function
        if not texts or not all(isinstance(text, str) for text in texts):
            raise _Problem(f"expected messages[{number}] to have `role` and `content`, both text")
    return messages


def _take_tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = fields.pop("tools", None)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        found = f"{_json_type(tools)} of other things" if isinstance(tools, list) else _json_type(tools)
        raise _Problem(f"expected `tools` to be a list of JSON schemas, found {found}")
    return tools


def _take_template_kwargs(fields: dict[str, Any]) -> dict[str, Any]:
    kwargs = fields.pop("chat_template_kwargs", None)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise _Problem(f"expected `chat_template_kwargs` to be an object, found {_json_type(kwargs)}")
    for name in sorted(OWN_TEMPLATE_ARGUMENTS & kwargs.keys()):
        raise _Problem(f"expected variables of a chat template in `chat_template_kwargs`, found {name}")
    return kwargs


def _json_type(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
