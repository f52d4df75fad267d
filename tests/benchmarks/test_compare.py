"""What counts as slower, on made-up runs whose ratios are worked out by hand."""

import json

import pytest

from benchmarks import compare, results
from tests.benchmarks import made_up
from tests.benchmarks.made_up import chunk, launch, layer, step


def run(*rows, suite="layer", **head):
    return [chunk(list(rows), suite, **head)]


def verdicts(old, new, threshold=0.05):
    return [change.verdict for change in compare.compare(old, new, threshold).changes]


def layers(ours, plain, **where):
    return layer(results.OURS, ours, **where), layer(results.PLAIN, plain, **where)


def test_ratios_within_a_run_decide_and_not_times():
    """1.5 of the plain linear's time before; then 1.5 on a machine half as fast, and 1.8 on one twice as fast."""
    old = run(*layers(3.0, 2.0))
    assert verdicts(old, run(*layers(6.0, 4.0))) == ["same"]
    slower = compare.compare(old, run(*layers(1.8, 1.0)))
    (change,) = slower.flagged
    assert (change.verdict, change.old.middle, change.new.middle) == ("slower", 1.5, 1.8)
    # quartiles 1% around both medians: the ratio lies between 1.5 * .99 / 1.01 and 1.5 * 1.01 / .99
    assert (change.old.low, change.old.high) == pytest.approx((1.5 * 0.99 / 1.01, 1.5 * 1.01 / 0.99))
    assert verdicts(run(*layers(1.8, 1.0)), old) == ["faster"]


@pytest.mark.parametrize(("ours", "verdict"), [(1.049, "same"), (1.051, "slower"), (0.951, "same"), (0.949, "faster")])
def test_the_threshold_on_both_sides(ours, verdict):
    quiet = {"spread": 1e-6}
    assert verdicts(run(*layers(1.0, 1.0, **quiet)), run(*layers(ours, 1.0, **quiet))) == [verdict]
    assert verdicts(run(*layers(1.0, 1.0, **quiet)), run(*layers(ours, 1.0, **quiet)), threshold=0.06) == ["same"]


def test_quartiles_that_meet_are_noise():
    """20% slower: with 6% around each median the ratios' ranges meet at 1.06, with 4% they do not."""
    noisy, quiet = {"spread": 0.06}, {"spread": 0.04}
    assert verdicts(run(*layers(1.0, 1.0, **noisy)), run(*layers(1.2, 1.0, **noisy))) == ["within noise"]
    assert verdicts(run(*layers(1.0, 1.0, **quiet)), run(*layers(1.2, 1.0, **quiet))) == ["slower"]
    # the yardstick's noise alone is noise too
    old, new = (run(layer(results.OURS, t, spread=0), layer(results.PLAIN, 1.0, spread=0.1)) for t in (1.0, 1.2))
    assert verdicts(old, new) == ["within noise"]


def test_each_suite_has_its_yardstick():
    steps = [step(results.OURS, 1.0), step(results.FULL, 2.0), step(results.PROBE, 9.0)]
    calls = [launch(results.OURS, 4e-5), launch(results.PLAIN, 1e-5)]
    norms = [layer(results.OURS, 3.0, name="norm"), layer(results.LAYER_NORM, 2.0, name="norm")]
    grads = [
        layer(name, t, direction="grad_scales") for name, t in ((results.GRAD_SCALES, 7.0), (results.BARE_GRAD, 2.0))
    ]
    for suite, rows, expected in (
        ("step", steps, {results.OURS: 0.5, results.PROBE: 4.5}),
        ("launch", calls, {results.OURS: 4.0}),
        ("norm", norms, {results.OURS: 1.5}),
        ("layer", grads, {results.GRAD_SCALES: 3.5}),
    ):
        changes = compare.compare(run(*rows, suite=suite), run(*rows, suite=suite)).changes
        assert {change.case.rpartition(", ")[2]: change.new.middle for change in changes} == pytest.approx(expected)


def test_shapes_tokens_dtypes_and_directions_never_mix():
    old = run(*layers(1.0, 1.0), *layers(1.0, 1.0, m=197), *layers(1.0, 1.0, direction="forward"))
    old[0]["results"] += layers(1.0, 1.0, dtype="float32") + layers(5.0, 1.0, rank=8)
    new = run(*layers(1.0, 1.0), *layers(9.0, 1.0, m=197), *layers(1.0, 1.0, direction="forward"))
    new[0]["results"] += layers(1.0, 1.0, dtype="float32") + layers(5.0, 1.0, rank=8)
    (change,) = compare.compare(old, new).flagged
    assert change.case == (
        "layer: ViT-B/16 fc1, M = 197, n 3072, k 768, groups 1, bfloat16, forward + backward, rlrr_kernels"
    )


def test_cases_of_one_run_only_are_named():
    old = run(*layers(1.0, 1.0), *layers(1.0, 1.0, m=197), layer(results.FORMULA, 2.0))
    new = run(*layers(1.0, 1.0), *layers(1.0, 1.0, name="fc2"))
    comparison = compare.compare(old, new)
    assert len(comparison.changes) == 1
    assert [case.rpartition(", ")[2] for case in comparison.only_old] == [results.FORMULA, results.OURS]
    assert "M = 197" in comparison.only_old[1]
    assert ["fc2" in case for case in comparison.only_new] == [True]
    text = compare.report(comparison, everything=False)
    assert "2 only in OLD:" in text
    assert "1 only in NEW:" in text


def test_a_case_that_fails_now_is_flagged_and_one_that_failed_before_is_not():
    good, bad = layers(1.0, 1.0), layers("OutOfMemoryError", 1.0)
    other = layers(1.0, 1.0, m=197)
    (change,) = compare.compare(run(*good), run(*bad)).flagged
    assert change.verdict == "fails now"
    assert "| 1.000 |  |  | fails now |" in compare.table([change])
    comparison = compare.compare(run(*bad, *other), run(*good, *other))
    assert (len(comparison.changes), len(comparison.without_ratio), comparison.flagged) == (1, 1, [])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            {"device": "cpu"},
            {},
            r"different devices do not compare: cpu \(Made-up 9000, 2 cores used\) and NVIDIA H200",
        ),
        (
            {"device": "cpu"},
            {"device": "cpu", "processor": "Other"},
            r"different devices do not compare: cpu \(Made-up 9000, 2 cores used\) and cpu \(Other\)",
        ),
        ({"dtype": "float32"}, {}, "different dtypes do not compare: float32 and bfloat16"),
        ({"m": 197}, {}, "no case with a ratio in common: 1 cases and 1"),
    ],
)
def test_what_does_not_compare_is_refused(old, new, message):
    def made(device=made_up.GPU, processor="Made-up 9000, 2 cores used", **where):
        return run(*layers(1.0, 1.0, **where), device=device, processor=processor)

    with pytest.raises(ValueError, match=message):
        compare.compare(made(**old), made(**new))


def test_the_command_says_it_by_its_exit_status(tmp_path, capsys):
    def write(name, chunks):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "layer-made-up.json").write_text(json.dumps(chunks[0]))
        return str(path)

    old = write("old", run(*layers(3.0, 2.0), layer(results.FORMULA, 4.0)))
    new = write("new", run(*layers(1.8, 1.0), layer(results.FORMULA, 2.0)))
    assert compare.main([old, old]) == 0
    assert "0 slower, 0 fails now, 0 within noise, 2 same, 0 faster" in capsys.readouterr().out
    # a folder and a file
    assert compare.main([old, f"{new}/layer-made-up.json"]) == 1
    printed = capsys.readouterr().out
    assert "| 1.500 | 1.800 | +20.0% | slower |" in printed
    assert "2020-02-29; rlrr_kernels 0.0.1, torch 9.9.9" in printed
    assert results.FORMULA not in printed
    assert compare.main([old, new, "--all", "--threshold", "0.25"]) == 0
    assert "| 2.000 | 2.000 | +0.0% | same |" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_status_2(tmp_path, capsys):
    good = tmp_path / "good.json"
    good.write_text(json.dumps(run(*layers(1.0, 1.0))[0]))
    lacking = run(*layers(1.0, 1.0))[0]
    del lacking["results"][0]["q1"]
    texts = {
        "broken.json": ("{", "broken.json: expected JSON"),
        "other.json": ('{"best": 1}', "other.json: expected raw results of the benchmark suites, found none"),
        "lacking.json": (json.dumps(lacking), "a result lacks q1"),
        "zero.json": (json.dumps(run(*layers(0.0, 1.0))[0]), "expected seconds above 0 in 'q1', got 0.0"),
    }
    for name, (text, message) in texts.items():
        (tmp_path / name).write_text(text)
        assert compare.main([str(good), str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert (printed.out, printed.err.count("\n")) == ("", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert compare.main([str(empty), str(good)]) == 2
    assert "expected raw results of the benchmark suites, found none" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "nowhere"), str(good)]) == 2
    assert "no such file or folder" in capsys.readouterr().err
