from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.config.schema import Mode
from megatron_drpo.data.jsonl import BadLine, PromptLine, read_lines

WriteLines = Callable[..., Path]


def test_every_field_of_a_line(write_lines: WriteLines) -> None:
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "2+2?"}]
    path = write_lines(
        {"prompt": "1+1?", "answer": "2", "response": "It is 2.", "level": 3, "tags": ["sum"]},
        {
            "messages": chat,
            "answer": 4,
            "prompt": None,
            "id": "b",
            "tools": [{"type": "function"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    first, second = read_lines(path, Mode.rl)
    assert first == PromptLine(
        index=0,
        prompt="1+1?",
        messages=None,
        answer="2",
        response="It is 2.",
        tools=None,
        chat_template_kwargs={},
        metadata={"level": 3, "tags": ["sum"]},
    )
    assert second == PromptLine(
        index=1,
        prompt=None,
        messages=chat,
        answer="4",
        response=None,
        tools=[{"type": "function"}],
        chat_template_kwargs={"enable_thinking": False},
        metadata={"id": "b"},
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [("42", "42"), ("-1", "-1"), ("0.5", "0.5"), ("1e-05", "0.00001"), ("1e3", "1000.0"), ("2.0", "2.0")],
)
def test_a_number_as_answer_becomes_plain_decimal_text(
    write_lines: WriteLines, number: str, text: str
) -> None:
    (line,) = read_lines(write_lines(f'{{"prompt": "?", "answer": {number}}}'), Mode.rl)
    assert isinstance(line, PromptLine)
    assert line.answer == text


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\\nb"}\r\n\r\n  \n{"prompt": "é\u2028"}'.encode())
    lines = [line for line in read_lines(path, Mode.rl) if isinstance(line, PromptLine)]
    assert [(line.index, line.prompt) for line in lines] == [(0, "a\nb"), (3, "é\u2028")]


BAD_LINES: list[tuple[Any, ...]] = [
    (
        '{"prompt": "a"',
        "expected a JSON object, found invalid JSON: Expecting ',' delimiter at column 15",
    ),
    ('{"prompt": "a", "x": NaN}', "expected a JSON object, found NaN, which is not JSON"),
    ("[" * 100_000, "expected a JSON object, found one nested too deeply"),
    (
        '{"prompt": "a", "x": ' + "[" * 101 + "]" * 101 + "}",
        "expected a JSON object, found one nested too deeply",
    ),
    (
        '{"prompt": "a", "answer": ' + "7" * 4301 + "}",
        "expected a JSON object, found a number of 4301 digits",
    ),
    (
        '{"prompt": "a", "x": [{"y": -' + "7" * 4301 + "}]}",
        "expected a JSON object, found a number of 4302 digits",
    ),
    (
        '{"prompt": "a", "answer": 1e400}',
        "expected a JSON object, found the number 1e400, which no float can hold",
    ),
    (
        '{"prompt": "a", "x": [-1E+400]}',
        "expected a JSON object, found the number -1E+400, which no float can hold",
    ),
    (
        '{"prompt": "a", "answer": 1e-400}',
        "expected a JSON object, found the number 1e-400, which no float can hold",
    ),
    (
        '{"prompt": "a", "answer": ' + "7" * 400 + ".5}",
        f"expected a JSON object, found the number {'7' * 30}..., which no float can hold",
    ),
    ('{"prompt": "a", "answer": Infinity}', "expected a JSON object, found Infinity, which is not JSON"),
    (
        '{"prompt": "a", "answer": -Infinity}',
        "expected a JSON object, found -Infinity, which is not JSON",
    ),
    (
        r'{"prompt": "a \ud83d b"}',
        r"expected `prompt` to be text, found \ud83d, one half of a surrogate pair",
    ),
    (
        r'{"messages": [{"role": "user", "content": "\ude00\ud83d"}]}',
        r"expected `messages` to be text, found \ude00, one half of a surrogate pair",
    ),
    (
        r'{"prompt": "a", "answer": "\uDFFF"}',
        r"expected `answer` to be text, found \udfff, one half of a surrogate pair",
    ),
    (
        r'{"prompt": "a", "x": {"\ud83d": 1}}',
        r"expected `x` to be text, found \ud83d, one half of a surrogate pair",
    ),
    (
        r'{"prompt": "a", "y\ud83d": 1}',
        r"expected `y\ud83d` to be text, found \ud83d, one half of a surrogate pair",
    ),
    (["prompt"], "expected a JSON object, found a list"),
    ('"text"', "expected a JSON object, found text"),
    ({"answer": "2"}, "expected either `prompt` (text) or `messages` (a chat), found neither"),
    (
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
        "expected either `prompt` (text) or `messages` (a chat), found both",
    ),
    ({"prompt": 3}, "expected `prompt` to be text, found a number"),
    ({"prompt": " \n"}, "expected `prompt` to be text, found an empty string"),
    ({"prompt": "a", "answer": True}, "expected `answer` to be text or a number, found true or false"),
    ({"prompt": "a", "answer": ["2"]}, "expected `answer` to be text or a number, found a list"),
    ({"prompt": "a", "answer": ""}, "expected `answer` to be text or a number, found an empty string"),
    ({"prompt": "a", "response": {}}, "expected `response` to be text, found an object"),
    ({"messages": "hi"}, "expected `messages` to be a list of chat messages, found text"),
    ({"messages": []}, "expected `messages` to be a list of chat messages, found an empty list"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user"}]},
        "expected messages[1] to have `role` and `content`, both text",
    ),
    (
        {"messages": [{"role": "user", "content": None}]},
        "expected messages[0] to have `role` and `content`, both text",
    ),
    ({"prompt": "a", "tools": "f"}, "expected `tools` to be a list of JSON schemas, found text"),
    (
        {"prompt": "a", "tools": ["f"]},
        "expected `tools` to be a list of JSON schemas, found a list of other things",
    ),
    (
        {"prompt": "a", "chat_template_kwargs": ["f"]},
        "expected `chat_template_kwargs` to be an object, found a list",
    ),
    (
        {"prompt": "a", "chat_template_kwargs": {"tokenize": True}},
        "expected variables of a chat template in `chat_template_kwargs`, found tokenize",
    ),
    ({"messages": ["hi"]}, "expected messages[0] to have `role` and `content`, both text"),
]
"""A line, and what is wrong with it."""


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_what_is_wrong_with_a_line(write_lines: WriteLines, line: object, problem: str) -> None:
    good = {"prompt": "a"}
    assert list(read_lines(write_lines(good, line, good), Mode.rl))[1] == BadLine(index=1, problem=problem)


def test_values_at_the_edge_are_kept(write_lines: WriteLines) -> None:
    path = write_lines(
        r'{"prompt": "\ud83d\ude00", "x": {"a\\ud83d": 0e999}}',
        '{"prompt": "a", "answer": ' + "7" * 4300 + "}",
        '{"prompt": "a", "answer": 1e308, "x": ' + "[" * 99 + "5e-324" + "]" * 99 + "}",
    )
    emoji, long, deep = (line for line in read_lines(path, Mode.rl) if isinstance(line, PromptLine))
    assert (emoji.prompt, emoji.metadata) == ("😀", {"x": {"a\\ud83d": 0.0}})
    assert long.answer == "7" * 4300
    assert deep.answer == "1" + "0" * 308


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n{"prompt": "b"}\n')
    bad, good = read_lines(path, Mode.rl)
    assert bad == BadLine(index=0, problem="expected UTF-8 text, found invalid start byte")
    assert isinstance(good, PromptLine)


def test_what_the_mode_and_the_reward_need(write_lines: WriteLines) -> None:
    path = write_lines({"prompt": "a", "answer": "b"}, {"prompt": "a", "response": "b"})
    no_response, complete = read_lines(path, Mode.sft)
    assert isinstance(no_response, BadLine)
    assert "expected a `response` to learn from (train.mode=sft), found none" in no_response.problem
    assert isinstance(complete, PromptLine)
    complete, no_answer = read_lines(path, Mode.rl, needs_answer=True)
    assert isinstance(complete, PromptLine)
    assert no_answer == BadLine(index=1, problem="expected an `answer` for the reward, found none")
