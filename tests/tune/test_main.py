"""``rlrr-tune`` as a user meets it: real passes, made-up times."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from rlrr_kernels.backends import choice, tuned
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.triton import choose, launch
from rlrr_kernels.backends.tuned import add, parse, read
from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.check import yardstick
from rlrr_kernels.tune import __main__ as cli
from rlrr_kernels.tune.__main__ import main
from rlrr_kernels.tune.machine import Machine
from tests.oracle import require
from tests.tune.conftest import TILES
from tests.tune.entries import CPU, entry

SIZES = "80,48,64"
PASSES = ["forward", "grad_input", "grad_scales"]
ARGUMENTS = ["--shape", SIZES, "--dtype", "float32", "--rounds", "3"]
#: Beside them the rest of the backends, of which Triton's interpreter takes seconds.
OURS = ["--backend", "cpu", "--backend", "reference", "--backend", "tiled"]


def last_wins(runs, copies, rounds):
    """Launch each once, and return times of which each is a tenth less than the one before."""
    for run in runs:
        run(0)
    return [[10.0 - i] * rounds for i in range(len(runs))]


def no_gain(runs, copies, rounds):
    return [[1.0] * rounds for _ in runs]


def machine(timer=last_wins, synchronize=lambda: None):
    return Machine("Made-up machine", CPU, cache_bytes=0, timer=timer, synchronize=synchronize)


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """Replaces the backends' check, which takes a minute: it finds nothing; returns the devices that were checked."""
    asked = []
    monkeypatch.setattr(cli, "failures", lambda device: asked.append(device) or ({}, {}))
    return asked


def entries(path):
    return [parse(raw) for raw in read(path)]


def test_the_winner_serves(file, checked, capsys, tiled):
    require("cpu")
    assert main([*ARGUMENTS, *OURS], machine()) == 0
    assert checked == [CPU]
    printed = capsys.readouterr().out
    assert f"3 of 3 measured, 3 entries into {file}" in printed
    assert "+11.1%" in printed  # 10 against 9, the two of the second contest
    choice.reload()
    x, weight = torch.zeros(80, 64), torch.zeros(48, 64)
    for kernel in PASSES:
        assert choice.explain(x, weight, kernel) == ("tiled", "measured fastest")
        found = tuned.find(Problem(kernel, 80, 48, 64, 1, x.dtype, x.dtype), CPU)
        assert found.tile == {"block_m": 32, "num_warps": 4, "splits": 2}
        assert found.where == Where.of("tiled", CPU)
        assert (found.measured["default"], found.measured["default_seconds"]) == ("cpu", 10)
    served = [choice.backend_for(torch.zeros(m, 64), weight) for m in (56, 57, 113, 114)]
    assert served == ["cpu", "tiled", "tiled", "cpu"]
    assert choice.backend_for(x, torch.zeros(49, 64)) == "cpu"


def test_a_candidate_that_computes_wrong_cannot_win(file, monkeypatch, capsys, tiled):
    real = tiled.grad_input

    def faulty(*tensors, choice):
        dx = real(*tensors)
        dx[3, 5] += float(choice == TILES[-1])
        return dx

    monkeypatch.setattr(tiled, "grad_input", faulty)
    assert main([*ARGUMENTS, *OURS], machine()) == 0
    found = {one.kernel: one.tile["block_m"] for one in entries(file)}
    assert found == {"forward": 32, "grad_input": 128, "grad_scales": 32}
    out = capsys.readouterr().out
    assert "left out: grad_input M=80 N=48 K=64: tiled m32, 4 warps, 2 splits: dx: " in out


@pytest.mark.usefixtures("tiled")
def test_a_backend_that_failed_its_check_is_reported_and_left_out(file, monkeypatch, capsys):
    require("cpu")
    monkeypatch.setattr(cli, "failures", lambda device: ({"cpu": "forward: y: not finite"}, {"triton": "no time"}))
    choice.failed.cache_clear()
    monkeypatch.setattr("rlrr_kernels.backends.verdicts.failure", lambda name, *_: "wrong" if name == "cpu" else None)
    try:
        assert main([*ARGUMENTS, *OURS], machine(no_gain)) == 0
    finally:
        choice.failed.cache_clear()
    assert "cpu" not in {one.backend for one in entries(file)}
    said = capsys.readouterr().err
    assert "cpu failed its check: forward: y: not finite" in said
    assert "triton could not be checked: no time" in said


def test_triton_s_tiles_compete_and_its_launcher_takes_the_one_that_won(file, capsys):
    require("triton")
    arguments = ["--shape", "33,16,32", "--dtype", "float32", "--backend", "triton", "--limit", "1"]
    assert main(arguments, machine()) == 0
    for kernel in PASSES:
        problem = Problem(kernel, 33, 16, 32, 1, torch.float32, torch.float32)
        rule, other = choose.candidates(problem, launch.INTERPRETED_DEVICE)[:2]
        assert launch._chosen(problem, torch.empty(33, 32), True) == other != rule
    assert "left out" not in capsys.readouterr().out


def test_on_a_cpu_by_the_clock(file, capsys):
    require("cpu")
    arguments = ["--shape", "8,16,32", "--dtype", "float64", "--rounds", "2", "--device", "cpu", *OURS[:4]]
    assert main(arguments) == 0
    for one in entries(file):
        assert one.where == Where.of(one.backend, CPU)
        assert 0 < one.measured["seconds"] <= one.measured["default_seconds"] < 1
    assert main([*arguments, "--rules", "--out", str(file.with_name("rules.json"))], machine()) == 0
    found = [(one.kernel, one.layer, one.tokens, one.backend) for one in entries(file.with_name("rules.json"))]
    assert found == [(kernel, None, (8, math.inf), "reference") for kernel in PASSES]


def test_a_rank_is_measured_and_kept_beside_rank_1(file, capsys):
    arguments = ["--shape", "8,16,32,2", "--dtype", "float32", "--rounds", "2", "--device", "cpu", *OURS[:4]]
    assert main(arguments) == main([*arguments, "--rank", "3"]) == 0
    assert [(one.kernel, one.rank) for one in entries(file)] == [(kernel, rank) for rank in (1, 3) for kernel in PASSES]
    assert "groups=2 rank=3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--rank", "129"])
    assert "--rank: expected 1 to 128, got 129" in capsys.readouterr().err


def quick(monkeypatch, run=lambda problem, tensors, candidate: ()):
    """Replace launches and checks by nothing."""
    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(yardstick, "expected", lambda *tensors: [])
    monkeypatch.setattr(yardstick, "judge", lambda got, wanted: yardstick.Judgement(0.0, None))


def test_ctrl_c_keeps_what_was_measured(file, monkeypatch, capsys):
    def run(problem, tensors, candidate):
        if problem.kernel == "grad_scales":
            raise KeyboardInterrupt
        return ()

    quick(monkeypatch, run)
    assert main(ARGUMENTS, machine()) == 130
    assert [one.kernel for one in entries(file)] == ["forward", "grad_input"]
    printed = capsys.readouterr()
    assert "2 of 3 measured" in printed.out
    assert printed.err.endswith("rlrr-tune: interrupted\n")


def test_a_gpu_that_is_lost_ends_it_with_what_was_measured(file, monkeypatch, capsys):
    lost = []

    def run(problem, tensors, candidate):
        if problem.kernel == "grad_input":
            lost.append(1)
            raise RuntimeError("an illegal memory access was encountered")
        return ()

    def synchronize():
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    quick(monkeypatch, run)
    assert main(ARGUMENTS, machine(synchronize=synchronize)) == 1
    assert [one.kernel for one in entries(file)] == ["forward"]
    assert "the GPU stopped answering in grad_input M=80 N=48 K=64: RuntimeError: an ill" in capsys.readouterr().err


def test_a_pass_that_cannot_be_timed_is_skipped_and_reported(file, monkeypatch, capsys):
    def timer(runs, copies, rounds):
        if timer.calls == 0:
            timer.calls += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return no_gain(runs, copies, rounds)

    timer.calls = 0
    quick(monkeypatch)
    assert main(ARGUMENTS, machine(timer)) == 1
    assert [one.kernel for one in entries(file)] == ["grad_input", "grad_scales"]
    assert "rlrr-tune: forward M=80 N=48 K=64: OutOfMemoryError: CUDA out of memory. Tri" in capsys.readouterr().err


@pytest.mark.usefixtures("tiled")
def test_dry_run_checks_and_writes_nothing(file, checked, capsys):
    models = ["--model", "vit_tiny_patch16_224", "--batch", "2", "4"]
    assert main([*models, "--shape", "5,6,7", "--dtype", "float32", "--device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Would be measured on" in out
    rows = [line for line in out.splitlines() if "forward" in line]
    assert len(rows) == 1 + 2 * 4
    assert sum(" M=788 " in row and "vit_tiny_patch16_224: blocks.*" in row for row in rows) == 4
    assert all("3 tiled" in row for row in rows)
    assert not file.exists()
    assert checked == []


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        (["--dtype", "float32", "--tf32"], (torch.float32, torch.float32)),
        (["--dtype", "float16", "--weight-dtype", "float32"], (torch.float16, torch.float32)),
        ([], (torch.bfloat16, torch.bfloat16)),
    ],
    ids=str,
)
def test_dtypes(file, monkeypatch, options, dtypes):
    planned = []
    monkeypatch.setattr(cli, "_show_plan", lambda plan, *_: planned.extend(plan))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        assert main(["--shape", SIZES, "--dry-run", *options], machine()) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [problem.kernel for problem in planned] == PASSES
    # what a CPU computes is never TF32
    assert {(problem.dtype, problem.weight_dtype, problem.tf32) for problem in planned} == {(*dtypes, False)}


def test_show_says_what_is_used_and_what_is_not(file, capsys):
    add(
        file,
        [
            entry(111, tile={"block_m": 32}, measured={"default_seconds": 3e-5, "seconds": 2e-5}),
            entry(222, math.inf, where=Where.of("reference", CPU)._replace(torch_version="1.2.3")),
            entry(333, device="Another GPU"),
        ],
    )
    content = json.loads(file.read_text())
    content["entries"].append(5)
    file.write_text(json.dumps(content))
    assert main(["--show"], machine()) == 0
    printed = capsys.readouterr()
    rows = {m: next(line for line in printed.out.splitlines() if f" {m} " in line) for m in (111, 222, 333)}
    words = (
        "+50.0%",
        "block_m=32",
        "reference",
        " used ",
        "forward, float32, N=768 K=3072 groups=1, 111 to 111 tokens",
    )
    assert [word for word in words if word not in rows[111]] == []
    assert "222 and more tokens" in rows[222]
    assert "its own" in rows[222]
    assert all("not used: of another device, or of other versions" in rows[m] for m in (222, 333))
    assert "entry 3 is not used" in printed.err


def test_show_without_a_file_and_clear(file, capsys):
    assert main(["--show"], machine()) == 0
    assert f"there is no {file}" in capsys.readouterr().out
    add(file, [entry()])
    assert main(["--clear"]) == 0
    assert not file.exists()
    assert main(["--clear"]) == 0
    assert capsys.readouterr().out == f"deleted {file}\nthere is no {file}\n"


def test_a_damaged_table_is_set_aside_and_reported(file, monkeypatch, capsys):
    quick(monkeypatch)
    file.write_text("{")
    assert main(ARGUMENTS, machine(no_gain)) == 0
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
        (["--shape", SIZES, "--device", "gpu"], "--device: expected cpu, cuda or cuda:INDEX, got 'gpu'"),
        (
            ["--shape", SIZES, "--backend", "cuda", "--dry-run"],
            "forward M=80 N=48 K=64: no backend serves torch.bfloat16 here",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(file, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments, None if "--device" in arguments else machine())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("rlrr-tune: error: ")
    assert words in message
    assert message.count("\n") == 1


def test_ranks_of_a_distributed_run_do_not_tune(file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(ARGUMENTS, machine())
    assert stop.value.code == 2
    assert "runs in one process" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_reported_before_the_work(tmp_path, file, monkeypatch, capsys):
    quick(monkeypatch, pytest.fail)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main([*ARGUMENTS, "--out", str(tmp_path / "file" / "t.json")], machine(partial(pytest.fail, "timed")))
    assert stop.value.code == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(file, gpu):
    assert main(["--shape", "394,768,768", "--rounds", "5", "--limit", "3"]) == 0
    assert len(entries(file)) == 3
    for one in entries(file):
        assert 0 < one.measured["seconds"] <= one.measured["default_seconds"] < 0.01
