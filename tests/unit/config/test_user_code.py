"""Finding a user's function, and what its errors become."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_drpo.config.user_code import Failure, call_guarded, load_function
from megatron_drpo.errors import ConfigError


def _load(target: str) -> Callable[[object], object]:
    return load_function(target, setting=f"some.key={target}", known="one, two", argument="the Thing")


def test_function_in_the_current_directory(write_module: Callable[[str, str], None]) -> None:
    write_module("user_double", "def double(x, factor=2):\n    return factor * x\n")
    assert _load("user_double:double")(21) == 42


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("double", "expected one, two or module:function"),
        (":double", "expected one, two or module:function"),
        ("user_wrong:", "expected one, two or module:function"),
        ("user_absent:f", "module user_absent cannot be imported: ModuleNotFoundError: No module named "),
        ("user_raises:f", "module user_raises cannot be imported: ZeroDivisionError: division by zero ("),
        ("user_exits:f", "module user_exits cannot be imported: SystemExit: 3 ("),
        ("user_wrong:g", "module user_wrong has no function g"),
        ("user_wrong:LIMIT", "module user_wrong has no function LIMIT"),
        ("user_wrong:f", "expected a function of one argument, the Thing: missing a required argument: 'y'"),
    ],
)
def test_problem_is_one_sentence(target: str, problem: str, write_module: Callable[[str, str], None]) -> None:
    write_module("user_raises", "\n1 / 0\n")
    write_module("user_exits", "raise SystemExit(3)\n")
    write_module("user_wrong", "LIMIT = 3\ndef f(x, y):\n    return x\n")
    with pytest.raises(ConfigError) as caught:
        _load(target)
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"some.key={target}: {problem}")


@pytest.mark.parametrize(
    ("name", "is_async", "problem"),
    [
        ("plain", False, None),
        ("Plain()", False, None),
        ("awaited", True, None),
        ("Awaited()", True, None),
        ("functools.partial(awaited, y=2)", True, None),
        ("awaited", False, "is an `async def`; expected a plain `def`"),
        ("Awaited()", False, "is an `async def`; expected a plain `def`"),
        ("functools.partial(awaited, y=2)", False, "is an `async def`; expected a plain `def`"),
        ("plain", True, "is a plain `def`; expected an `async def`"),
        ("yields", False, "contains `yield`; expected a function that returns"),
        ("yields_later", True, "contains `yield`; expected a function that returns"),
    ],
)
def test_functions_that_are_awaited_and_those_that_are_not(
    name: str, is_async: bool, problem: str | None, write_module: Callable[[str, str], None]
) -> None:
    source = (
        "import functools\n"
        "def plain(x): return 1.0\n"
        "async def awaited(x, y=1): return 1.0\n"
        "def yields(x): yield 1.0\n"
        "async def yields_later(x): yield 1.0\n"
        "class Plain:\n    def __call__(self, x): return 1.0\n"
        "class Awaited:\n    async def __call__(self, x): return 1.0\n"
    )
    module = f"user_kind_{abs(hash((name, is_async)))}"
    write_module(module, f"{source}target = {name}\n")

    def load() -> object:
        return load_function(
            f"{module}:target", setting="some.key", known="one", argument="the Thing", is_async=is_async
        )

    if problem is None:
        assert callable(load())
        return
    with pytest.raises(ConfigError) as caught:
        load()
    assert str(caught.value) == f"some.key: target {problem}"


def test_guarded_call_says_what_and_where() -> None:
    assert call_guarded(divmod, 7, 2) == (3, 1)
    failure = call_guarded(int, "seven")
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("ValueError: invalid literal for int() with base 10: 'seven' (")
