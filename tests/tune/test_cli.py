"""``rlrr-tune`` as a user meets it; real kernels in the interpreter where they run, times made up."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from rlrr_kernels import yardstick
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import launch, tuned
from rlrr_kernels.backends.triton.tuned_file import Where, parse, read
from rlrr_kernels.tune import cli, store
from rlrr_kernels.tune.cli import main
from rlrr_kernels.tune.gpu import Machine
from rlrr_kernels.tune.problem import task_of
from rlrr_kernels.tune.shapes import Shape
from tests.tune.entries import GPU, WHERE, entry

SHAPE = Shape(80, 48, 64)
SIZES = "80,48,64"
DEVICE = launch.INTERPRETED_DEVICE


def last_wins(runs, copies, rounds):
    """Launches each once, and says that each is a tenth faster than the one before."""
    for run in runs:
        run(0)
    return [[10.0 - i] * rounds for i in range(len(runs))]


def no_gain(runs, copies, rounds):
    return [[1.0] * rounds for _ in runs]


def machine(timer=last_wins, synchronize=lambda: None):
    return Machine(GPU, DEVICE, torch.device("cpu"), l2_bytes=0, timer=timer, synchronize=synchronize)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("RLRR_TUNED_FILE", str(tmp_path / "tuned.json"))
    monkeypatch.delenv("RLRR_TUNED", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tuned.reload()
    yield tmp_path / "tuned.json"
    tuned.reload()


def entries(path):
    return [parse(raw) for raw in read(path)]


@pytest.mark.usefixtures("interpreted")
def test_what_it_finds_is_what_the_launcher_uses(file, monkeypatch, capsys):
    arguments = ["--shape", SIZES, "--dtype", "float32", "--rounds", "3", "--limit", "2"]
    assert main(arguments, machine()) == 0
    found = {one.layer.kernel: one for one in entries(file)}
    assert set(found) == {"forward", "grad_input", "grad_scales"}
    printed = capsys.readouterr().out
    assert f"3 of 3 kernels are in {file}" in printed
    assert "+11.1%" in printed  # 10 against 9, the two of the second contest

    # what the interpreter launches on is now taken for the GPU that was tuned
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    monkeypatch.setattr(configs, "cuda_device", lambda index: DEVICE)
    for kernel, one in found.items():
        task = task_of(kernel, SHAPE, torch.float32, torch.float32, DEVICE)
        choices = task.choices(DEVICE, 2)
        assert len(choices) > 1
        got = tuned.find(kernel, 80, *task.layer[1:], 0)
        assert got == choices[-1]
        assert one.where == Where.on(GPU, DEVICE.capability)
        assert one.measured["heuristic_seconds"] == 10


@pytest.mark.usefixtures("interpreted")
def test_a_launch_runs_what_the_table_says(file, monkeypatch):
    main(["--shape", SIZES, "--dtype", "float32", "--rounds", "2", "--limit", "2"], machine())
    chosen = next(one.config for one in entries(file) if one.layer.kernel == "forward")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    monkeypatch.setattr(configs, "cuda_device", lambda index: DEVICE)
    find, asked = tuned.find, []

    def on_the_gpu(*key):
        asked.append(find(*key[:-1], 0))
        return asked[-1]

    monkeypatch.setattr(tuned, "find", on_the_gpu)
    x, weight, u, v = torch.randn(80, 64), torch.randn(48, 64), torch.randn(48, 1), torch.randn(1, 1, 64)
    y = launch.forward(x, weight, u, v, None, None)
    assert asked == [chosen]
    torch.testing.assert_close(y, x @ (weight * (1 + u @ v[0])).T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreted")
def test_a_candidate_that_computes_wrong_cannot_win(file, monkeypatch, capsys):
    task = task_of("grad_input", SHAPE, torch.float32, torch.float32, DEVICE)
    wrong = task.choices(DEVICE, 2)[-1]
    real = launch.grad_input

    def faulty(*tensors, config, path):
        dx = real(*tensors, config=config, path=path)
        dx[3, 5] += float(config == wrong)
        return dx

    monkeypatch.setattr(launch, "grad_input", faulty)
    assert main(["--shape", SIZES, "--dtype", "float32", "--rounds", "2", "--limit", "2"], machine()) == 0
    (found,) = (one for one in entries(file) if one.layer.kernel == "grad_input")
    assert found.config != wrong
    out = capsys.readouterr().out
    assert "left out: grad_input M=80 N=48 K=64" in out
    assert "dx: " in out


def quick(monkeypatch, run=lambda task, tensors, choice: ()):
    """Nothing is launched or checked."""
    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(yardstick, "expected", lambda *tensors: [])
    monkeypatch.setattr(yardstick, "judge", lambda got, wanted: yardstick.Judgement(0.0, None))


def test_where_nothing_is_faster_the_heuristic_stays(file, monkeypatch, capsys):
    quick(monkeypatch)
    assert main(["--shape", SIZES], machine(no_gain)) == 0
    assert [one.config for one in entries(file)] == [None] * 3
    assert "the heuristic's" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(file, monkeypatch, capsys):
    def run(task, tensors, choice):
        if task.layer.kernel == "grad_scales":
            raise KeyboardInterrupt
        return ()

    quick(monkeypatch, run)
    assert main(["--shape", SIZES], machine()) == 130
    assert [one.layer.kernel for one in entries(file)] == ["forward", "grad_input"]
    printed = capsys.readouterr()
    assert "2 of 3 kernels are in" in printed.out
    assert printed.err.endswith("rlrr-tune: interrupted\n")


def test_a_gpu_that_is_lost_ends_it_with_what_was_measured(file, monkeypatch, capsys):
    lost = []

    def run(task, tensors, choice):
        if task.layer.kernel == "grad_input":
            lost.append(1)
            raise RuntimeError("an illegal memory access was encountered")
        return ()

    def synchronize():
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    quick(monkeypatch, run)
    assert main(["--shape", SIZES], machine(synchronize=synchronize)) == 1
    assert [one.layer.kernel for one in entries(file)] == ["forward"]
    assert "the GPU stopped answering in grad_input M=80 N=48 K=64: RuntimeError: an ill" in capsys.readouterr().err


def test_a_kernel_that_cannot_be_timed_is_skipped_and_said(file, monkeypatch, capsys):
    def timer(runs, copies, rounds):
        if timer.calls == 0:
            timer.calls += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return no_gain(runs, copies, rounds)

    timer.calls = 0
    quick(monkeypatch)
    assert main(["--shape", SIZES], machine(timer)) == 1
    assert [one.layer.kernel for one in entries(file)] == ["grad_input", "grad_scales"]
    assert "rlrr-tune: forward M=80 N=48 K=64: OutOfMemoryError: CUDA out of memory. Tri" in capsys.readouterr().err


def test_dry_run_needs_no_gpu_and_writes_nothing(file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--model", "vit_tiny_patch16_224", "--batch", "2", "4", "--shape", "5,6,7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "no GPU here; as for sm_90 with 132 multiprocessors" in out
    assert "times are predictions" in out
    rows = [line for line in out.splitlines() if "forward" in line]
    assert len(rows) == 1 + 2 * 4
    assert sum(" 788 " in row for row in rows) == 4
    assert not file.parent.joinpath("tuned.json").exists()


@pytest.mark.parametrize(
    ("options", "kind", "sizes"),
    [
        (["--dtype", "float32"], "ieee", (4, 4)),
        (["--dtype", "float32", "--tf32"], "tf32", (4, 4)),
        (["--dtype", "float16", "--weight-dtype", "float32"], "half", (2, 4)),
        ([], "half", (2, 2)),
    ],
    ids=str,
)
def test_dtypes_decide_the_arithmetic(file, monkeypatch, options, kind, sizes):
    planned = []
    monkeypatch.setattr(cli.report, "show_plan", lambda tasks, *_: planned.extend(tasks))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        assert main(["--shape", SIZES, "--dry-run", *options], machine()) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [task.layer.kernel for task in planned] == ["forward", "grad_input", "grad_scales"]
    assert {(task.layer.kind, task.layer.x_size, task.layer.weight_size) for task in planned} == {(kind, *sizes)}


def test_show_says_what_is_used_and_what_is_not(file, capsys):
    store.add(
        file,
        [
            entry(111, measured={"heuristic_seconds": 3e-5, "best_seconds": 2e-5}),
            entry(222, config=None),
            entry(333, where=WHERE._replace(triton="1.2.3")),
            entry(444, where=WHERE._replace(kernels="old")),
        ],
    )
    content = json.loads(file.read_text())
    content["entries"].append(5)
    file.write_text(json.dumps(content))
    assert main(["--show"]) == 0
    printed = capsys.readouterr()
    rows = {m: next(line for line in printed.out.splitlines() if f" {m} " in line) for m in (111, 222, 333, 444)}
    assert "+50.0%" in rows[111]
    assert "m128 n128 k64, 8 warps, 4 stages" in rows[111]
    assert "used on this GPU" in rows[111]
    assert "the heuristic's" in rows[222]
    assert "not used: of Triton 1.2.3" in rows[333]
    assert "not used: the kernels have changed" in rows[444]
    assert "entry 4 is not used" in printed.err


def test_show_without_a_file_and_clear(file, capsys):
    assert main(["--show"]) == 0
    assert f"there is no {file}" in capsys.readouterr().out
    store.add(file, [entry()])
    assert main(["--clear"]) == 0
    assert not file.exists()
    assert main(["--clear"]) == 0
    assert capsys.readouterr().out == f"deleted {file}\nthere is no {file}\n"


def test_out_names_another_file(file, monkeypatch, tmp_path):
    quick(monkeypatch)
    assert main(["--shape", SIZES, "--out", str(tmp_path / "new" / "mine.json")], machine(no_gain)) == 0
    assert len(entries(tmp_path / "new" / "mine.json")) == 3
    assert not file.exists()


def test_a_table_that_was_damaged_is_set_aside_and_said(file, monkeypatch, capsys):
    quick(monkeypatch)
    file.write_text("{")
    assert main(["--shape", SIZES], machine(no_gain)) == 0
    assert file.with_name("tuned.json.damaged-1").read_text() == "{"
    assert len(entries(file)) == 3
    assert f"{file} was no table; it is now {file}.damaged-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to tune for: give --model or --shape"),
        (["--shape", "1,2"], "shape: expected M,N,K"),
        (["--shape", SIZES, "--rounds", "1"], "--rounds: expected 2 or more, got 1"),
        (["--shape", SIZES, "--limit", "-1"], "--limit: expected 0 or more, got -1"),
        (["--model", "vit_tiny_patch16_224", "--batch", "0"], "--batch: expected 1 or more, got 0"),
        (["--model", "vit_tiny_patch16_224", "--img-size", "0"], "--img-size: expected 1 or more, got 0"),
        (["--model", "resnet18"], "expected a ViT, EVA, BEiT or Swin"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(file, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments, machine())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("rlrr-tune: error: ")
    assert words in message
    assert message.count("\n") == 1


def test_without_a_gpu_it_says_so(file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["--shape", SIZES])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "rlrr-tune: error: no CUDA GPU is available here; expected one to measure on\n"


def test_ranks_of_a_distributed_run_do_not_tune(file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["--shape", SIZES], machine())
    assert stop.value.code == 2
    assert "runs in one process" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, file, monkeypatch, capsys):
    quick(monkeypatch, pytest.fail)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["--shape", SIZES, "--out", str(tmp_path / "file" / "t.json")], machine(partial(pytest.fail, "timed")))
    assert stop.value.code == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(file, gpu):
    assert main(["--shape", "394,768,768", "--rounds", "5", "--limit", "3"]) == 0
    assert len(entries(file)) == 3
    for one in entries(file):
        assert 0 < one.measured["best_seconds"] <= one.measured["heuristic_seconds"] < 0.01
