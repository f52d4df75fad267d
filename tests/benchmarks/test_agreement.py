"""Wrong results are not timed: neither those off the formula's, nor those of a backend that fails its preflight."""

from __future__ import annotations

import math
import sys
import time

import pytest
import torch

from benchmarks import agreement, implementations, preflight, results, test_layer
from benchmarks.agreement import Formula, relative_error
from benchmarks.cases import Shape
from benchmarks.suite import Rivals
from benchmarks.timing import Rejected, Unavailable

TINY = Shape("vit_b", "tiny", "qkv", 5, 24, 16, 3)


def test_the_worst_tensor_decides():
    want = torch.tensor([3.0, 4.0]), torch.tensor([10.0])
    assert relative_error((torch.tensor([3.0, 4.5]), torch.tensor([10.0])), want) == pytest.approx(0.1)
    assert relative_error((torch.tensor([3.0, 4.0]), torch.tensor([13.0])), want) == pytest.approx(0.3)
    assert relative_error((torch.zeros(1),), (torch.zeros(1),)) == 0
    assert relative_error((torch.ones(1),), (torch.zeros(1),)) == math.inf
    # in no tensor's place may a NaN be lost
    for bad in (0, 1):
        got = [t.clone() for t in want]
        got[bad][0] = math.nan
        assert math.isnan(relative_error(got, want))
    with pytest.raises(Rejected, match=r"the shapes \[\(1,\)\], the formula's \[\(2,\), \(1,\)\]"):
        relative_error((torch.zeros(1),), want)


def test_the_formula_is_computed_once_and_sets_the_limit():
    calls = []

    def compute() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return (torch.full((4,), 1.0, dtype=torch.bfloat16),)

    formula = Formula(compute, torch.bfloat16)
    assert formula.error((torch.full((4,), 1.049),)) == pytest.approx(0.049)
    for wrong in (1.06, math.nan, math.inf):
        with pytest.raises(Rejected, match=r"off the formula's, expected 5% at most"):
            formula.error((torch.full((4,), wrong),))
    assert len(calls) == 1
    with pytest.raises(Rejected, match="expected 1% at most"):
        Formula(compute, torch.float32).error((torch.full((4,), 1.02),))


def test_where_the_formula_has_no_room_nothing_is_said():
    calls = []

    def compute() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        raise torch.OutOfMemoryError("none")

    formula = Formula(compute, torch.float32)
    assert [formula.error((torch.ones(1),)) for _ in range(2)] == [None, None]
    assert len(calls) == 1


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_that_is_wrong_is_not_timed(direction, dtype, monkeypatch):
    """Planted: u is half as large again, which moves y, dx and dv."""
    planted = {
        results.FACTORED: lambda i: implementations.baselines.Factored.apply(
            i.x, i.weight, i.scale_out * 1.5, i.scale_in, i.bias, i.shift
        )
    }
    monkeypatch.setattr(implementations, "_FUNCTIONS", implementations._FUNCTIONS | planted)
    names = [results.OURS, results.CPU, results.FORMULA, results.FACTORED, results.RECOMPUTE, results.PLAIN]
    found = test_layer._measure(Rivals("layer", "c", (TINY, 8, dtype, direction), "label"), (2, 2), names)
    rows = {name: o.result.to_dict() for name, o in found.items()}
    assert "off the formula's" in rows[results.FACTORED]["error"]
    assert "seconds" not in rows[results.FACTORED]
    assert rows[results.FORMULA]["error_vs_formula"] == 0
    for name in (results.OURS, results.CPU, results.RECOMPUTE):
        assert 0 <= rows[name]["error_vs_formula"] < (1e-5 if dtype == "float32" else 0.02)
        assert (rows[name]["clock"], rows[name]["copies"]) == ("wall", 1)
    assert "error_vs_formula" not in rows[results.PLAIN]


def test_a_failed_preflight_is_the_result_and_nothing_runs(monkeypatch):
    monkeypatch.setattr(implementations, "FAILED_PREFLIGHT", {results.CPU: "forward is off"})
    x = torch.randn(4, 16)
    # what chooses that backend itself, and the ops alone, are as wrong as the backend by name
    for name in (results.CPU, results.OURS, results.OURS_COMPILED, results.THREE_OPS, results.GRAD_SCALES):
        with pytest.raises(Rejected, match=r"^preflight: forward is off$"):
            implementations.served_by(name, x, x)
    assert implementations.served_by(results.FORMULA, x, x) is None
    names = [results.CPU, results.FORMULA]
    found = test_layer._measure(Rivals("layer", "c", (TINY, 2, "float32", "both"), "label"), (2, 2), names)
    assert found[results.CPU].result.error == "preflight: forward is off"
    assert not found[results.CPU].unavailable  # it is written
    assert len(found[results.FORMULA].result.seconds) == 2


def test_a_right_backend_passes_its_preflight(monkeypatch):
    monkeypatch.setattr(preflight, "LIMITS", {d: preflight.LIMITS[d] for d in (torch.bfloat16, torch.float32)})
    preflight.check(results.CPU, "cpu")
    with pytest.raises(Unavailable, match="backend 'cuda' cannot serve"):
        preflight.check(results.CUDA, "cpu")


@pytest.mark.parametrize("which", preflight.PASSES)
def test_each_pass_that_is_wrong_fails_the_preflight(which, monkeypatch):
    monkeypatch.setattr(preflight, "LIMITS", {torch.float32: preflight.LIMITS[torch.float32]})
    right = getattr(preflight.ops, which)

    def wrong(*arguments):
        found = right(*arguments)
        if which == "grad_scales":
            found[1][..., -1] = 0  # the last column of dv
        else:
            found[-1, -1] = float("nan")
        return found

    monkeypatch.setattr(preflight.ops, which, wrong)
    with pytest.raises(ValueError, match=rf"^{which} at M 256, N 384, K 128, groups 3, float32: expected"):
        preflight.check(results.CPU, "cpu")


def test_the_preflight_outlives_what_crashes_hangs_and_fails():
    scripts = {
        "fine": "print('ok')",
        "wrong": "import sys; sys.exit('noise\\nValueError: forward is off')",
        "crash": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "hangs": "import time; time.sleep(600)",
    }
    started = time.monotonic()
    found = preflight.failures(tuple(scripts), lambda name: [sys.executable, "-c", scripts[name]], 5.0)
    assert found == {
        "wrong": "ValueError: forward is off",
        "crash": "signal 11: it said nothing",
        "hangs": "no answer within 5 s",
    }
    assert time.monotonic() - started < 600


def test_the_preflights_command_names_what_is_wrong(capsys, monkeypatch):
    assert preflight.main(["cpu"]) == 2
    assert "expected one of rlrr_kernels/triton, rlrr_kernels/cuda, rlrr_kernels/cuda-hopper, got cpu" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert preflight.main([results.TRITON]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert agreement.LIMITS.keys() == preflight.LIMITS.keys()


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_every_backend_passes_its_preflight(gpu):
    assert preflight.failures() == {}
