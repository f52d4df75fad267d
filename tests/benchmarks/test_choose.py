"""Which backend ``auto`` is told to take."""

from benchmarks import choose


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
