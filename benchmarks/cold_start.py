"""From a cold start to the test figure: ``python -m benchmarks.cold_start`` (about ten minutes on two cores).

Does each of :data:`RUNS` by ``rlrr-finetune`` on a task in VTAB-1k's layout, made of crops of two photographs, in
turns, each in a new process with an empty cache of compiled code. ``--write`` puts the table into docs/finetune.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import results
from benchmarks.tables import markdown
from rlrr_kernels.finetune import loop
from rlrr_kernels.finetune.__main__ import main as finetune
from rlrr_kernels.finetune.batches import Batches
from rlrr_kernels.finetune.data import ImageSet, loading
from rlrr_kernels.finetune.distributed import World
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.trainer import Trainer

#: A task of 2 classes, whose recipe mirrors images at random, and its epochs (those of the cool-down included).
TASK, RECIPE_EPOCHS = "vtab/patch_camelyon", 110
#: Side of the images in pixels, and their number by list: as in VTAB-1k, with a small test list.
SIDE, SIZES = 500, {"train800": 800, "val200": 200, "test": 200}
#: Options of the runs by name. The others are compared with the first.
RUNS = {"decoded in each epoch (`--cache 0`)": ["--cache", "0"], "kept (default)": []}
RUNS["kept, `--compile default`"] = ["--compile", "default"]
#: Imports; lists and files checked; images decoded or waited for, also for the test; training steps; all else.
PARTS = ("start", "checks", "images", "steps", "rest")
PAGE = results.ROOT / "docs" / "finetune.md"
BEGIN, END = "<!-- python -m benchmarks.cold_start --write -->\n", "<!-- end -->\n"


def make_task(root: Path, sizes: Mapping[str, int]) -> None:
    """Write the task's folder under ``root``: crops as JPEGs, labelled by their photograph."""
    from sklearn.datasets import load_sample_images  # not above: the runs would import it, too

    folder, generator = root / TASK.removeprefix("vtab/"), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    lists: dict[str, str] = {}
    for split, count in sizes.items():
        for index in range(count):
            photograph, side = photographs[index % 2], generator.integers(200, 300)
            left, top = generator.random(2) * (photograph.width - side, photograph.height - side)
            crop = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            crop.save(folder / f"images/{split}-{index}.jpg", quality=90)
        lists[split] = "".join(f"images/{split}-{index}.jpg {index % 2}\n" for index in range(count))
    for split, text in (*lists.items(), ("train800val200", lists["train800"] + lists["val200"])):
        (folder / f"{split}.txt").write_text(text)


class Parts:
    """Seconds by part from ``start`` on, by ``time.monotonic``; those of a part inside another are the inner one's."""

    def __init__(self, now: str, start: float) -> None:
        self.seconds, self._now, self._last = defaultdict[str, float](float), now, start

    def switch(self, now: str) -> str:
        """Begin a part, and return the one that this ends."""
        before, last, self._now, self._last = self._now, self._last, now, time.monotonic()
        self.seconds[before] += self._last - last
        return before

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the context, or, as a decorator, of calls, to a part."""
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)


def measure(start: float, options: Sequence[str]) -> dict[str, Any]:
    """Run ``rlrr-finetune`` in this process, which began at ``start``.

    Returns:
        ``parts``: seconds by name, all from ``start`` until the test figure was printed; ``epochs``: of each, the
        seconds of ``images`` and ``steps`` and the images ``decoded``; ``decoded``: those of the whole run.
    """
    parts, decoded, epochs = Parts("start", start), list[int](), list[dict[str, float]]()
    batches, image = loading.batches, ImageSet.image
    following, train_epoch = parts.part("images")(next), parts.part("steps")(Trainer.train_epoch)

    def waited_for(loaded: Iterator[Any]) -> Iterator[Any]:
        return iter(lambda: following(loaded, None), None)

    def counted(images: ImageSet, index: int) -> Any:
        decoded.append(index)  # by several threads
        return image(images, index)

    def recorded(*args: Any) -> Any:
        before, count = parts.seconds.copy(), len(decoded)
        figures = train_epoch(*args)
        spent = {name: parts.seconds[name] - before[name] for name in ("images", "steps")}
        epochs.append(spent | {"decoded": len(decoded) - count})
        return figures

    parts.switch("rest")
    with (
        mock.patch.object(loop, "load_data", parts.part("checks")(loop.load_data)),
        mock.patch.object(loading, "keep", parts.part("images")(loading.keep)),
        mock.patch.object(loading, "batches", lambda *args: waited_for(batches(*args))),
        mock.patch.object(ImageSet, "image", counted),
        mock.patch.object(Trainer, "train_epoch", recorded),
    ):
        finetune(list(options))
    parts.switch("")
    return {"parts": dict(parts.seconds), "epochs": epochs, "decoded": len(decoded)}


def load(root: Path) -> tuple[float, float]:
    """Return the CPU time of loading an epoch's images, without steps, in seconds: decoded, and kept."""
    images = loop.load_data(Settings(model="vit_tiny_patch16_224", task=TASK, data_root=root, flip=True)).trainval
    order = Batches(len(images), 32, World(), seed=0)

    def epoch() -> float:
        start = time.process_time()
        deque(loading.batches(images, order, torch.device("cpu"), 1), maxlen=0)
        order.epoch += 1
        return time.process_time() - start

    decoded = epoch()
    loading.keep(images, World(), 1, sys.maxsize)
    return decoded, min(epoch() for _ in range(3))


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], loads: Sequence[tuple[float, float]]) -> str:
    """Return a line for each run's fastest round, times as multiples of the first run's, and what :func:`load` gave."""
    rows, base = list[list[str]](), (0.0, 0.0, 0.0)
    for name, rounds in found.items():
        of = min(rounds, key=lambda one: sum(one["parts"].values()))
        whole, later = sum(of["parts"].values()), of["epochs"][1:]
        epoch = sum(each["images"] + each["steps"] for each in later) / len(later)
        recipe = whole + (RECIPE_EPOCHS - len(of["epochs"])) * epoch
        base = base if rows else (whole, epoch, recipe)
        cells = [f"{seconds / base[0]:.3f}" for seconds in (whole, *(of["parts"][part] for part in PARTS))]
        cells += [f"{one / other:.2f}" for one, other in zip((epoch, recipe), base[1:], strict=True)]
        rows.append([name, *cells, f"{of['decoded']:,}", f"{later[-1]['decoded']:,}"])
    heads = ["images", "whole", *PARTS, "a later epoch", f"{RECIPE_EPOCHS} epochs", "decoded", "in the last epoch"]
    decoded, kept = map(min, zip(*loads, strict=True))
    return f"""{markdown(heads, rows)}

Without steps, a core loads {decoded / kept:.0f} times as many images a second from kept ones as from files.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["run"]:
        print(json.dumps(measure(float(given[1]), given[2:])))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start")
    parser.add_argument("--model", default="test_vit", help="of timm, with random weights")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one is shown")
    parser.add_argument("--write", action="store_true", help="put the table into docs/finetune.md")
    args = parser.parse_args(given)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as name:
        make_task(root := Path(name), SIZES)
        options = ["--task", TASK, "--data-root", name, "--model", args.model, "--no-pretrained", "--img-size", "224"]
        options += ["--epochs", "3", "--warmup-epochs", "1", "--cooldown-epochs", "0"]
        for number, (which, more) in enumerate([*RUNS.items()] * args.rounds):
            places = {"TMPDIR": name, "TORCHINDUCTOR_CACHE_DIR": f"{name}/compiled-{number}"}
            command = [sys.executable, "-m", "benchmarks.cold_start", "run", repr(time.monotonic()), *options, *more]
            command += ["--out", f"{name}/run-{number}"]
            out = subprocess.check_output(command, cwd=results.ROOT, env=os.environ | places, text=True)
            print(out, file=sys.stderr)
            found[which].append(json.loads(out.splitlines()[-1]))
        torch.set_num_threads(1)
        text = table(found, [load(root) for _ in range(args.rounds)])
    print(text)
    if args.write:
        before, _, after = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{after.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
