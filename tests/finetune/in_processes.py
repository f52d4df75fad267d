"""What ``test_distributed.py`` runs under ``torchrun``: a few small runs, one after the other, in the same processes.

``python -m torch.distributed.run ... -m tests.finetune.in_processes FOLDER``
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from rlrr_kernels.finetune import run_folder, train
from rlrr_kernels.finetune.__main__ import main as command
from rlrr_kernels.finetune.distributed import launched
from rlrr_kernels.finetune.trainer import Trainer
from tests.finetune.runs import first_is_best, prepared

#: 33 images: the last step has one, so of two processes one has none. 9 and 7 do not divide evenly either.
SIZES = (33, 9, 7)

#: Name -> settings of a run; batch sizes are those of two processes.
RUNS = {
    "ddp": {"batch_size": 16},
    "ddp accumulated": {"batch_size": 8, "grad_accumulation": 2, "ema": 0.5},
    "fsdp accumulated": {"batch_size": 8, "grad_accumulation": 2, "ema": 0.5, "parallel": "fsdp"},
}

#: The first epoch is the chosen one: shards are written after forward passes without a backward pass, for the
#: average before the third epoch and for the chosen epoch before the test.
EARLY = {"epochs": 3, "warmup_epochs": 0, "ema": 0.5}

#: What each process gives the command at the end.
COMMAND = [
    *("--method", "linear", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "200"),
    *("--device", "cpu", "--no-tensorboard"),
]

#: Those that are also interrupted and resumed.
RESUMED = ("ddp accumulated", "fsdp accumulated")


class Unreadable(torch.utils.data.Dataset):
    """Images that one of the processes cannot read."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if launched().rank == 1:
            raise OSError("this disk is broken")
        return self.images[index]


class Counted(torch.utils.data.Dataset):
    """Remembers which images it was asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.images[index]


def mapped_images():
    """The files of images that are mapped into this process: device, number, and name."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return [[line[3], line[4], line[5]] for line in lines if len(line) > 5 and "rlrr-images-" in line[5]]


def stop_in_second_epoch(self):
    if self.epoch == 1:
        raise KeyboardInterrupt
    update(self)


update = Trainer._update


def main(folder):
    torch.set_num_threads(1)
    run_folder.draw_curves = lambda metrics: b"a picture"
    main_process = launched().main
    found = {}
    for name, changes in RUNS.items():
        ready = prepared(folder, SIZES, out=folder / name, **changes)
        ready.splits.train.items = Counted(ready.splits.train.items)
        found[name] = {"whole": train(ready, quiet=True), "asked": ready.splits.train.items.asked}
        found[name] |= {"files": mapped_images()}
        del ready
        if name not in RESUMED:
            continue
        with mock.patch.object(Trainer, "_update", stop_in_second_epoch):
            cut = train(prepared(folder, SIZES, out=folder / f"{name} resumed", **changes), quiet=True)
        assert cut["interrupted"] is True
        assert len(cut["epochs"]) == 1
        dist.barrier()
        resumed = prepared(folder, SIZES, resume=folder / f"{name} resumed", **changes)
        found[name]["resumed"] = train(resumed, quiet=True)
    with first_is_best():
        ready = prepared(folder, SIZES, out=folder / "fsdp early", batch_size=16, parallel="fsdp", **EARLY)
        found["fsdp early"] = {"whole": train(ready, quiet=True)}
    with torch.no_grad():
        logits = ready.model(torch.stack([image for image, _ in ready.splits.test]))
    found["fsdp early"]["logits"] = logits.tolist()
    try:
        train(prepared(folder, SIZES, out=folder / "ddp"), quiet=True)
    except FileExistsError as error:
        # each process has the main process's error
        found[f"exists {launched().rank}"] = str(error)
    everything = [None] * launched().size
    dist.all_gather_object(everything, found)
    if main_process:
        (folder / "found.json").write_text(json.dumps(everything))
    assert command([*COMMAND, "--out", str(folder / "command")]) == 0
    ready = prepared(folder, SIZES, out=folder / "broken")
    ready.splits.train.items = Unreadable(ready.splits.train.items)
    train(ready)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
