"""What the benchmarks compute from their measurements."""

import json

import torch

from benchmarks import choose, compare
from benchmarks.implementations import IMPLEMENTATIONS, make_inputs, products, step, three_ops
from benchmarks.memory import peak_extra_bytes


def test_all_implementations_compute_the_same():
    inputs = make_inputs(20, 12, 10, 2, torch.float32, "cpu")
    expected = step(inputs, IMPLEMENTATIONS["formula"])
    for name in ("rlrr_kernels", "recompute"):
        for got, want in zip(step(inputs, IMPLEMENTATIONS[name]), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    y, dx, du, dv, df = three_ops(inputs)
    for got, want in zip((y, dx, du, dv, df), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [t.shape for t in products(inputs)] == [(20, 12), (20, 10), (12, 10)]


def test_a_rule_only_where_another_backend_wins_by_more_than_noise():
    def result(dtype, **best):
        return {"kind": "cpu", "dtype": dtype, "tokens": [1, 15], "M": 4, "best": best}

    results = [
        result("float32", cpu=1.0, reference=0.97),
        result("bfloat16", cpu=1.0, reference=0.9),
        result("float16", reference=1.0),
        result("float64", cpu=1.0, reference=2.0),
    ]
    assert choose.rules(results, "cpu", "here.json") == [
        {"device": "cpu", "dtype": "bfloat16", "tokens": [1, 15], "backend": "reference", "source": "here.json"}
    ]
    # the default of CUDA tensors is triton, whatever else is there
    cuda = [{"kind": "cuda", "dtype": "float16", "tokens": [1, None], "M": 4, "best": {"cuda": 1.0, "triton": 1.2}}]
    assert choose.rules(cuda, "GPU", "x")[0]["backend"] == "cuda"


def test_the_table_divides_the_fastest_rounds():
    times = {"rlrr_kernels": [2.0, 1.0], "formula": [3.0, 4.0], "recompute": [2.0, 2.5]}
    result = {
        "layer": "qkv",
        "tokens": 197,
        "dtype": "float32",
        "seconds": times | {"our three ops": [0.5], "bare products": [1.5]},
        "extra_bytes": {"rlrr_kernels": 5, "formula": 100},
    }
    assert compare.table([result]).splitlines()[2] == "| qkv | 197 | float32 | 3.00 | 2.00 | 2.00 | 0.50 | 5.0% |"
    assert json.loads(compare.as_json("c", ["a", "b"], [result]))["results"] == [result]


def test_peak_memory_leaves_out_what_stays():
    def call():
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(3000, dtype=torch.uint8)
        del a
        return (torch.empty(500, dtype=torch.uint8), b)

    assert peak_extra_bytes(call) == 1000 - 500
