"""What an unfinished run needs to go on: one file, written whole after each epoch, without code in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from rlrr_kernels.checkpoint import write_atomically
from rlrr_kernels.checkpoint.trained import printable
from rlrr_kernels.finetune.data import Splits, is_path
from rlrr_kernels.finetune.settings import PROTOCOLS, Settings, check_types
from rlrr_kernels.io.reading import expect, expect_names, parse_json, read_json, read_safetensors

FORMAT = "rlrr_kernels.state/1"

#: Where in the run folder it lies.
FILE = Path("state") / "last.safetensors"

#: Settings in which a run and its continuation may differ: they say where and how, and nothing of what is computed.
#: Under another ``data`` or ``data_root`` must lie the same images, see :func:`check_data`.
MAY_DIFFER = frozenset({"device", "workers", "cache", "out", "resume", "tensorboard", "data", "data_root"})


@dataclass(frozen=True)
class State:
    """A run after a whole number of epochs.

    Attributes:
        record: JSON values. ``settings``, ``processes``, ``images``, ``classes``, and in all but older ones
            ``data_fingerprint``: what a continuation must agree with; ``epoch``: epochs done; ``metrics``: of those;
            ``scaler``: of the gradients.
        tensors: whole tensors on the CPU. ``trained/<name>``, ``optimizer/<name>/<key>``, and where there is
            such a thing ``best/<name>`` and ``average/<name>``.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under one name, without it."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def write(self, folder: Path) -> None:
        """Replace the state in a run folder: a crash leaves the old one or this one."""
        path = folder / FILE
        path.parent.mkdir(exist_ok=True)
        header = {"format": FORMAT, "record": json.dumps(self.record)}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_atomically(path, safetensors.torch.save(tensors, metadata=header))

    def check(self, name: str, given: Any) -> None:
        """``ValueError`` if the run had another value of ``name`` (``processes``, ``images``, ``classes``)."""
        if self.record[name] != given:
            raise ValueError(f"{name}: expected {self.record[name]}, as in the run to resume, got {given}")

    def check_names(self, given: Sequence[str] | None) -> None:
        """``ValueError`` if the run knew a class by another name; of either without names there is nothing to check."""
        names = self.record["metrics"].get("class_names")
        if names is None or given is None:
            return
        for label, (own, name) in enumerate(zip(names, given, strict=True)):
            if own != name:
                raise ValueError(
                    f"classes: expected {printable(own)!r} for class {label}, as in the run to resume, "
                    f"got {printable(name)!r}"
                )


class Finished(ValueError):
    """There is nothing left to resume."""


def read_state(folder: Path) -> State | None:
    """The state in a run folder; None for an empty one. (A run's own folder is never empty.)

    Raises:
        FileNotFoundError: no such folder.
        Finished: a run that is.
        ValueError: a folder or file that is none of a run, or a damaged one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"resume: {folder} is no folder")
    path, metrics = folder / FILE, folder / "metrics.json"
    if metrics.is_file():
        try:
            found = read_json(metrics)
            if expect({"finished": False, **found}, "finished", bool):
                count = len(expect(found, "epochs", list))
                raise Finished(f"resume: the run in {folder} is finished, after {count} epochs")
        except Finished:
            raise
        except ValueError as error:
            raise ValueError(f"resume: {metrics} cannot be read: {error}") from error
    if not path.is_file():
        # a file that was being written has a dot before its name
        if not any(each.is_file() and not each.name.startswith(".") for each in folder.rglob("*")):
            return None
        raise ValueError(f"resume: {folder} is no unfinished run: it has no {FILE}")
    try:
        header, tensors = read_safetensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"expected a file of format {FORMAT!r}, got {header.get('format')!r:.80}")
        record = parse_json(header.get("record", ""), "its record")
        _check_record(record)
        return State(record, tensors)
    except ValueError as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error


def _check_record(record: Mapping[str, Any]) -> None:
    """``ValueError`` unless a record has all that a continuation takes from it, of the types that it takes."""
    epoch = expect(record, "epoch", int, least=0)
    expect(record, "processes", int, least=1)
    expect(record, "classes", int, least=1)
    for name in ("settings", "images", "scaler"):
        expect(record, name, dict)
    check_types(record["settings"])
    metrics = expect(record, "metrics", dict)
    epochs = expect(metrics, "epochs", list)
    expect({"data_fingerprint": None, **record}, "data_fingerprint", str, type(None))
    expect_names(metrics, "class_names", record["classes"])
    for name in ("settings", "processes", "images", "classes", "data_fingerprint"):
        if metrics.get(name) != record.get(name):
            raise ValueError(
                f"metrics: {name}: expected {record.get(name)!r:.80}, as in the record, got {metrics.get(name)!r:.80}"
            )
    expect(metrics, "train_seconds", float, least=0)
    expect({"resumed_after": [], **metrics}, "resumed_after", list)
    protocol = expect(metrics, "protocol", str)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r:.80}")
    if len(epochs) != epoch:
        raise ValueError(f"epochs: expected figures of {epoch}, got {len(epochs)}")
    for number, figures in enumerate(epochs, 1):
        if type(figures) is not dict or figures.get("epoch") != number:
            raise ValueError(f"epochs: expected the figures of epoch {number}, got {figures!r:.80}")
        split = {"choose-epoch": "val", "best-on-test": "test"}.get(protocol)
        names = [f"{part}_{what}" for part in ("train", *([split] if split else [])) for what in ("loss", "accuracy")]
        for name in names:
            expect(figures, name, float)
    if epochs and expect(metrics, "best_epoch", int, least=1) > epoch:
        raise ValueError(f"best_epoch: expected at most {epoch}, got {metrics['best_epoch']}")


def resumed(folder: Path, given: Mapping[str, Any]) -> Settings:
    """Settings that continue the run in ``folder``: the run's own, and in their place what was ``given``.

    Whether ``given`` may differ is checked by :func:`check_settings`, which names the field.

    Raises:
        ValueError, FileNotFoundError: no run to continue is there; see also :func:`read_state` and :class:`Settings`.
    """
    state = read_state(folder)
    if state is None:
        raise ValueError(f"resume: expected the folder of an unfinished run, got {folder}, which is empty")
    return Settings.from_dict({**state.record["settings"], "out": None, **given, "resume": folder})


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a run wrote them, and the defaults of those that came later: it has had those.

    Older runs kept paths as they were given, of the folder that the command ran in: taken to be this one.

    Raises:
        ValueError: one of another type than it has.
    """
    check_types(values)
    known = {**Settings().to_dict(), **values}
    paths = [name for name in ("checkpoint", "data_root") if known[name] is not None]
    paths += ["data"] if is_path(known["data"]) else []
    return known | {name: os.path.abspath(known[name]) for name in paths}


def check_data(known: Mapping[str, Any], settings: Settings, splits: Splits) -> None:
    """``ValueError`` if the images found are not those that a run was trained on, wherever they lie.

    Args:
        known: a state's record, or a run's metrics.
        settings: by which the images were found.
    """
    own, where = known.get("data_fingerprint"), settings.task or settings.data
    # versions that kept no fingerprint drew from these by class already
    by_class = settings.task or settings.data.endswith(".npz")
    if own is None and splits.drawn_from and not by_class:
        raise ValueError(
            f"data: the run on {where} is of an older version, which set other images aside to validate on: "
            "which it was trained on is not known"
        )
    if own is not None and own != splits.fingerprint:
        raise ValueError(
            f"data: expected the images of the run, got others in {where}: other names, classes, order or number"
        )


def check_settings(state: State, settings: Settings) -> None:
    """``ValueError`` naming the first field in which ``settings`` differ from the run's and may not."""
    own, given = recorded(state.record["settings"]), settings.to_dict()
    # of a task, data is unused
    may_differ = MAY_DIFFER - {"data"} if settings.task else MAY_DIFFER
    for name, value in given.items():
        if name not in may_differ and own.get(name) != value:
            raise ValueError(f"{name}: expected {own.get(name)!r}, as in the run to resume, got {value!r}")
