"""Cases that need several processes: one start under ``torchrun`` for all of them, on the CPU by gloo.

``python -m torch.distributed.run ... -m tests.reliability.in_processes FOLDER NAME MODULE...`` runs of the ``CASES`` of
some modules those that are named, one after the other in each process; each appends to ``FOLDER/<rank>`` what became
of them, as lines of JSON. ``NAME`` is a list of names with commas.
"""

import importlib
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.once import once
from tests.torchrun import ROOT, launch


def case(cases):
    """Decorator: keep a function under its name."""

    def keep(function):
        cases[function.__name__] = function
        return function

    return keep


def parameters(module, *quick):
    """Names of a module's cases, to parametrise a test with: all but the ``quick`` ones are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in module.CASES]


def outcomes(request, tmp_path_factory, processes, *modules):
    """Case -> error of each process (None where it passed), of those that this session has tests of."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    cases = [name for module in modules for name in module.CASES if name in asked]

    def start(folder):
        arguments = (str(folder), ",".join(cases), *(module.__name__ for module in modules))
        done = launch("tests.reliability.in_processes", *arguments, processes=processes, cwd=ROOT)
        (folder / "output").write_text(done.stdout[-1000:] + done.stderr[-3000:])

    folder = once(tmp_path_factory, f"{processes} processes", start)
    found = {}
    for rank in range(processes):
        lines = (folder / str(rank)).read_text().splitlines() if (folder / str(rank)).exists() else []
        for name, error in map(json.loads, lines):
            found.setdefault(name, {})[rank] = error
    found["whole run"] = (folder / "output").read_text()
    return found


def check(found, name, processes=2):
    """Fail with the errors of a case's processes."""
    errors = found.get(name, {})
    for rank in range(processes):
        if rank not in errors:
            pytest.fail(f"process {rank} did not end {name}: {found['whole run']}")
        if errors[rank] is not None:
            pytest.fail(f"process {rank}: {errors[rank]}")


def main(folder, names, *modules):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=20))
    with open(Path(folder) / str(dist.get_rank()), "w", buffering=1) as out:
        for module in map(importlib.import_module, modules):
            module.start()
            for name in (name for name in module.CASES if name in names.split(",")):
                try:
                    module.CASES[name]()
                    error = None
                except (Exception, pytest.fail.Exception):  # the second is what pytest.raises raises
                    error = traceback.format_exc()[-3000:]
                out.write(json.dumps([name, error]) + "\n")
                # a case that one process failed in may have left another waiting in the middle of it
                dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
