"""SSF's affine behind a LayerNorm, for ViT-B/16's tokens: fused, as two operations, by composed weights, compiled.

Read the times as ratios within a group. LayerNorm alone is the least that is possible: the fused layer moves the same
bytes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import results, timing
from benchmarks.measures import Formula, peak_and_results, saved_for_backward
from benchmarks.results import COMPOSED, FORMULA, FORMULA_COMPILED, LAYER_NORM, NORM_IMPLEMENTATIONS, OURS, LayerCase
from benchmarks.suite import DEVICE, Outcome, Rivals, interleaved, outcome, parametrize, turn_by_turn
from benchmarks.timing import Call, Variant
from rlrr_kernels.backends import choice, reference
from rlrr_kernels.backends.reference import compose_affine
from rlrr_kernels.layers.norm import SSFLayerNorm

IMAGES = (1, 32, 256) if DEVICE == "cuda" else (8,)
TOKENS, D = 197, 768


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a group for each batch size, dtype and direction."""
    option = metafunc.config.getoption
    tests = []
    for images in (option("--images") or IMAGES) if "norm".startswith(option("--chunk") or "") else ():
        for dtype in option("--dtype"):
            for direction in ("forward", "both"):
                label = f"norm-{images}-{dtype}-{direction}"
                group = Rivals("norm", "norm", (images, dtype, direction), label, place=3)
                tests += [(group, name) for name in NORM_IMPLEMENTATIONS]
    parametrize(metafunc, tests)


def two_operations(norm: nn.Module, scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    """Return y * s + t of the LayerNorm's y, in x's dtype, as the published code computes it."""
    return (norm(x) * scale + shift).to(x.dtype)


def layers(dtype: torch.dtype) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]]:
    """Return for each implementation its layer, ``[..., D]`` to ``[..., D]``, and what it trains; all share values."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(D, device=DEVICE, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        norm.weight.normal_(1, 0.1)
        norm.bias.normal_(0, 0.1)
    fused = SSFLayerNorm.from_layer_norm(copy.deepcopy(norm))
    s, t = fused.ssf_scale, fused.ssf_shift

    def composed(x: Tensor) -> Tensor:
        weight, bias = compose_affine(norm.weight, norm.bias, s, t, s.dtype)
        # on a GPU PyTorch's LayerNorm needs weights of x's dtype
        return F.layer_norm(x, (D,), weight.to(x.dtype), bias.to(x.dtype), norm.eps)

    separate = functools.partial(two_operations, norm, s, t)
    compiled = torch.compile(separate, dynamic=False, fullgraph=True)
    return {
        OURS: (fused, (s, t)),
        FORMULA: (separate, (s, t)),
        FORMULA_COMPILED: (compiled, (s, t)),
        COMPOSED: (composed, (s, t)),
        LAYER_NORM: (norm, ()),
    }


def _call(layer: Callable[[Tensor], Tensor], trained: tuple[Tensor, ...], x: Tensor, dy: Tensor, both: bool) -> Call:
    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, *trained), dy)) if both else (y,)

    return Call(run)


def _measure(group: Rivals, rounds: tuple[int, int] | None, names: list[str]) -> dict[str, Outcome]:
    images, dtype, direction = group.key
    torch._dynamo.reset()
    rows: dict[str, Any] = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    one = images * TOKENS * D * rows["dtype"].itemsize
    pairs = [
        (torch.randn(images, TOKENS, D, **rows).requires_grad_(), torch.randn(images, TOKENS, D, **rows))
        for _ in range(timing.copies(2 * one, timing.l2_bytes()))
    ]
    rivals = layers(rows["dtype"])
    more: dict[str, dict[str, Any]] = {}

    def calls_of(name: str) -> list[Call]:
        return [_call(*rivals[name], x, dy, direction == "both") for x, dy in pairs]

    formula = Formula(calls_of(FORMULA)[0].run, rows["dtype"])

    def variant(name: str) -> Variant:
        layer, trained = rivals[name]
        calls = calls_of(name)
        x = pairs[0][0]
        owned = [*trained, *(layer.parameters() if isinstance(layer, nn.Module) else ())]
        saved, saved_x = saved_for_backward(lambda: layer(x), x, owned)
        extra, got = peak_and_results(calls[0])
        more[name] = {"extra_bytes": extra, "saved_bytes": saved, "saved_x": saved_x}
        if name not in results.OTHER_FUNCTIONS:
            more[name]["error_vs_formula"] = formula.error(got)
        return Variant(calls)

    found = interleaved(names, variant, rounds)
    served = "torch" if choice.module_for_layer_norm(pairs[0][0]) is reference else "triton"
    outcomes = {}
    for name in names:
        case = LayerCase(
            *("ViT-B/16", "norm", D, D, 1, images * TOKENS, images, dtype, direction),
            implementation=name,
            backend=served if name == OURS else None,
            same_function=name not in results.OTHER_FUNCTIONS,
        )
        outcomes[name] = outcome(case, found[name], more.get(name), len(pairs))
    return outcomes


test_norm = turn_by_turn(_measure)
