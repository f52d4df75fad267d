"""The package on a torch that lacks one of the private parts it asks: each part's name with what then goes wrong.

A process of its own (``python -m tests.without_probe PART...``) that forks for each, since ops are registered once.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which tracing needs: once, for all children
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(str(importlib.util.find_spec("rlrr_kernels").origin)).parent
#: What is resolved at import, as the source says, and the two that are not functions of torch.
PARTS = re.findall(r'_private\("([\w.]+)"', (PACKAGE / "ops" / "route.py").read_text())
OTHERS = {"_current_level": forward_ad, "_AutoDispatchBelowAutograd": torch._C}


def without(name: str) -> Any:
    """The package, imported where this part cannot be found; PyTorch itself has it again afterwards."""
    attrgetter: Any = operator.attrgetter
    owner = OTHERS.get(name)
    if owner is not None:
        part = getattr(owner, name)
        delattr(owner, name)
    else:

        def lacking(path: str) -> Any:
            return attrgetter(f"{path}_renamed" if path == name else path)

        operator.attrgetter = lacking
    try:
        import rlrr_kernels
    finally:
        operator.attrgetter = attrgetter
        if owner is not None:
            setattr(owner, name, part)
    return rlrr_kernels


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Gradients(torch.autograd.Function):
    """The identity, whose gradient is only marked as negated, or as zero."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, mark: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.mark = mark
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.mark(grad), None


def check(rlrr: Any) -> None:
    """Every way in which the ops may be watched, differentiated or recorded, against plain PyTorch."""
    given = [torch.randn(s, dtype=torch.float64) for s in ((5, 3), (4, 3), (4, 1), (1, 3), (4,), (4,))]
    dy = torch.randn(5, 4, dtype=torch.float64)
    x = given[0]

    def plain(x: torch.Tensor, w: Any, u: Any, v: Any, b: Any, f: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x, w * (1 + u * v), b + f)

    def gradients(function: Any, *changed: Any, **options: Any) -> Any:
        leaves = [t.clone().requires_grad_() for t in given]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, *(changed or (dy,)), **options)]

    def alike(ours: Any, expected: Any) -> None:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)

    def op(x: Any, w: Any, u: Any, v: Any, b: Any, f: Any) -> Any:
        return torch.ops.rlrr.forward(x, w, u, v[None], b, f)

    def rest_given(function: Any, x: torch.Tensor) -> Any:
        return function(x, *given[1:])

    layer = rlrr.rescaled_linear
    for function in (layer, op):
        alike(gradients(function), gradients(plain))
        with Recorder() as recorder:
            function(*given)
        assert "rlrr::forward" in recorder.seen, recorder.seen
        graph = make_fx(functools.partial(rest_given, function), pre_dispatch=True)(x)
        assert "rlrr.forward.default" in [str(node.target) for node in graph.graph.nodes]
    many = torch.randn(3, *dy.shape, dtype=torch.float64)
    alike(gradients(layer, many, is_grads_batched=True), gradients(plain, many, is_grads_batched=True))
    for mark in (lambda g: torch.complex(g, -g).conj().imag, lambda g: torch._efficientzerotensor(g.shape).double()):
        alike(*(gradients(lambda *t, f=f, mark=mark: Gradients.apply(f(*t), mark)) for f in (layer, plain)))
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.vmap(f)(x[:, None]),
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.jit.trace(lambda x: f(x), (x,), check_trace=False)(2 * x),
    ):
        alike(*(transform(functools.partial(rest_given, f)) for f in (layer, plain)))
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, x), *given[1:])).tangent for f in (layer, plain)]
    alike(*tangents)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        layer(*given)
    assert "rlrr::forward" in {event.name for event in record.events()}


def failure(name: str) -> str:
    """What goes wrong without this part; empty if nothing does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            check(without(name))
            said = ""
        except BaseException:
            said = traceback.format_exc()[-2000:]
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said if status == 0 else f"status {status} {said}"


if __name__ == "__main__":
    assert "rlrr_kernels" not in sys.modules
    torch.set_num_threads(1)
    print(json.dumps({name: failure(name) for name in sys.argv[1:]}))
