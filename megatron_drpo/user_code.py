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


def load_function(target: str, *, setting: str, known: str, argument: str) -> Callable[[Any], Any]:
    """The function of one argument behind `module:function`.

    Its module is found on sys.path or in the current directory.

    Args:
        target: `module:function`.
        setting: begins every message: "reward.name=mine:score".
        known: the names that exist besides, for the message about another form.
        argument: what the function takes, in words: "the Rollout".

    Raises:
        ConfigError: the target has another form, or there is no such module or function.
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
    return function


def call_guarded(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Failure:
    """Call code that is not ours; whatever it raises becomes a Failure that says what and where."""
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code may raise anything at all
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})")
