"""Triton's interpreter without most of what it repeats.

At each call of a function inside a kernel it looks through its whole language for what it has replaced already, which
takes a third of the time of a kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def replace_once_a_launch() -> None:
    """Replace the functions of Triton's language once for each launch and module of them."""
    from triton import language
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()

    @functools.cache
    def modules(fn: Callable[..., Any]) -> frozenset[str]:
        """Return the modules that ``_patch_lang`` finds."""
        seen = filter(inspect.ismodule, fn.__globals__.values())
        return frozenset(module.__name__ for module in seen if module in (language, language.core))

    def replace_what_is_new(fn: Callable[..., Any]) -> Any:
        if modules(fn) <= replaced:
            return None  # what a launch restores is of its first call
        replaced.update(modules(fn))
        return replace(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_what_is_new, launch_anew
