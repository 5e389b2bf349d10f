from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_drpo.config import DataConfig, Mode, OnBadLine, OnLongPrompt
from megatron_drpo.data.prompts import load_prompts
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
    assert (loaded.num_bad_lines, loaded.num_long_prompts) == (0, 0)


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
    assert loaded.num_bad_lines == 2


def test_long_prompts_are_dropped_and_counted_or_named(
    write_lines: WriteLines, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_lines({"prompt": "x" * 99}, {"prompt": "x" * 100}, {"prompt": "x"})
    loaded = load_prompts(path, DataConfig(max_prompt_tokens=100), tokenizer, Mode.rl)
    assert [prompt.id for prompt in loaded.prompts] == [0, 2]
    assert loaded.num_long_prompts == 1
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
