"""Options from the fields of :class:`Settings`, and Settings from options and a task's recipe."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.recipes import BACKBONE, recipe
from rlrr_kernels.finetune.settings import PATHS, Settings

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def add_settings(
    parser: argparse._ActionsContainer, only: Collection[str] | None = None, skip: Collection[str] = ()
) -> None:
    """One option for each field, ``--a-b`` for ``a_b``, and ``--x/--no-x`` for booleans.

    An option that is not given leaves nothing in the namespace: the value may then come
    from a recipe or a run, and only then from the field's default.

    Args:
        parser: the parser, or group of one, to add to.
        only: these fields alone; their defaults are not said, as they come from elsewhere.
        skip: all but these.
    """
    for name, field in FIELDS.items():
        if name in skip or (only is not None and name not in only):
            continue
        flag, text = "--" + name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + _default(field) * (only is None)}
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif name in PATHS:
            parser.add_argument(flag, type=Path, metavar="PATH", **options)
        else:
            choices = field.metadata.get("choices")
            # the empty string stands for "not said"; it is no choice to offer
            options["choices"] = [choice for choice in choices if choice != ""] if choices else None
            parser.add_argument(flag, type=type(field.default), metavar=None if choices else _metavar(field), **options)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default in (None, ""):
        return ""
    shown = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else f"{field.default}"
    return f" (default: {shown})"


def _metavar(field: dataclasses.Field[Any]) -> str:
    return {int: "N", float: "X"}.get(type(field.default), "NAME")


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user gave."""
    return {name: value for name, value in vars(arguments).items() if name in FIELDS}


def settings_from(options: Mapping[str, Any]) -> Settings:
    """The defaults, overridden by the task's recipe where there is one, overridden by ``options``.

    Raises:
        ValueError: a task that is not known or that lacks its ``data_root``, or a bad setting.
    """
    published = _recipe(options)
    if published and options.get("data_root") is None:
        raise ValueError(f"data_root: expected the folder that holds the images of {options['task']}, got none")
    return Settings(**{**published, **_fitted_warmup(options), **options})


def _recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the task, for the model that is to be trained; nothing without a task."""
    task = options.get("task", "")
    return recipe(task, options.get("model", BACKBONE)) if task else {}


def _fitted_warmup(options: Mapping[str, Any]) -> dict[str, int]:
    """A warm-up that nobody asked for, where it is as long as the epochs that somebody did: the same share of them."""
    usual = {name: FIELDS[name].default for name in ("epochs", "warmup_epochs")} | _recipe(options)
    epochs, warmup = options.get("epochs", usual["epochs"]), usual["warmup_epochs"]
    if "warmup_epochs" in options or not 1 <= epochs <= warmup:
        return {}
    return {"warmup_epochs": warmup * epochs // usual["epochs"]}


def describe_settings(options: Mapping[str, Any], skip: Collection[str] = ()) -> list[str]:
    """Lines that say what :func:`settings_from` fills in.

    That is what the recipe does (where that is no default), what was given in its place, and a warm-up that is
    shorter than usual.

    Args:
        options: what was given. skip: fields to be silent about.
    """
    shorter = _fitted_warmup(options)
    recipe_of_task = _recipe(options)
    published = {name: value for name, value in recipe_of_task.items() if name not in {*skip, *shorter}}
    kept = [
        f"{name} {shown(value)}"
        for name, value in published.items()
        if options.get(name, value) == value != FIELDS[name].default
    ]
    changed = [
        f"{name} {shown(options[name])} (recipe: {shown(value)})"
        for name, value in published.items()
        if options.get(name, value) != value
    ]
    lines = [f"recipe of {options['task']}: {', '.join(kept)}"] if published else []
    if changed:
        lines.append(f"given instead: {', '.join(changed)}")
    for name, epochs in shorter.items():
        usual = recipe_of_task.get(name, FIELDS[name].default)
        lines.append(f"warm-up: {epochs} epochs, not the usual {usual}, as the run has {options['epochs']}")
    return lines


#: ``name=value`` in a message, as Python writes an argument.
_ARGUMENT = re.compile(r"(?<![\w./-])(\w+)=('[^']*'|[\w.+-]*\w)")


def as_options(message: str, parser: argparse.ArgumentParser, words: Iterable[str]) -> str:
    """An error about settings, for who has options: of ``lr: ... epochs=1`` comes ``--lr: ... --epochs 1``.

    Args:
        message: of an error. One that does not begin with the name of an argument is left as it is.
        parser: of the command: what it has no option for is left as it is, too.
        words: what the user typed: no part of these but options is rewritten.
    """
    name, colon, text = message.partition(": ")
    if not (name.isidentifier() and colon):
        return message
    flags: dict[str, str] = {}
    for action in parser._actions:
        if action.option_strings:
            # an option that takes several values stands for each: --lrs for lr
            flags[action.dest.removesuffix("s") if action.nargs == "+" else action.dest] = action.option_strings[0]
    typed = [word for word in words if not word.startswith("-")]

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags or any(found[0] in word for word in typed):
            return found[0]
        if value in ("True", "False"):
            return "--" + "no-" * (value == "False") + flags[name].removeprefix("--")
        return f"{flags[name]} {shlex.quote(value.strip(chr(39)))}"

    return f"{flags.get(name, name)}: {_ARGUMENT.sub(option, text)}"


def shown(value: object) -> str:
    """A setting's value for a reader."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
