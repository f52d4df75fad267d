"""What an unfinished run needs to go on: one file, written whole after each epoch, without code in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rlrr_kernels.checkpoint import write_atomically
from rlrr_kernels.finetune.settings import Settings

FORMAT = "rlrr_kernels.state/1"

#: Where in the run folder it lies.
FILE = Path("state") / "last.safetensors"

#: Settings in which a run and its continuation may differ: they say where and how, and nothing of what is computed.
#: Under another ``data_root`` there must be as many images of as many classes.
MAY_DIFFER = frozenset({"device", "workers", "out", "resume", "tensorboard", "data_root"})


@dataclass(frozen=True)
class State:
    """A run after a whole number of epochs.

    Attributes:
        record: JSON values. ``settings``, ``processes``, ``images``, ``classes``: what a continuation must
            agree with; ``epoch``: epochs done; ``metrics``: of those; ``scaler``: of the gradients.
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


def read_state(folder: Path) -> State | None:
    """The state in a run folder; None for an empty one. (A run's own folder is never empty.)

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a run that is finished, or a folder or file that is none of a run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"resume: {folder} is no folder")
    path, metrics = folder / FILE, folder / "metrics.json"
    if metrics.is_file():
        try:
            found = json.loads(metrics.read_text())
        except ValueError as error:
            raise ValueError(f"resume: {metrics} cannot be read: {error}") from error
        if found.get("finished"):
            raise ValueError(f"resume: the run in {folder} is finished, after {len(found['epochs'])} epochs")
    if not path.is_file():
        # a file that was being written has a dot before its name
        if not any(each.is_file() and not each.name.startswith(".") for each in folder.rglob("*")):
            return None
        raise ValueError(f"resume: {folder} is no unfinished run: it has no {FILE}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"expected a file of format {FORMAT!r}, got {header.get('format')!r}")
            return State(json.loads(header["record"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error


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
    """Settings as a run wrote them, and the defaults of those that came later: it has had those."""
    return {**Settings().to_dict(), **values}


def check_settings(state: State, settings: Settings) -> None:
    """``ValueError`` naming the first field in which ``settings`` differ from the run's and may not."""
    own, given = recorded(state.record["settings"]), settings.to_dict()
    for name, value in given.items():
        if name not in MAY_DIFFER and own.get(name) != value:
            raise ValueError(f"{name}: expected {own.get(name)!r}, as in the run to resume, got {value!r}")
