from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from megatron_drpo.config.schema import DataConfig, Mode, OnBadLine, OnLongPrompt
from megatron_drpo.data.prompts import check_prompt_file, load_prompts
from megatron_drpo.errors import DataError

WriteLines = Callable[..., Path]


def test_plain_text_gets_the_tokenizers_special_tokens(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines({"prompt": "1+1=", "answer": 2, "level": 1}, "", {"prompt": "é", "response": "e"})
    loaded = load_prompts(path, DataConfig(), tokenizer, Mode.rl)
    first, second = loaded.prompts
    assert (first.id, first.text, first.answer, first.metadata) == (0, "1+1=", "2", {"level": 1})
    assert first.token_ids == (0, *(tokenizer.get_vocab()[character] for character in "1+1="))
    assert (second.id, second.text, second.response) == (2, "é", "e")
    assert len(second.token_ids) == 1 + len("é".encode())
    assert (loaded.bad_lines, loaded.num_long_prompts) == ([], 0)


def test_chats_go_through_the_template_once(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    path = write_lines({"prompt": "hello"}, {"messages": chat})
    plain, rendered = load_prompts(path, DataConfig(), tokenizer, Mode.rl).prompts
    assert plain.text == "hello"
    assert rendered.text == "<bos><system>Be brief.\n<user>1+1=\n<assistant>"
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(rendered.token_ids) == expected
    assert rendered.token_ids.count(0) == 1  # not two <bos>


def test_apply_chat_template_wraps_a_prompt(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = DataConfig(apply_chat_template=True)
    (prompt,) = load_prompts(write_lines({"prompt": "hello"}), config, tokenizer, Mode.rl).prompts
    assert prompt.text == "<bos><user>hello\n<assistant>"


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "subtract"}}
USER = {"role": "user", "content": "1+1="}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add"}}],
}


TEMPLATE_INPUTS: list[tuple[Any, ...]] = [
    ({"messages": [USER]}, {}, [USER], {}),
    ({"messages": [USER], "tools": [TOOL]}, {}, [USER], {"tools": [TOOL]}),
    ({"messages": [USER]}, {"tools": [TOOL]}, [USER], {"tools": [TOOL]}),
    ({"messages": [USER], "tools": [OTHER_TOOL]}, {"tools": [TOOL]}, [USER], {"tools": [OTHER_TOOL]}),
    ({"messages": [USER], "tools": []}, {"tools": [TOOL]}, [USER], {}),
    ({"messages": [USER], "tools": None}, {"tools": [TOOL]}, [USER], {"tools": [TOOL]}),
    ({"messages": [USER, CALL], "tools": [TOOL]}, {}, [USER, CALL], {"tools": [TOOL]}),
    (
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
        {},
        [USER],
        {"enable_thinking": False},
    ),
    (
        {"messages": [USER]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        [USER],
        {"enable_thinking": False},
    ),
    (
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": False, "bos_token": "!"}},
        [USER],
        {"enable_thinking": True, "bos_token": "!"},
    ),
    (
        {"messages": [USER]},
        {"system_prompt": "Be brief."},
        [{"role": "system", "content": "Be brief."}, USER],
        {},
    ),
    (
        {"messages": [{"role": "system", "content": "Be long."}, USER]},
        {"system_prompt": "Be brief."},
        [{"role": "system", "content": "Be long."}, USER],
        {},
    ),
    (
        {"prompt": "1+1=", "tools": [TOOL]},
        {
            "system_prompt": "Be brief.",
            "apply_chat_template": True,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        [{"role": "system", "content": "Be brief."}, USER],
        {"tools": [TOOL], "enable_thinking": False},
    ),
]
"""A line, settings of data, and what goes to the template."""


@pytest.mark.parametrize(("line", "config", "messages", "kwargs"), TEMPLATE_INPUTS)
def test_the_template_gets_what_line_and_configuration_say(
    write_lines: WriteLines,
    tokenizer: PreTrainedTokenizerFast,
    line: dict[str, Any],
    config: dict[str, Any],
    messages: list[dict[str, str]],
    kwargs: dict[str, Any],
) -> None:
    (prompt,) = load_prompts(write_lines(line), DataConfig(**config), tokenizer, Mode.rl).prompts
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **kwargs
    )
    assert list(prompt.token_ids) == expected
    assert list(tokenizer(prompt.text, add_special_tokens=False)["input_ids"]) == expected
    assert prompt.metadata == {}


@pytest.mark.parametrize(
    ("line", "config", "name"),
    [
        ({"prompt": "a", "tools": [TOOL]}, {}, "`tools`"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, {}, "`chat_template_kwargs`"),
        ({"prompt": "a"}, {"system_prompt": "Be brief."}, "data.system_prompt"),
        ({"prompt": "a"}, {"tools": [TOOL]}, "data.tools"),
        ({"prompt": "a"}, {"chat_template_kwargs": {"x": 1}}, "data.chat_template_kwargs"),
    ],
)
def test_plain_text_has_no_template_to_take_them(
    write_lines: WriteLines,
    tokenizer: PreTrainedTokenizerFast,
    line: dict[str, Any],
    config: dict[str, Any],
    name: str,
) -> None:
    (problem,) = check_prompt_file(write_lines(line), DataConfig(**config), tokenizer, Mode.rl)
    assert problem.endswith(
        f"line 1: expected `messages`, or data.apply_chat_template=true, for {name}: found plain text"
    )


@pytest.mark.parametrize("num_written", [0, 1, 2])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text_that_begins_with_bos_gets_no_second_one(
    write_lines: WriteLines,
    tokenizer: PreTrainedTokenizerFast,
    num_written: int,
    adds_bos: bool,
) -> None:
    if not adds_bos:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    path = write_lines({"prompt": "<bos>" * num_written + "a <bos>"}, {"prompt": "a"})
    prompt, other = load_prompts(path, DataConfig(), tokenizer, Mode.rl).prompts
    content = tokenizer.encode("a <bos>", add_special_tokens=False)
    assert content.count(0) == 1
    assert list(prompt.token_ids) == [0] * max(num_written, adds_bos) + content
    assert other.token_ids[:-1] == (0,) * adds_bos


@pytest.mark.parametrize(
    ("line", "apply", "reason"),
    [
        ({"prompt": "a"}, True, "data.apply_chat_template=true"),
        ({"messages": [{"role": "user", "content": "a"}]}, False, "`messages`"),
    ],
)
def test_a_tokenizer_without_chat_template(
    write_lines: WriteLines,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    line: dict[str, object],
    apply: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    path = write_lines({"prompt": "b"}, line) if not apply else write_lines(line)
    config = DataConfig(apply_chat_template=apply)
    with pytest.raises(DataError, match=f"line {1 if apply else 2}: {reason} needs a chat template"):
        load_prompts(path, config, tokenizer, Mode.rl)


def test_a_chat_the_template_refuses_is_a_broken_line(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines({"prompt": "a"}, {"messages": [{"role": "tool", "content": "a"}]}, "{")
    problem = "prompts.jsonl line 2: expected messages the chat template accepts: no tools here"
    with pytest.raises(DataError, match=problem):
        load_prompts(path, DataConfig(), tokenizer, Mode.rl)
    loaded = load_prompts(path, DataConfig(on_bad_line=OnBadLine.skip), tokenizer, Mode.rl)
    assert [prompt.id for prompt in loaded.prompts] == [0]
    assert [line.index for line in loaded.bad_lines] == [1, 2]


def test_long_prompts_are_dropped_and_counted_or_named(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines({"prompt": "x" * 99}, {"prompt": "x" * 100}, {"prompt": "x"})
    loaded = load_prompts(path, DataConfig(max_prompt_tokens=100), tokenizer, Mode.rl)
    assert [prompt.id for prompt in loaded.prompts] == [0, 2]
    assert loaded.num_long_prompts == 1
    assert loaded.left_out == "1 prompts over data.max_prompt_tokens are dropped"
    config = DataConfig(max_prompt_tokens=100, on_long_prompt=OnLongPrompt.error)
    with pytest.raises(
        DataError, match=r"line 2: the prompt has 101 tokens, more than .*max_prompt_tokens=100"
    ):
        load_prompts(path, config, tokenizer, Mode.rl)


def test_no_usable_prompt(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = DataConfig(max_prompt_tokens=5, on_bad_line=OnBadLine.skip)
    path = write_lines({"prompt": "too long"}, "{")
    with pytest.raises(DataError, match="no usable prompt: 1 lines are broken, 1 prompts are longer than"):
        load_prompts(path, config, tokenizer, Mode.rl)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_prompts(tmp_path / "absent.jsonl", config, tokenizer, Mode.rl)


def test_mode_and_reward_decide_what_is_broken(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines({"prompt": "a"})
    with pytest.raises(DataError, match="line 1: expected a `response`"):
        load_prompts(path, DataConfig(), tokenizer, Mode.sft)
    with pytest.raises(DataError, match="line 1: expected an `answer`"):
        load_prompts(path, DataConfig(), tokenizer, Mode.rl, needs_answer=True)


ODD_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'divides' %}{{ 1 // 0 }}{% endif %}"
    "{% if message.role == 'calls' %}{{ message.content() }}{% endif %}"
    "{% if message.role == 'half' %}{{ '\\ud83d' }}{% endif %}"
    "{% if message.role != 'silent' %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            {"messages": [{"role": "divides", "content": "a"}]},
            "expected messages the chat template accepts: ZeroDivisionError: integer division",
        ),
        (
            {"messages": [{"role": "calls", "content": "a"}]},
            "expected messages the chat template accepts: TypeError: 'str' object is not callable",
        ),
        (
            {"messages": [{"role": "half", "content": "a"}]},
            "expected a prompt that the tokenizer accepts: TypeError: ",
        ),
        (
            {"messages": [{"role": "silent", "content": "a"}]},
            "expected a prompt of at least one token, found none",
        ),
        ({"prompt": "😀"}, "expected token ids in 0..199, found a prompt with the id "),
        (
            '{"prompt": "a\\ud83d"}',
            "expected `prompt` to be text, found \\ud83d, one half of a surrogate pair",
        ),
    ],
)
def test_a_line_that_some_layer_cannot_use_is_a_broken_line(
    write_lines: WriteLines,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    line: object,
    problem: str,
) -> None:
    """In the check as in the run, whichever layer notices."""
    monkeypatch.setattr(tokenizer, "chat_template", ODD_TEMPLATE)
    good = {"messages": [{"role": "user", "content": "b"}]}
    path = write_lines(good, line, {"prompt": "b"})
    (sentence,) = check_prompt_file(path, DataConfig(), tokenizer, Mode.rl, vocab_size=200)
    assert sentence.startswith(f"{path} line 2: {problem}")
    with pytest.raises(DataError) as caught:
        load_prompts(path, DataConfig(), tokenizer, Mode.rl, vocab_size=200)
    assert str(caught.value) == f"{sentence}\ndata.on_bad_line=skip skips broken lines"
    skip = DataConfig(on_bad_line=OnBadLine.skip)
    assert check_prompt_file(path, skip, tokenizer, Mode.rl, vocab_size=200) == []
    loaded = load_prompts(path, skip, tokenizer, Mode.rl, vocab_size=200)
    assert [prompt.id for prompt in loaded.prompts] == [0, 2]
    assert loaded.left_out is not None
    assert loaded.left_out.startswith(f"1 broken lines are skipped, the first is line 2: {problem}")


def test_an_answer_that_the_reward_can_do_nothing_with(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    def find_answer_problems(answers: Sequence[str]) -> dict[str, str]:
        return {answer: f"no {answer}" for answer in answers if answer == "b"}

    path = write_lines({"prompt": "a", "answer": "a"}, {"prompt": "a", "answer": "b"}, {"prompt": "a"})
    for known in (tokenizer, None):
        assert check_prompt_file(
            path, DataConfig(), known, Mode.rl, find_answer_problems=find_answer_problems
        ) == [f"{path} line 2: no b"]
    skip = DataConfig(on_bad_line=OnBadLine.skip)
    loaded = load_prompts(path, skip, tokenizer, Mode.rl, find_answer_problems=find_answer_problems)
    assert [prompt.id for prompt in loaded.prompts] == [0, 2]
    assert loaded.left_out == "1 broken lines are skipped, the first is line 2: no b"


def test_demonstrations_are_tokenised_too(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "~"})
    problem = "expected token ids in 0..92, found a response with the id 94: the tokenizer is another model's"
    assert check_prompt_file(path, DataConfig(), tokenizer, Mode.sft, vocab_size=93) == [
        f"{path} line 2: {problem}"
    ]
    assert check_prompt_file(path, DataConfig(), tokenizer, Mode.rl, vocab_size=93) == []


def test_check_lists_the_first_problems_and_counts_the_rest(write_lines: WriteLines) -> None:
    path = write_lines({"prompt": "a"}, *["{"] * 7, {"prompt": "b"})
    problems = check_prompt_file(path, DataConfig(), None, Mode.rl)
    assert len(problems) == 6
    assert problems[0].startswith(f"{path} line 2: expected a JSON object, found invalid JSON")
    assert problems[4].startswith(f"{path} line 6: ")
    assert problems[5] == f"{path}: 7 of 9 lines are broken; the first are listed above"
    assert check_prompt_file(path, DataConfig(on_bad_line=OnBadLine.skip), None, Mode.rl) == []


def test_check_without_a_single_good_line(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    skip = DataConfig(on_bad_line=OnBadLine.skip, max_prompt_tokens=3)
    path = write_lines("{", "3", {"prompt": "too long"})
    no_prompt, _, number = check_prompt_file(path, skip, tokenizer, Mode.rl)
    assert no_prompt == (
        f"{path}: no usable prompt: 2 lines are broken, 1 prompts are longer than data.max_prompt_tokens=3"
    )
    assert number == f"{path} line 2: expected a JSON object, found a number"
    assert check_prompt_file(path, skip, None, Mode.rl) == []  # it takes a tokenizer to count
    path = write_lines("", "")
    assert check_prompt_file(path, skip, tokenizer, Mode.rl) == [
        f"{path}: the file is empty; expected one JSON object per line"
    ]
    path = tmp_path / "absent.jsonl"
    assert check_prompt_file(path, skip, tokenizer, Mode.rl) == [
        f"{path}: no such file; expected a JSONL file of prompts"
    ]


def test_check_of_a_good_file(write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines({"prompt": "a", "answer": 1})
    for known in (tokenizer, None):
        assert check_prompt_file(str(path), DataConfig(), known, Mode.rl, needs_answer=True) == []
    assert load_prompts(path, DataConfig(), tokenizer, Mode.rl).left_out is None


def test_check_says_what_the_run_would(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long prompts and of a tokenizer without chat template."""
    path = write_lines({"prompt": "x"}, {"prompt": "xyz"}, {"messages": [{"role": "user", "content": "a"}]})
    config = DataConfig(max_prompt_tokens=3, on_long_prompt=OnLongPrompt.error)
    (problem,) = check_prompt_file(path, config, tokenizer, Mode.rl)
    assert problem.startswith(f"{path} line 2: the prompt has 4 tokens, more than data.max_prompt_tokens=3")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (problem,) = check_prompt_file(path, config, tokenizer, Mode.rl)
    assert problem.startswith(f"{path} line 3: `messages` needs a chat template")
