"""Code that is not ours: finding a user's function by `module:function`, and calling it without harm.

Stdlib only: reward workers import it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from megatron_drpo.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no result."""

    reason: str


def load_function(
    target: str, *, setting: str, known: str, argument: str, is_async: bool = False
) -> Callable[[Any], Any]:
    """The function of one argument behind `module:function`.

    Its module is found on sys.path or in the current directory.

    Args:
        target: `module:function`.
        setting: begins every message: "reward.name=mine:score".
        known: the names that exist besides, for the message about another form.
        argument: what the function takes, in words: "the Rollout".
        is_async: whether a call is awaited.

    Raises:
        ConfigError: the target has another form, or there is no such module or function, or it is async and
            must not be, or the other way round.
    """
    module_name, separator, function_name = target.partition(":")
    if not (module_name and separator and function_name):
        raise ConfigError(f"{setting}: expected {known} or module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module = call_guarded(importlib.import_module, module_name)
    if isinstance(module, Failure):
        raise ConfigError(f"{setting}: module {module_name} cannot be imported: {module.reason}")
    function = vars(module).get(function_name)
    if not callable(function):
        raise ConfigError(f"{setting}: module {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(f"{setting}: expected a function of one argument, {argument}: {error}") from None
    _check_kind(function, f"{setting}: {function_name}", is_async=is_async)
    return function


def _check_kind(function: Callable[..., Any], name: str, *, is_async: bool) -> None:
    """
    Raises:
        ConfigError: a call would give a coroutine that nobody awaits, nothing to await, or a generator.
    """
    bodies = (function, getattr(function, "__call__", None))  # noqa: B004  an object's own
    if any(inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body) for body in bodies):
        raise ConfigError(f"{name} contains `yield`; expected a function that returns")
    if any(map(inspect.iscoroutinefunction, bodies)) is not is_async:
        found, wanted = (
            ("a plain `def`", "an `async def`") if is_async else ("an `async def`", "a plain `def`")
        )
        raise ConfigError(f"{name} is {found}; expected {wanted}")


def call_guarded(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Failure:
    """Call code that is not ours; whatever it raises becomes a Failure that says what and where."""
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code may raise anything at all
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})")
