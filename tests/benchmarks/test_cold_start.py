"""The parts of a run add up to its time, kept images are decoded once, and the table divides by the right run."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from benchmarks import cold_start
from rlrr_kernels.finetune import run_folder
from rlrr_kernels.finetune.data import ImageSet

SIZES = {"train800": 12, "val200": 4, "test": 6}


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda metrics: b"a picture")
    monkeypatch.setattr(cold_start, "SIDE", 40)
    cold_start.make_task(tmp_path, SIZES)
    given = f"--task {cold_start.TASK} --data-root {tmp_path} --model test_vit --no-pretrained --img-size 32 --epochs 3"
    given += f" --warmup-epochs 1 --cooldown-epochs 0 --batch-size 8 --no-tensorboard --out {tmp_path / 'run'}"
    return given.split()


@pytest.mark.parametrize(("more", "each_epoch", "before"), [(["--cache", "0"], 16, 0), ([], 0, 16 + 1)])
def test_parts_add_up_and_images_are_decoded_in_each_epoch_or_once(tmp_path, options, capsys, more, each_epoch, before):
    start = time.monotonic()
    assert cold_start.main(["run", repr(start), *options, *more]) == 0
    end = time.monotonic()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # before the first epoch the first image is read once more, for its shape
    assert [epoch["decoded"] for epoch in found["epochs"]] == [each_epoch] * 3
    assert found["decoded"] == before + 3 * each_epoch + 6
    parts = found["parts"]
    assert parts.keys() == {*cold_start.PARTS}
    assert min(parts.values()) > 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    # what the run itself measured lies inside the parts, and they inside the time of the call
    assert parts["checks"] + metrics["train_seconds"] < sum(parts.values()) <= end - start
    for epoch, of in zip(found["epochs"], metrics["epochs"], strict=True):
        assert epoch["images"] + epoch["steps"] >= 16 / of["images_per_second"]
    spent = {name: sum(epoch[name] for epoch in found["epochs"]) for name in ("images", "steps")}
    assert parts["steps"] == pytest.approx(spent["steps"])
    assert parts["images"] > spent["images"]
    assert sum(spent.values()) < metrics["train_seconds"]


def test_the_loader_decodes_one_epoch_and_keeps_the_images_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(cold_start, "SIDE", 40)
    cold_start.make_task(tmp_path, SIZES)
    image, decoded = ImageSet.image, []
    monkeypatch.setattr(ImageSet, "image", lambda images, index: decoded.append(index) or image(images, index))
    assert min(cold_start.load(tmp_path)) > 0
    # an epoch, then once more for the cache, with the first image for its shape
    assert sorted(decoded) == sorted([*range(16), 0, *range(16)])


def test_time_in_an_inner_part_is_not_the_outer_ones(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr(cold_start, "time", now)
    clock = [10.0]
    parts = cold_start.Parts("start", 7.0)

    def wait(seconds):
        clock[0] += seconds

    @parts.part("steps")
    def step():
        wait(5)
        parts.part("images")(wait)(2)
        wait(1)
        raise KeyError("of the step")

    parts.switch("rest")
    with pytest.raises(KeyError, match="of the step"):
        step()
    wait(4)
    parts.switch("")
    assert parts.seconds == {"start": 3, "steps": 6, "images": 2, "rest": 4}


def made_up(scale: float, epochs: list[float], decoded: int) -> dict[str, object]:
    parts = {"start": 2 * scale, "checks": scale, "images": 3 * scale, "steps": 3 * scale, "rest": scale}
    of = [{"images": 0.25 * seconds, "steps": 0.75 * seconds, "decoded": decoded} for seconds in epochs]
    return {"parts": parts, "epochs": of, "decoded": 3 * decoded + 6}


def test_the_table_is_of_the_fastest_rounds_and_replaces_the_one_before(tmp_path, monkeypatch, capsys):
    rounds = iter(
        [
            *(made_up(9, [9, 9, 9], 16), made_up(0.5, [9, 1, 3], 0), made_up(4, [9, 9, 9], 0)),
            *(made_up(1, [3, 2, 6], 16), made_up(9, [9, 9, 9], 0), made_up(2, [7, 1, 1], 0)),
        ]
    )
    commands = []

    def output(command, **more):
        commands.append(command)
        return f"test accuracy\n{json.dumps(next(rounds))}\n"

    monkeypatch.setattr(cold_start.subprocess, "check_output", output)
    monkeypatch.setattr(cold_start, "SIZES", SIZES)
    monkeypatch.setattr(cold_start, "load", lambda root: (1.0, 0.04))
    assert cold_start.BEGIN in cold_start.PAGE.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"above\n{cold_start.BEGIN}old\n{cold_start.END}below\n")
    monkeypatch.setattr(cold_start, "PAGE", page)
    assert cold_start.main(["--rounds", "2", "--write"]) == 0
    printed = capsys.readouterr().out
    assert page.read_text() == f"above\n{cold_start.BEGIN}{printed[:-1]}{cold_start.END}below\n"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:5]]
    assert [row[1:] for row in table] == [
        # 10 s and an epoch of 4 s, 438 s at 110 epochs; 5 and 2 s; 20 and 1 s
        ["1.000", "0.200", "0.100", "0.300", "0.300", "0.100", "1.00", "1.00", "54", "16"],
        ["0.500", "0.100", "0.050", "0.150", "0.150", "0.050", "0.50", "0.50", "6", "0"],
        ["2.000", "0.400", "0.200", "0.600", "0.600", "0.200", "0.25", "0.29", "6", "0"],
    ]
    assert "a core loads 25 times as many" in printed
    assert [command[-4:-2] == ["--cache", "0"] for command in commands] == [True, False, False] * 2
