"""The package's promises on a GPU, compared with measured results.

All are for bfloat16 and rank 1 on an NVIDIA GPU; results of a CPU never count. If a target covers many cases, the worst
one decides. A target is missed if ours failed or was slower in a case. It is met only if every case that the suites
plan for it was measured, with all that it is compared with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import implementations, results
from benchmarks.chunks import IMAGES, MODELS, STEP_BATCHES, STEP_MODELS, searched
from benchmarks.groups import FIELDS, Group, geometric_mean, groups, is_ours, on_gpu

MET, MISSED, INCOMPLETE, NOT_MEASURED = "met", "missed", "incomplete", "not measured"
DTYPE = "bfloat16"
EXTRA_BYTES = 2_000_000
#: A value of one group, or None where what it takes was not measured.
Measure = Callable[[Group], float | None]
#: Relation -> the comparison, and which of all (value, name of the case) is the worst.
_RELATIONS: dict[str, tuple[Callable[[float, float], bool], Callable[..., Any]]] = {
    ">=": (operator.ge, min),
    "<=": (operator.le, max),
    "<": (operator.lt, max),
}


@dataclass(frozen=True)
class Planned:
    """A group that the whole suite measures.

    Attributes:
        suite: "layer", "launch" or "step".
        case: The fields of a :class:`~benchmarks.groups.Group`'s case.
        rivals: The other ways to the same function in it.
    """

    suite: str
    case: Mapping[str, Any]
    rivals: frozenset[str]


@dataclass(frozen=True)
class Row:
    """One target. ``cases`` of its ``planned`` cases were measured."""

    target: str
    wanted: str
    got: str
    verdict: str
    cases: int
    planned: int


def planned() -> list[Planned]:
    """Return every group of the whole suite that a target may cover."""
    found = []
    for shape in (shape for shapes in MODELS.values() for shape in shapes):
        for images in IMAGES:
            for direction in results.DIRECTIONS:
                names = implementations.names(direction, "cuda", searched(shape, images, DTYPE))
                of_shape = shape.model, shape.layer, shape.n, shape.k, shape.groups, shape.tokens * images
                found.append(_plan("layer", (*of_shape, DTYPE, direction, 1), names))
    found += [_plan("launch", (call, DTYPE, 1), ()) for call in ("no_grad", "forward", "both")]
    names = [name for name in results.STEP_IMPLEMENTATIONS if results.of_rank(name, 1)]
    for key in STEP_MODELS:
        for batch in STEP_BATCHES:
            found.append(_plan("step", (MODELS[key][0].model, batch, 224, DTYPE, 1), names))
    return found


def _plan(suite: str, case: Sequence[Any], names: Iterable[str]) -> Planned:
    rivals = frozenset(name for name in names if not is_ours(name) and name not in results.OTHER_FUNCTIONS)
    return Planned(suite, dict(zip(FIELDS[suite], case, strict=True)), rivals)


@dataclass(frozen=True)
class _Cases:
    """The measured and the planned groups of a target."""

    measured: list[Group]
    planned: list[Planned]

    def where(self, fits: Callable[[str, Mapping[str, Any]], bool]) -> _Cases:
        return _Cases(
            [g for g in self.measured if fits(g.suite, g.case)], [p for p in self.planned if fits(p.suite, p.case)]
        )


def rows(chunks: Iterable[Mapping[str, Any]], plan: Sequence[Planned] | None = None) -> list[Row]:
    """Return every target, in a fixed order, from the chunks of one device.

    Args:
        chunks: Raw results.
        plan: What must have been measured for a target to be met; default: :func:`planned`.

    Raises:
        ValueError: As :func:`benchmarks.groups.groups`, or if there are results of several GPUs.
    """
    chunks = [chunk for chunk in chunks if on_gpu(chunk)]
    names = sorted({chunk["device"] for chunk in chunks})
    if len(names) > 1:
        raise ValueError(f"chunks: expected results of one GPU, got {', '.join(names)}")
    measured = [group for group in groups(chunks) if (group.case["dtype"], group.case["rank"]) == (DTYPE, 1)]
    everything = _Cases(measured, planned() if plan is None else list(plan))

    def layers(*directions: str) -> _Cases:
        return everything.where(lambda suite, case: suite == "layer" and case["direction"] in directions)

    forward, both = layers("forward"), layers("both")
    large = forward.where(lambda _, case: case["m"] >= 12_608)
    small = forward.where(lambda _, case: case["m"] <= 6_304)
    batch_32 = both.where(lambda _, case: case["m"] == 6_304)
    vit_l = both.where(lambda _, case: case["m"] == 50_432 and (case["n"], case["k"]) == (4096, 1024))
    vits = both.where(lambda _, case: case["model"].startswith("ViT"))
    steps = everything.where(lambda suite, case: suite == "step" and (case["model"], case["batch"]) == ("ViT-B/16", 64))
    calls = everything.where(lambda suite, case: suite == "launch" and case["call"] in ("forward", "no_grad"))
    best = "forward + backward: best other way to the same function, its time / ours"
    step = "ViT-B/16 step, batch 64"
    return [
        _row("forward: plain linear's time / ours, M >= 12,608", ">=", 0.95, large, _against(results.PLAIN)),
        _row(
            *("forward: W' written by one kernel + BLAS, its time / ours, M <= 6,304", ">=", 1.0, small),
            _against(results.RECOMPUTE),
        ),
        _row(
            *("u, v, f gradients: BLAS's dy^T x alone, its time / ours", ">=", 1.0, layers("grad_scales")),
            _against(results.BARE_GRAD),
        ),
        _row(f"{best}, every shape", ">=", 1.0, both, _best_rival),
        _row(f"{best}, geometric mean over ViTs", ">=", 1.15, vits, _best_rival, mean=True),
        _row(
            *("forward + backward: formula in eager, its time / ours, M = 6,304", ">=", 2.0, batch_32),
            _against(results.FORMULA),
        ),
        _row(
            "forward + backward: share of the most that BLAS's three products reach, ViT-L/16 fc1, M = 50,432",
            *(">=", 0.85, vit_l, _peak_share(both.measured)),
        ),
        _row(
            "memory above a frozen nn.Linear, MB, every layer, forward and both",
            *("<", EXTRA_BYTES / 1e6, layers("forward", "both"), _extra_megabytes),
        ),
        _row(f"{step}: images/s / official formula's", ">=", 1.8, steps, _against(results.OFFICIAL)),
        _row(f"{step}: peak memory / official formula's", "<=", 0.6, steps, _memory),
        _row(f"{step}: images/s / official formula's, compiled", ">=", 1.0, steps, _against(results.OFFICIAL_COMPILED)),
        *(
            _row(f"CPU time of a call in eager, {title}, µs", "<=", most, calls, _microseconds(name), name)
            for title, name, most in (("C++ path", results.CUDA, 30.0), ("Triton", results.TRITON, 60.0))
        ),
    ]


def _against(other: str) -> Measure:
    return lambda group: group.speed_up(other)


def _best_rival(group: Group) -> float | None:
    """Return the best rival's time / ours, of those that ran; None if none ran."""
    best = group.best_rival
    return None if best is None else group.speed_up(best)


def _products_per_second(group: Group, implementation: str) -> float | None:
    """Return flops of the three products in a second."""
    seconds, case = group.median(implementation), group.case
    return None if seconds is None else 6 * case["m"] * case["n"] * case["k"] / seconds


def _peak_share(both: Sequence[Group]) -> Measure:
    """Measure the share of the most that bare products reach at any shape in the same run."""

    def share(group: Group) -> float | None:
        run = (g for g in both if g.chunk is group.chunk)
        rates = [rate for g in run if (rate := _products_per_second(g, results.PRODUCTS)) is not None]
        ours = _products_per_second(group, results.OURS)
        return None if ours is None or not rates else ours / max(rates)

    return share


def _extra_megabytes(group: Group) -> float | None:
    """Return peak and kept bytes above a plain linear's, in MB.

    The peak may include what is kept: the sum is never too small.
    """
    held = []
    for name in (results.OURS, results.PLAIN):
        row = group.rows.get(name, {})
        if row.get("extra_bytes") is None or row.get("saved_bytes") is None:
            return None
        held.append(row["extra_bytes"] + row["saved_bytes"])
    return (held[0] - held[1]) / 1e6


def _memory(group: Group) -> float | None:
    """Return our peak memory / the official formula's."""
    ours, theirs = (group.rows.get(name, {}).get("peak_bytes") for name in (results.OURS, results.OFFICIAL))
    return None if ours is None or not theirs else ours / theirs


def _microseconds(implementation: str) -> Measure:
    def microseconds(group: Group) -> float | None:
        seconds = group.median(implementation)
        return None if seconds is None else seconds * 1e6

    return microseconds


def _row(
    target: str,
    relation: str,
    wanted: float,
    found: _Cases,
    measure: Measure,
    implementation: str | None = None,
    mean: bool = False,
) -> Row:
    """Return a target's row.

    Args:
        target: Its name.
        relation: ">=", "<=" or "<": how the value that decides must relate to ``wanted``.
        wanted: The bound.
        found: The cases that it covers.
        measure: The value of one case.
        implementation: Its failure misses the target; default: this package's choice.
        mean: The geometric mean of all cases decides, not the worst case.
    """

    def row(got: str, verdict: str, count: int) -> Row:
        return Row(target, f"{relation} {wanted:g}", got, verdict, count, len(found.planned))

    failed = [group for group in found.measured if "error" in group.rows.get(implementation or group.ours, {})]
    values = {_key(group): (value, group.name) for group in found.measured if (value := measure(group)) is not None}
    if failed:
        return row(f"failed at {failed[0].name}", MISSED, len(values) + len(failed))
    if not values:
        return row("", NOT_MEASURED, 0)
    fits, worst = _RELATIONS[relation]
    if mean:
        got = geometric_mean([value for value, _ in values.values()])
        text = f"{got:.3f}"
    else:
        got, name = worst(values.values())
        text = f"{got:.3f} ({name})"
    if not fits(got, wanted):
        return row(text, MISSED, len(values))
    ran = {_key(group): set(group.rivals) for group in found.measured if _key(group) in values}
    # the best of the others is only known if all of them ran
    needed = {_key(p): p.rivals if measure is _best_rival else frozenset() for p in found.planned}
    lacking = sum(key not in ran or not rivals <= ran[key] for key, rivals in needed.items())
    if lacking or not found.planned:
        return row(f"{text}; {lacking} of {len(found.planned)} cases lack a measurement", INCOMPLETE, len(values))
    return row(text, MET, len(values))


def _key(of: Group | Planned) -> tuple[Any, ...]:
    return of.suite, *of.case.values()
