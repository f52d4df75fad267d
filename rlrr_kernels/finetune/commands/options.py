"""Options from the fields of :class:`Settings`, and Settings from options and a task's recipe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.recipes import recipe
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
    task = options.get("task", "")
    published = recipe(task) if task else {}
    if task and options.get("data_root") is None:
        raise ValueError(f"data_root: expected the folder that holds the images of {task} (--data-root), got none")
    return Settings(**{**published, **options, **({"task": task} if task else {})})


def describe_recipe(options: Mapping[str, Any], skip: Collection[str] = ()) -> list[str]:
    """Lines that say what the recipe fills in (where that is no default), and what was given in its place.

    Args:
        options: what was given. skip: fields to be silent about.
    """
    task = options.get("task", "")
    if not task:
        return []
    published = {name: value for name, value in recipe(task).items() if name not in skip}
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
    lines = [f"recipe of {task}: {', '.join(kept)}"]
    if changed:
        lines.append(f"given instead: {', '.join(changed)}")
    return lines


def shown(value: object) -> str:
    """A setting's value for a reader."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
