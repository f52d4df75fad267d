"""Forward, backward, both, and the gradients of u, v and f alone, of the linears of four vision transformers.

Every way to compute the layer takes its turn in each round. Read the times as ratios within a group: absolute times on
a shared CPU mean little.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import chunks, implementations, results, timing
from benchmarks.chunks import Shape
from benchmarks.implementations import Inputs, make_inputs
from benchmarks.measures import Formula, peak_and_results, saved_for_backward
from benchmarks.results import LayerCase
from benchmarks.suite import (
    DEVICE,
    RANKS_PLACE,
    Outcome,
    Rivals,
    interleaved,
    outcome,
    parametrize,
    rank_label,
    turn_by_turn,
)
from benchmarks.tables import PRODUCT_COUNT
from benchmarks.timing import Variant

SLICE_DIRECTIONS = ("forward", "both")

#: What ``torch.compile`` has in its caches.
_compiled_for: list[tuple[Shape, int, str, int]] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make groups in the order in which compiled code can be shared: directions last."""
    option = metafunc.config.getoption
    chunk, images, dtypes = option("--chunk"), option("--images"), option("--dtype")
    whole = chunk is not None
    shapes = [shape for key in chunks.MODELS if whole or key == "vit_b" for shape in chunks.MODELS[key]]
    tests: list[tuple[Rivals, str]] = []
    for shape, dtype in itertools.product(shapes, dtypes):
        name = chunks.layer_chunk(shape, dtype) if whole else f"layer-{shape.key}"
        for place, count in enumerate(images or (chunks.IMAGES if whole else chunks.SLICE_IMAGES[DEVICE])):
            for direction in results.DIRECTIONS if whole else SLICE_DIRECTIONS:
                # a slice begins with the small groups and ends with those that take longest
                order = 0 if whole else 1 + 3 * place + 2 * (direction != "both")
                searched = whole and chunks.searched(shape, count, dtype)
                tests += _group(name, order, shape, count, dtype, direction, searched=searched)
    ranked = [shape for shape in chunks.MODELS[chunks.RANKED_MODEL] if shape.layer in chunks.RANKED_LAYERS]
    for rank, shape, dtype in itertools.product(results.RANKS[1:], ranked, dtypes):
        for count in images or chunks.RANKED_IMAGES[DEVICE]:
            name = chunks.layer_chunk(shape, dtype, rank)
            tests += _group(name, RANKS_PLACE, shape, count, dtype, "both", rank)
    parametrize(metafunc, [(group, name) for group, name in tests if group.chunk.startswith(chunk or "")])


def _group(
    chunk: str, place: int, shape: Shape, count: int, dtype: str, direction: str, rank: int = 1, searched: bool = False
) -> list[tuple[Rivals, str]]:
    """Return a group with each of its rivals."""
    label = f"{shape.key}-{shape.layer}-{count}-{dtype}-{direction}{rank_label(rank)}"
    work = count * shape.tokens * shape.n * shape.k * PRODUCT_COUNT[direction]
    group = Rivals("layer", chunk, (shape, count, dtype, direction, rank), label, place, work)
    return [(group, name) for name in implementations.names(direction, DEVICE, searched, rank)]


def _measure(group: Rivals, rounds: tuple[int, int] | None, names: list[str]) -> dict[str, Outcome]:
    shape, images, dtype, direction, rank = group.key
    if _compiled_for != [(shape, images, dtype, rank)]:
        _compiled_for[:] = [(shape, images, dtype, rank)]
        # otherwise the limit on recompilations is reached after a few shapes
        torch._dynamo.reset()
    m = shape.tokens * images
    sizes = m, shape.n, shape.k, shape.groups
    make = functools.partial(make_inputs, *sizes, getattr(torch, dtype), DEVICE, rank=rank)
    first = make()
    count = timing.copies(first.nbytes, timing.l2_bytes())
    inputs = [first, *(make(seed=seed) for seed in range(1, count))]

    def formula_results() -> tuple[Tensor, ...]:
        call = implementations.call(results.FORMULA, direction, first)
        if call.before is not None:
            call.before()
        return tuple(t.detach() for t in call.run())

    formula = Formula(formula_results, first.x.dtype)
    more: dict[str, dict[str, Any]] = {}
    backends: dict[str, str | None] = {}

    def variant(name: str) -> Variant:
        backends[name] = implementations.served_by(name, first.x, first.weight, rank)
        more[name], got = _memory(name, direction, first)
        if name not in results.OTHER_FUNCTIONS:
            more[name]["error_vs_formula"] = formula.error(got)
        del got
        return Variant([implementations.call(name, direction, i) for i in inputs], implementations.context(name))

    found = interleaved(names, variant, rounds)
    outcomes = {}
    for name in names:
        case = LayerCase(
            *(shape.model, shape.layer, shape.n, shape.k, shape.groups, m, images, dtype, direction),
            implementation=name,
            backend=backends.get(name),
            same_function=name not in results.OTHER_FUNCTIONS,
            rank=rank,
        )
        outcomes[name] = outcome(case, found[name], more.get(name), count)
    return outcomes


def _memory(name: str, direction: str, i: Inputs) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Return the memory of one call, and its results; calls without autograd keep nothing for backward."""
    with implementations.context(name)():
        extra, got = peak_and_results(implementations.call(name, direction, i))
        got = tuple(t.detach() for t in got)
        saved, saved_x = 0, False
        if name in implementations.THROUGH_AUTOGRAD and direction != "forward_no_grad":
            layer = implementations.bind(name, i)
            saved, saved_x = saved_for_backward(layer.forward, i.x, (*layer.trained, *layer.frozen))
    return {"extra_bytes": extra, "saved_bytes": saved, "saved_x": saved_x}, got


test_layer = turn_by_turn(_measure)
