"""Runs of ``rlrr-finetune`` that begin at once: a process that has imported everything forks a child for each.

To be started as ``python -m tests.reliability.fork_server``. Reads a JSON object a line: ``argv``; ``root``, the
folder whose files are watched; ``log``, where the child's output goes; ``die_at``, the number of the file event before
which the child kills itself, or 0; ``largest``, the size that no file may exceed, or 0; ``dies``, whether a
write beyond it ends the child in its midst. Writes the child's process id,
an ``e`` for each file event, and its exit status.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any

#: Audit events that change files; ``open`` counts where it writes.
EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"})
SIZES = (18, 8, 8)


def main() -> None:
    """Serve until standard input ends."""
    import torch

    # threads would not live on in a forked child, and what waits for them would wait for ever
    torch.set_num_threads(1)
    from rlrr_kernels.finetune import loop, run_folder
    from rlrr_kernels.finetune.__main__ import main as command
    from rlrr_kernels.finetune.data.arrays import read_digits
    from rlrr_kernels.finetune.settings import Settings
    from tests.finetune.runs import shrink

    read_digits(0)
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")

    load = loop.load_data
    loop.load_data = lambda settings: shrink(load(settings), *SIZES)
    epoch = {f"{part}_{what}": 0.5 for part in ("train", "val") for what in ("loss", "accuracy")}
    settings = dataclasses.asdict(Settings())
    # drawn once: drawing takes as long as an epoch, and only what is written counts here
    picture = run_folder.draw_curves(
        {"epochs": [{"epoch": 1, **epoch}], "settings": settings, "trainable_parameters": 1}
    )
    run_folder.draw_curves = lambda metrics: picture
    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(request, answers, command))
        os.write(answers, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _child(request: dict[str, Any], answers: int, command: Any) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in EVENTS or not str(arguments[0]).startswith(request["root"]):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == request["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(answers, b"e\n")

    sys.addaudithook(watch)
    if request["largest"]:
        # as a quota: what is written beyond it fails; Python ignores the signal that would end it there
        if request["dies"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], request["largest"]))
    try:
        return int(command(request["argv"]))
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
