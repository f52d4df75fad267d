"""What is compared: this package on each backend, and how else one would compute the layer in PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import baselines, results
from benchmarks.cases import MODELS
from benchmarks.timing import Call, Rejected, Unavailable
from rlrr_kernels import backend_for, rescaled_linear, use_backend
from rlrr_kernels.backends import choice, reference, verdicts
from rlrr_kernels.ops import linear

#: ViT-B/16: tokens of one image, and (N, K, groups) of the four linears of a block
TOKENS = MODELS["vit_b"][0].tokens
LAYERS = {shape.layer: (shape.n, shape.k, shape.groups) for shape in MODELS["vit_b"]}

#: Implementation -> the backend that it asks for.
BACKENDS = {
    **{results.GLUON: "gluon", results.TRITON: "triton", results.CUDA: "cuda", results.CUDA_HOPPER: "cuda"},
    **{results.CPU: "cpu", results.PANELS: "panels"},
}
#: Of these -> what `python -m rlrr_kernels check` calls it.
CHECKED = {
    **{results.GLUON: "gluon", results.TRITON: "triton", results.CUDA: "cuda", results.CUDA_HOPPER: "cuda-hopper"},
    results.CPU: "cpu",
}


@dataclass
class Inputs:
    """Tensors of one layer; u, v, f and x need gradients, W and b are frozen."""

    x: Tensor
    weight: Tensor
    scale_out: Tensor
    scale_in: Tensor
    bias: Tensor
    shift: Tensor
    dy: Tensor

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.x, self.scale_out, self.scale_in, self.shift

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """In :func:`~rlrr_kernels.rescaled_linear`'s order."""
        return self.x, self.weight, self.scale_out, self.scale_in, self.bias, self.shift

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.arguments, self.dy))


def make_inputs(m: int, n: int, k: int, groups: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random data, W scaled as a trained layer's."""
    torch.manual_seed(seed)
    wide: dict[str, Any] = {"dtype": reference.accumulation_dtype(dtype), "device": device}
    narrow: dict[str, Any] = {"dtype": dtype, "device": device}
    inputs = Inputs(
        x=torch.randn(m, k, **narrow),
        weight=torch.randn(n, k, **narrow) * k**-0.5,
        scale_out=torch.randn(n, 1, **wide),
        scale_in=torch.randn(groups, 1, k, **wide) * k**-0.5,
        bias=torch.randn(n, **narrow),
        shift=torch.randn(n, **wide),
        dy=torch.randn(m, n, **narrow),
    )
    for t in inputs.trained:
        t.requires_grad_()
    return inputs


def fused(i: Inputs) -> Tensor:
    """This package, on the backend it chooses."""
    return rescaled_linear(*i.arguments)


def formula(i: Inputs) -> Tensor:
    """In eager PyTorch by autograd, as the published code computes it."""
    return baselines.formula(*i.arguments)


def recompute(i: Inputs) -> Tensor:
    return baselines.Recompute.apply(*i.arguments)


def factored(i: Inputs) -> Tensor:
    return baselines.Factored.apply(*i.arguments)


def plain(i: Inputs) -> Tensor:
    """A frozen ``nn.Linear``: another function, and the limit for forward and dx."""
    return F.linear(i.x, i.weight, i.bias)


@functools.cache
def _compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    # fullgraph: too many recompilations are an error then, not eager PyTorch in silence
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def formula_compiled(i: Inputs) -> Tensor:
    return _compiled(baselines.formula)(*i.arguments)  # type: ignore[no-any-return]


def formula_max(i: Inputs) -> Tensor:
    # without its own CUDA graphs: the stopwatch captures one itself
    return _compiled(baselines.formula, "max-autotune-no-cudagraphs")(*i.arguments)  # type: ignore[no-any-return]


def _recompute(*arguments: Tensor) -> Tensor:
    return baselines.Recompute.apply(*arguments)


def recompute_compiled(i: Inputs) -> Tensor:
    return _compiled(_recompute)(*i.arguments)  # type: ignore[no-any-return]


def products(i: Inputs) -> tuple[Tensor, ...]:
    """The layer's three products alone, W as it is: x W^T, dy W and dy^T x in x's dtype."""
    return (*_bare_forward(i), *_bare_backward(i))


def _bare_forward(i: Inputs) -> tuple[Tensor, ...]:
    return (i.x.detach() @ i.weight.mT,)


def _bare_backward(i: Inputs) -> tuple[Tensor, ...]:
    return i.dy @ i.weight, *_bare_grad(i)


def _bare_grad(i: Inputs) -> tuple[Tensor, ...]:
    return (i.dy.mT @ i.x.detach(),)


def three_ops(i: Inputs) -> tuple[Tensor, ...]:
    """The package's ops alone: no module, no validation, no autograd."""
    return (*_op_forward(i), *_op_backward(i))


def _op_forward(i: Inputs) -> tuple[Tensor, ...]:
    return (linear.forward(*(t.detach() for t in i.arguments)),)


def _op_backward(i: Inputs) -> tuple[Tensor, ...]:
    dx = linear.grad_input(i.dy, i.weight, i.scale_out.detach(), i.scale_in.detach())
    return dx, *_op_grad(i)


def _op_grad(i: Inputs) -> tuple[Tensor, ...]:
    x, u, v, _ = (t.detach() for t in i.trained)
    return linear.grad_scales(i.dy, x, i.weight, u, v, True)


#: Products and ops without autograd: implementation -> direction -> what runs.
_BARE: dict[str, dict[str, Callable[[Inputs], tuple[Tensor, ...]]]] = {
    results.PRODUCTS: {"forward": _bare_forward, "backward": _bare_backward, "both": products},
    results.THREE_OPS: {"forward": _op_forward, "backward": _op_backward, "both": three_ops},
    results.GRAD_SCALES: {"grad_scales": _op_grad},
    results.BARE_GRAD: {"grad_scales": _bare_grad},
}

_FUNCTIONS: dict[str, Callable[[Inputs], Tensor]] = {
    results.FORMULA: formula,
    results.FORMULA_COMPILED: formula_compiled,
    results.FORMULA_MAX: formula_max,
    results.RECOMPUTE: recompute,
    results.RECOMPUTE_COMPILED: recompute_compiled,
    results.FACTORED: factored,
    results.PLAIN: plain,
    **dict.fromkeys((results.OURS, *BACKENDS), fused),
}

THROUGH_AUTOGRAD = frozenset((*_FUNCTIONS, results.LORA, results.HIRA))


@dataclass(frozen=True)
class Layer:
    """An implementation on its inputs.

    Attributes:
        forward: y ``[M, N]``. trained: x and the parameters that get gradients. frozen: the others.
    """

    forward: Callable[[], Tensor]
    trained: tuple[Tensor, ...]
    frozen: tuple[Tensor, ...] = field(default=())


def bind(name: str, i: Inputs) -> Layer:
    """An implementation that goes through autograd, on these inputs.

    Raises:
        Unavailable: as :func:`require_peft`, for PEFT's layers.
    """
    if name in (results.LORA, results.HIRA):
        return _peft(name, i)
    trained = (i.x,) if name == results.PLAIN else i.trained
    return Layer(functools.partial(_FUNCTIONS[name], i), trained, (i.weight, i.bias))


def require_peft() -> Any:
    """PEFT.

    Raises:
        Unavailable: it is not installed, or too old to have HiRA.
    """
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"peft cannot be imported: {error}") from error
    if not hasattr(peft, "HiraConfig"):
        raise Unavailable(f"peft {peft.__version__} has no HiRA")
    return peft


def _peft(name: str, i: Inputs) -> Layer:
    """PEFT's own layer on a frozen ``nn.Linear``, its adapters in x's dtype: the fastest way to run it."""
    peft = require_peft()
    linear = nn.Linear(i.x.shape[1], i.dy.shape[1], device="meta")
    linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (i.weight, i.bias))
    kind, rank = (peft.LoraConfig, 8) if name == results.LORA else (peft.HiraConfig, 1)
    model: Any = peft.inject_adapter_in_model(kind(r=rank, target_modules=["0"]), nn.Sequential(linear))
    adapters = tuple(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in adapters:  # the second factor starts as zeros, which is no data to measure with
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return Layer(functools.partial(model[0], i.x), (i.x, *adapters), (i.weight, i.bias))


class _Backward:
    """Backward alone: each run uses up the graph of one forward."""

    def __init__(self, layer: Layer, dy: Tensor) -> None:
        self.layer, self.dy = layer, dy
        self.y: Tensor | None = None

    def before(self) -> None:
        self.y = self.layer.forward()

    def run(self) -> tuple[Tensor, ...]:
        y, self.y = self.y, None
        assert y is not None
        return torch.autograd.grad(y, self.layer.trained, self.dy)


def call(name: str, direction: str, i: Inputs) -> Call:
    """What is timed of an implementation on these inputs; it returns what it computes as a tuple.

    Raises:
        Unavailable: as :func:`bind`.
    """
    if name in _BARE:
        return Call(functools.partial(_BARE[name][direction], i))
    layer = bind(name, i)
    if direction == "backward":
        backward = _Backward(layer, i.dy)
        return Call(backward.run, backward.before)

    def forward() -> tuple[Tensor, ...]:
        return (layer.forward(),)

    def forward_no_grad() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (layer.forward(),)

    def both() -> tuple[Tensor, ...]:
        y = layer.forward()
        return (y.detach(), *torch.autograd.grad(y, layer.trained, i.dy))

    return Call({"forward": forward, "forward_no_grad": forward_no_grad, "both": both}[direction])


def names(direction: str, device: str, searched: bool = False) -> list[str]:
    """Implementations of a direction on ``"cpu"`` or ``"cuda"``; ``searched``: ``max-autotune`` too."""
    bare = [name for name, directions in _BARE.items() if direction in directions]
    if direction == "grad_scales":
        return bare
    left_out = {results.CPU} if device == "cuda" else {results.GLUON, results.TRITON, results.CUDA, results.CUDA_HOPPER}
    if not searched or device == "cpu":
        left_out.add(results.FORMULA_MAX)
    return [n for n in results.LAYER_IMPLEMENTATIONS if n not in left_out and (n not in _BARE or n in bare)]


@contextlib.contextmanager
def _hopper() -> Iterator[None]:
    # what RLRR_CUDA_HOPPER sets, read once at import
    from rlrr_kernels.backends import cuda

    before, cuda.HOPPER = cuda.HOPPER, True
    try:
        with use_backend("cuda"):
            yield
    finally:
        cuda.HOPPER = before


def context(name: str) -> Callable[[], AbstractContextManager[Any]]:
    """What an implementation runs under: the backend it asks for."""
    if name == results.CUDA_HOPPER:
        return _hopper
    return functools.partial(use_backend, BACKENDS[name]) if name in BACKENDS else nullcontext


def served_by(name: str, x: Tensor, weight: Tensor) -> str | None:
    """The backend behind one of ours, None behind the others.

    Raises:
        Unavailable: the backend that it asks for cannot serve these tensors.
        Rejected: that backend has failed its check on this device.
    """
    if name == results.CUDA_HOPPER and torch.cuda.get_device_capability(x.device)[0] != 9:
        raise Unavailable(f"{torch.cuda.get_device_name(x.device)}: the path is for compute capability 9.x")
    if name in BACKENDS:
        why = choice.refusal(BACKENDS[name], x, weight)
        if why is not None:
            raise Unavailable(f"backend {BACKENDS[name]!r} cannot serve {why}")
        require_check(name, x.device)
        return BACKENDS[name]
    if name not in (results.OURS, results.OURS_COMPILED, results.THREE_OPS, results.GRAD_SCALES):
        return None
    return backend_for(x, weight)


def require_check(name: str, device: torch.device) -> None:
    """Refuse an implementation of ours whose backend has failed `python -m rlrr_kernels check`.

    Raises:
        Rejected: it has, on this device.
    """
    why = verdicts.failure(CHECKED[name], device) if name in CHECKED else None
    if why is not None:
        raise Rejected(f"check: {why}")


def step(i: Inputs, implementation: Callable[[Inputs], Tensor]) -> tuple[Tensor, ...]:
    """y and the gradients of what is trained; of x alone for the plain linear."""
    y = implementation(i)
    trained = (i.x,) if implementation is plain else i.trained
    return (y.detach(), *torch.autograd.grad(y, trained, i.dy))


#: In eager PyTorch.
IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "rlrr_kernels": fused,
    "recompute": recompute,
    "formula": formula,
    "plain linear": plain,
}
