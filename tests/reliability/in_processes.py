"""Cases that need several processes: one start under ``torchrun`` for all cases of a file, on the CPU by gloo.

``python -m torch.distributed.run ... -m tests.reliability.in_processes MODULE FOLDER`` runs the ``CASES`` of a
module one after the other in each process; each appends to ``FOLDER/<rank>`` what became of them, as lines of JSON.
"""

import importlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from tests.torchrun import ROOT, launch


def case(cases):
    """Decorator: keep a function under its name."""

    def keep(function):
        cases[function.__name__] = function
        return function

    return keep


def outcomes(module, tmp_path_factory, processes=2):
    """Case -> error of each process (None where it passed), of those that ran to their end; started once a session."""
    base = tmp_path_factory.getbasetemp()
    # each of pytest-xdist's workers has a folder of its own, below one that they share
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / module.__name__
    with FileLock(f"{folder}.lock"):
        if not (folder / "output").exists():
            folder.mkdir(exist_ok=True)
            arguments = ("tests.reliability.in_processes", module.__name__, str(folder))
            done = launch(*arguments, processes=processes, cwd=ROOT, timeout=600)
            (folder / "output").write_text(done.stdout[-1000:] + done.stderr[-3000:])
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


def main(module, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    module = importlib.import_module(module)
    module.start()
    with open(Path(folder) / str(dist.get_rank()), "w", buffering=1) as out:
        for name, function in module.CASES.items():
            try:
                function()
                error = None
            except (Exception, pytest.fail.Exception):  # the second is what pytest.raises raises
                error = traceback.format_exc()[-3000:]
            out.write(json.dumps([name, error]) + "\n")
            # a case that one process failed in may have left another waiting in the middle of it
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
