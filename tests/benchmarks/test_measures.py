"""Memory of a call; and wrong results are not timed, nor is a backend that failed its check."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import implementations, results, test_layer
from benchmarks.chunks import Shape
from benchmarks.measures import Formula, peak_extra_bytes, relative_error, saved_for_backward
from benchmarks.suite import Rivals
from benchmarks.timing import Rejected
from rlrr_kernels.backends import verdicts

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


def test_without_memory_for_the_formula_there_is_no_error():
    calls = []

    def compute() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        raise torch.OutOfMemoryError("none")

    formula = Formula(compute, torch.float32)
    assert [formula.error((torch.ones(1),)) for _ in range(2)] == [None, None]
    assert len(calls) == 1


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_layer_that_is_wrong_is_not_timed(direction, dtype, monkeypatch):
    """Planted: u is half as large again, which moves y, dx and dv."""
    planted = {
        results.FACTORED: lambda x, w, u, *others: implementations.baselines.Factored.apply(x, w, u * 1.5, *others)
    }
    monkeypatch.setattr(implementations, "_FUNCTIONS", implementations._FUNCTIONS | planted)
    names = [results.OURS, results.CPU, results.FORMULA, results.FACTORED, results.RECOMPUTE, results.PLAIN]
    found = test_layer._measure(Rivals("layer", "c", (TINY, 8, dtype, direction, 1), "label"), (2, 2), names)
    rows = {name: o.result.to_dict() for name, o in found.items()}
    assert "off the formula's" in rows[results.FACTORED]["error"]
    assert "seconds" not in rows[results.FACTORED]
    assert rows[results.FORMULA]["error_vs_formula"] == 0
    for name in (results.OURS, results.CPU, results.RECOMPUTE):
        assert 0 <= rows[name]["error_vs_formula"] < (1e-5 if dtype == "float32" else 0.02)
        assert (rows[name]["clock"], rows[name]["copies"]) == ("wall", 1)
    assert "error_vs_formula" not in rows[results.PLAIN]


def test_a_backend_that_failed_its_check_is_not_run(monkeypatch):
    monkeypatch.setattr(verdicts, "failure", lambda subject, device: "forward: off" if subject == "cpu" else None)
    x = torch.randn(4, 16)
    with pytest.raises(Rejected, match=r"^check: forward: off$"):
        implementations.served_by(results.CPU, x, x)
    # what the free choice does without it is in the package's own tests
    assert implementations.served_by(results.FORMULA, x, x) is None
    names = [results.CPU, results.FORMULA]
    found = test_layer._measure(Rivals("layer", "c", (TINY, 2, "float32", "both", 4), "label"), (2, 2), names)
    assert found[results.CPU].result.error == "check: forward: off"
    assert not found[results.CPU].unavailable  # it is written
    assert len(found[results.FORMULA].result.seconds) == 2


def test_saved_for_backward_counts_each_storage_once_without_x_and_parameters():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def forward() -> torch.Tensor:
        square = (w * 2).exp()  # exp keeps its own result, and so does the product of it
        return x.view(10, 4) @ square.T

    assert saved_for_backward(forward, x, (w,)) == (4 * 6 * 4, True)
    assert saved_for_backward(lambda: x @ w.detach().T, x, ()) == (4 * 6 * 4, False)
    assert saved_for_backward(lambda: x @ w.detach().T, x, (w,)) == (0, False)


def test_peak_memory_leaves_out_results_and_what_came_before():
    log = []

    def call():
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(3000, dtype=torch.uint8)
        del a
        log.append("call")
        return (torch.empty(500, dtype=torch.uint8), b)

    def before():
        log.append("before")
        torch.empty(1 << 20)

    assert peak_extra_bytes(call) == 1000 - 500
    log.clear()
    assert peak_extra_bytes(call, before) == 1000 - 500
    assert log == ["before", "call"] * 2
