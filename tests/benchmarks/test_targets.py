"""Targets on made-up results, with verdicts worked out by hand."""

import pytest

from benchmarks import results, targets
from benchmarks.groups import groups, is_ours
from benchmarks.results import OURS
from tests.benchmarks import made_up
from tests.benchmarks.made_up import chunk, launch, layer, step


def row(found, text):
    """Return the one target whose name contains this text."""
    (match,) = [row for row in found if text in row.target]
    return match


def rows_of(chunks):
    """Return the rows if nothing but these results is planned."""
    plan = []
    for group in groups(c for c in chunks if c["device"] != "cpu"):
        rivals = frozenset(n for n, r in group.rows.items() if not is_ours(n) and r.get("same_function"))
        plan.append(targets.Planned(group.suite, group.case, rivals))
    return targets.rows(chunks, plan)


def pair(ours, other, theirs, own=OURS, **where):
    return [layer(own, ours, **where), layer(other, theirs, **where)]


def test_nothing_is_measured_without_results_by_a_cpu_or_in_another_dtype():
    found = targets.rows([])
    assert len(found) == 13
    assert {(r.verdict, r.got, r.cases) for r in found} == {("not measured", "", 0)}
    assert all(r.planned for r in found)
    rows = pair(1.0, results.PLAIN, 2.0, direction="forward", m=12608)
    assert row(rows_of([chunk(rows)]), "plain linear's time").verdict == "met"
    assert {r.verdict for r in rows_of([chunk(rows, device="cpu")])} == {"not measured"}
    for other in ({"dtype": "float32"}, {"rank": 8}):
        rows = pair(1.0, results.PLAIN, 2.0, direction="forward", m=12608, **other)
        assert {r.verdict for r in rows_of([chunk(rows)])} == {"not measured"}


LARGE = {"model": "ViT-L/16", "n": 4096, "k": 1024}
FORWARD, GRADS = {"direction": "forward"}, {"direction": "grad_scales"}


def memory(saved):
    """Peak and kept bytes of ours, less those of the plain linear."""
    own = layer(OURS, 1.0, extra_bytes=1_500_000, saved_bytes=saved, saved_x=True)
    return [own, layer(results.PLAIN, 1.0, extra_bytes=300_000, saved_bytes=200_000, saved_x=False)]


def share(seconds):
    """Bare products: half the work in 0.5625 s, so the whole takes 1.125 s at that rate; at the shape itself 1.2 s."""
    products = [layer(results.PRODUCTS, t, m=m, **LARGE) for t, m in ((1.2, 50432), (0.5625, 25216))]
    return [layer(OURS, seconds, m=50432, **LARGE), *products]


def many_tokens(seconds):
    """The worst of two cases decides; with few tokens this target has no case."""
    rows = pair(1.0, results.PLAIN, 1.5, m=12608, **FORWARD) + pair(seconds, results.PLAIN, 1.9, m=50432, **FORWARD)
    return rows + pair(9.0, results.PLAIN, 1.0, m=197, **FORWARD)


def few_tokens(theirs):
    rows = pair(3.0, results.RECOMPUTE, theirs, **FORWARD)
    return rows + pair(3.0, results.RECOMPUTE, 1.0, m=12608, **FORWARD)


def grads(seconds):
    return pair(seconds, results.BARE_GRAD, 1.0, results.GRAD_SCALES, **GRADS)


@pytest.mark.parametrize(
    ("target", "made", "right", "wrong"),
    [
        ("plain linear's time", many_tokens, (2.0, "0.950 (ViT-B/16 fc1, M = 50,432)"), (2.01, "0.945 (ViT-B")),
        ("W' written", few_tokens, (3.0, "1.000 (ViT-B/16 fc1, M = 6,304)"), (2.9, "0.967 (ViT-B")),
        ("dy^T x", grads, (0.8, "1.250 (ViT-B/16 fc1, M = 6,304)"), (1.25, "0.800 (ViT-B")),
        ("share", share, (1.25, "0.900 (ViT-L/16 fc1, M = 50,432)"), (1.5, "0.750 (ViT-L")),
        ("memory above", memory, (999_000, "1.999 (ViT-B/16 fc1, M = 6,304)"), (1_000_000, "2.000 (ViT-B")),
    ],
)
def test_each_bound_on_both_sides(target, made, right, wrong):
    # the peak of bare products in another run does not count
    other = [chunk([layer(results.PRODUCTS, 1e-6, m=50432)], chunk="layer-other")] if target == "share" else []
    met = row(rows_of([chunk(made(right[0])), *other]), target)
    assert (met.verdict, met.got) == ("met", right[1])
    missed = row(rows_of([chunk(made(wrong[0])), *other]), target)
    assert missed.verdict == "missed"
    assert missed.got.startswith(wrong[1])


def test_both_against_the_best_of_the_others():
    """The best rival is 1.2 and 1.6 times ours at two shapes of ViTs, and 1.05 times at one of Swin."""
    rows = []
    for where, best in (({}, 1.2), ({"name": "fc2", "n": 768, "k": 3072}, 1.6), ({"model": "Swin-B"}, 1.05)):
        rows += pair(1.0, results.FORMULA, 7.0, **where)
        rows += [layer(results.FACTORED, best, **where), layer(results.RECOMPUTE, best + 0.1, **where)]
        # neither another function nor this package by another name is a rival
        rows += [layer(results.PLAIN, 0.1, **where), layer(results.TRITON, 0.2, **where)]
    found = rows_of([chunk(rows)])
    never = row(found, "every shape")
    assert (never.verdict, never.got, never.cases) == ("met", "1.050 (Swin-B fc1, M = 6,304)", 3)
    mean = row(found, "geometric mean")
    assert (mean.verdict, mean.got, mean.cases) == ("met", "1.386", 2)  # sqrt(1.2 * 1.6)
    assert row(found, "formula in eager").got.startswith("7.000")
    found = rows_of([chunk([*pair(1.0, results.FACTORED, 0.99), layer(results.FORMULA, 1.99)])])
    assert {row(found, t).verdict for t in ("every shape", "geometric mean", "formula in eager")} == {"missed"}


def test_steps_and_calls():
    """Images a second: 64 / 0.1 against 64 / 0.19 and 64 / 0.09; peak memory 6 GB of 9."""
    steps = [
        step(OURS, 0.1, peak_bytes=6e9),
        step(results.OFFICIAL, 0.19, peak_bytes=9e9),
        step(results.OFFICIAL_COMPILED, 0.09, peak_bytes=8e9),
        step(OURS, 0.1, batch=256, peak_bytes=9e9),
        step(results.OFFICIAL, 0.1, batch=256, peak_bytes=1e9),
    ]
    calls = [launch(results.CUDA, 29e-6), launch(results.TRITON, 61e-6), launch(results.CUDA, 25e-6, "no_grad")]
    calls += [launch(results.TRITON, 50e-6, "no_grad"), launch(results.CUDA, 80e-6, "both")]
    found = {r.target: r for r in rows_of([chunk(steps, "step"), chunk(calls, "launch")])}
    name, call = "ViT-B/16 step, batch 64", "CPU time of a call in eager"
    for target, verdict, got in (
        (f"{name}: images/s / official formula's", "met", "1.900 (ViT-B/16, batch 64)"),
        (f"{name}: peak memory / official formula's", "missed", "0.667 (ViT-B/16, batch 64)"),
        (f"{name}: images/s / official formula's, compiled", "missed", "0.900 (ViT-B/16, batch 64)"),
        (f"{call}, C++ path, µs", "met", "29.000 (call: forward)"),
        (f"{call}, Triton, µs", "missed", "61.000 (call: forward)"),
    ):
        assert (found[target].verdict, found[target].got) == (verdict, got)


def test_a_target_is_missed_if_ours_failed():
    rows = pair(1.0, results.FORMULA, 3.0) + pair("OutOfMemoryError: 3 GiB", results.FORMULA, 3.0, name="fc2")
    found = row(rows_of([chunk(rows)]), "formula in eager")
    assert (found.verdict, found.got, found.cases) == ("missed", "failed at ViT-B/16 fc2, M = 6,304", 2)


def test_results_of_two_gpus_are_refused():
    with pytest.raises(ValueError, match=f"expected results of one GPU, got NVIDIA A100, {made_up.GPU}"):
        targets.rows([chunk([]), chunk([], device="NVIDIA A100")])


def whole():
    """Return results of everything that is planned, with ours twice as fast as the others."""
    layers, steps, calls = [], [], []
    for p in targets.planned():
        if p.suite == "layer":
            c = p.case
            where = {"name": c["layer"]} | {key: c[key] for key in ("model", "n", "k", "m", "groups", "direction")}
            memory = {"extra_bytes": 0, "saved_bytes": 0}
            names = (results.PLAIN, results.PRODUCTS, results.BARE_GRAD, *p.rivals)
            layers += [layer(name, 1.0, **where, **memory) for name in (OURS, results.GRAD_SCALES)]
            layers += [layer(name, 2.0, **where, **memory) for name in names]
        elif p.suite == "step":
            where = {"model": p.case["model"], "batch": p.case["batch"]}
            steps.append(step(OURS, 1.0, peak_bytes=1) | where)
            steps += [step(name, 2.0, peak_bytes=2) | where for name in p.rivals]
        else:
            calls += [launch(name, 1e-6, p.case["call"]) for name in (results.CUDA, results.TRITON)]
    return [chunk(layers), chunk(steps, "step"), chunk(calls, "launch")]


def test_a_target_is_met_only_if_everything_planned_was_measured():
    everything = whole()
    found = targets.rows(everything)
    assert {r.verdict for r in found} == {"met"}
    assert [r.cases for r in found] == [r.planned for r in found]
    assert row(found, "memory above").planned == 2 * row(found, "every shape").planned == 2 * 4 * 7 * 5

    def after(change):
        rows = [kept for r in everything[0]["results"] if (kept := change(r)) is not None]
        return {r.target: r for r in targets.rows([chunk(rows), *everything[1:]]) if r.verdict != "met"}

    def at(r, name, direction="both"):
        case = (r["model"], r["layer"], r["m"], r["direction"])
        return r["implementation"] == name and case == ("ViT-L/16", "fc2", 6304, direction)

    error = {"error": "OutOfMemoryError: x"}
    changes = {
        "failed": lambda r: {k: v for k, v in r.items() if k != "median"} | error if at(r, results.FACTORED) else r,
        "missing": lambda r: None if at(r, results.FACTORED) else r,
        "not searched": lambda r: None if at(r, results.FORMULA_MAX) else r,
    }
    for change in changes.values():
        lacking = after(change)
        assert [r.verdict for r in lacking.values()] == ["incomplete"] * 2
        assert {r.got for r in lacking.values()} == {
            "2.000 (Swin-B 1.fc1, M = 100,352); 1 of 140 cases lack a measurement",
            "2.000; 1 of 60 cases lack a measurement",
        }
    # a case that was not run at all, then one in which another target's rival is missing
    (gone,) = after(lambda r: None if r["m"] == 1576 and r["direction"] == "grad_scales" else r).values()
    assert (gone.verdict, gone.cases, gone.planned) == ("incomplete", 132, 140)
    (plain,) = after(lambda r: None if at(r, results.PLAIN, "forward") else r).values()
    assert (plain.target, plain.cases) == ("memory above a frozen nn.Linear, MB, every layer, forward and both", 279)
    # a loss is a loss even if little was measured
    lost = after(lambda r: r | {"median": 0.5} if at(r, results.FACTORED) else None if r["m"] == 197 else r)
    assert row(list(lost.values()), "every shape").verdict == "missed"
