"""What is compared: this package on each backend, and other ways to compute the layer in PyTorch."""

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
from benchmarks.chunks import MODELS
from benchmarks.timing import Call, Rejected, Unavailable
from rlrr_kernels import backend_for, rescaled_linear, use_backend
from rlrr_kernels.backends import choice, reference, verdicts
from rlrr_kernels.ops import linear

#: ViT-B/16: tokens of one image, and (N, K, groups) of the four linears of a block
TOKENS = MODELS["vit_b"][0].tokens
LAYERS = {shape.layer: (shape.n, shape.k, shape.groups) for shape in MODELS["vit_b"]}

#: Implementation of ours -> the backend that it asks for.
BACKENDS = {
    **{results.GLUON: "gluon", results.TRITON: "triton", results.CUDA: "cuda", results.CUDA_HOPPER: "cuda"},
    **{results.CPU: "cpu", results.PANELS: "panels"},
}
#: Implementation of ours -> its name in `python -m rlrr_kernels check`.
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
        """x and the parameters that get gradients."""
        return self.x, self.scale_out, self.scale_in, self.shift

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The arguments of :func:`~rlrr_kernels.rescaled_linear`, in its order."""
        return self.x, self.weight, self.scale_out, self.scale_in, self.bias, self.shift

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.arguments, self.dy))


def make_inputs(
    m: int, n: int, k: int, groups: int, dtype: torch.dtype, device: str, seed: int = 0, rank: int = 1
) -> Inputs:
    """Return random inputs, with W scaled as in a trained layer."""
    torch.manual_seed(seed)
    wide: dict[str, Any] = {"dtype": reference.accumulation_dtype(dtype), "device": device}
    narrow: dict[str, Any] = {"dtype": dtype, "device": device}
    inputs = Inputs(
        x=torch.randn(m, k, **narrow),
        weight=torch.randn(n, k, **narrow) * k**-0.5,
        scale_out=torch.randn(n, rank, **wide),
        scale_in=torch.randn(groups, rank, k, **wide) * k**-0.5,
        bias=torch.randn(n, **narrow),
        shift=torch.randn(n, **wide),
        dy=torch.randn(m, n, **narrow),
    )
    for t in inputs.trained:
        t.requires_grad_()
    return inputs


def _detached(i: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in i.arguments)


_Pass = Callable[[Inputs], tuple[Tensor, ...]]
_products: tuple[_Pass, ...] = (
    lambda i: (i.x.detach() @ i.weight.mT,),
    lambda i: (i.dy @ i.weight,),
    lambda i: (i.dy.mT @ i.x.detach(),),
)
_ops: tuple[_Pass, ...] = (
    lambda i: (linear.forward(*_detached(i)),),
    lambda i: (linear.grad_input(i.dy, *_detached(i)[1:4]),),
    lambda i: linear.grad_scales(i.dy, *_detached(i)[:4], True),
)
#: Without autograd: forward, grad_input and grad_scales by the products alone (W as it is), and by the package's ops.
_PASSES = {
    **{results.PRODUCTS: _products, results.BARE_GRAD: _products},
    **{results.THREE_OPS: _ops, results.GRAD_SCALES: _ops},
}
#: Direction -> which of the three it runs.
_OF_DIRECTION = {
    **{"forward": slice(0, 1), "backward": slice(1, 3), "both": slice(0, 3)},
    "grad_scales": slice(2, 3),
}


def _recompute(*arguments: Tensor) -> Tensor:
    return baselines.Recompute.apply(*arguments)


#: Implementation -> the layer as a function of x, W, u, v, b and f.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    results.FORMULA: baselines.formula,
    results.FORMULA_COMPILED: lambda *arguments: baselines.compiled(baselines.formula)(*arguments),
    # without CUDA graphs of its own: the stopwatch captures one itself
    results.FORMULA_MAX: lambda *arguments: baselines.compiled(baselines.formula, "max-autotune-no-cudagraphs")(
        *arguments
    ),
    results.RECOMPUTE: _recompute,
    results.RECOMPUTE_COMPILED: lambda *arguments: baselines.compiled(_recompute)(*arguments),
    results.FACTORED: lambda *arguments: baselines.Factored.apply(*arguments),
    results.PLAIN: lambda x, weight, u, v, bias, shift: F.linear(x, weight, bias),
    **dict.fromkeys((results.OURS, *BACKENDS), rescaled_linear),
}

THROUGH_AUTOGRAD = frozenset((*_FUNCTIONS, results.LORA, *results.HIRAS.values()))


@dataclass(frozen=True)
class Layer:
    """An implementation on its inputs.

    Attributes:
        forward: Returns y ``[M, N]``.
        trained: x and the parameters that get gradients.
        frozen: The other parameters.
    """

    forward: Callable[[], Tensor]
    trained: tuple[Tensor, ...]
    frozen: tuple[Tensor, ...] = field(default=())


def bind(name: str, i: Inputs) -> Layer:
    """Return an implementation that uses autograd, on these inputs.

    Raises:
        Unavailable: For PEFT's layers, as :func:`require_peft`.
    """
    if name == results.LORA or name in results.HIRAS.values():
        return peft_layer(name, i, 8 if name == results.LORA else i.scale_out.shape[1])
    trained = (i.x,) if name == results.PLAIN else i.trained
    return Layer(functools.partial(_FUNCTIONS[name], *i.arguments), trained, (i.weight, i.bias))


def require_peft() -> Any:
    """Return the module PEFT.

    Raises:
        Unavailable: If it is not installed, or too old to have HiRA.
    """
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"peft cannot be imported: {error}") from error
    if not hasattr(peft, "HiraConfig"):
        raise Unavailable(f"peft {peft.__version__} has no HiRA")
    return peft


def peft_layer(name: str, i: Inputs, rank: int) -> Layer:
    """Return PEFT's own LoRA or HiRA on a frozen ``nn.Linear``, with adapters in x's dtype, which is fastest."""
    peft = require_peft()
    linear = nn.Linear(i.x.shape[1], i.dy.shape[1], device="meta")
    linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (i.weight, i.bias))
    kind = peft.LoraConfig if name == results.LORA else peft.HiraConfig
    model: Any = peft.inject_adapter_in_model(kind(r=rank, target_modules=["0"]), nn.Sequential(linear))
    adapters = tuple(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in adapters:  # the second factor starts as zeros
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
    """Return what is timed of an implementation on these inputs; its result is a tuple.

    Raises:
        Unavailable: As :func:`bind`.
    """
    if name in _PASSES:
        passes = _PASSES[name][_OF_DIRECTION[direction]]
        return Call(lambda: tuple(t for one in passes for t in one(i)))
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


def names(direction: str, device: str, searched: bool = False, rank: int = 1) -> list[str]:
    """Return the implementations of a direction on ``"cpu"`` or ``"cuda"``; ``searched`` adds ``max-autotune``."""
    if direction == "grad_scales":
        return [results.GRAD_SCALES, results.BARE_GRAD]
    left_out = {results.CPU} if device == "cuda" else {results.GLUON, results.TRITON, results.CUDA, results.CUDA_HOPPER}
    if not searched or device == "cpu":
        left_out.add(results.FORMULA_MAX)
    if direction not in _OF_DIRECTION:
        left_out |= _PASSES.keys()
    return [n for n in results.LAYER_IMPLEMENTATIONS if n not in left_out and results.of_rank(n, rank)]


@contextlib.contextmanager
def _hopper() -> Iterator[None]:
    # RLRR_CUDA_HOPPER sets this switch at import
    from rlrr_kernels.backends import cuda

    before, cuda.HOPPER = cuda.HOPPER, True
    try:
        with use_backend("cuda"):
            yield
    finally:
        cuda.HOPPER = before


def context(name: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context that an implementation runs in, with the backend that it asks for."""
    if name == results.CUDA_HOPPER:
        return _hopper
    return functools.partial(use_backend, BACKENDS[name]) if name in BACKENDS else nullcontext


def served_by(name: str, x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Return the backend behind one of ours at a rank, and None for the others.

    Raises:
        Unavailable: If the backend that it asks for cannot serve these tensors.
        Rejected: If that backend has failed its check on this device.
    """
    if name == results.CUDA_HOPPER and torch.cuda.get_device_capability(x.device)[0] != 9:
        raise Unavailable(f"{torch.cuda.get_device_name(x.device)}: the path is for compute capability 9.x")
    if name in BACKENDS:
        why = choice.refusal(BACKENDS[name], x, weight, rank)
        if why is not None:
            raise Unavailable(f"backend {BACKENDS[name]!r} cannot serve {why}")
        why = verdicts.failure(CHECKED[name], x.device) if name in CHECKED else None
        if why is not None:
            raise Rejected(f"check: {why}")
        return BACKENDS[name]
    if name not in (results.OURS, results.OURS_COMPILED, results.THREE_OPS, results.GRAD_SCALES):
        return None
    return backend_for(x, weight, rank=rank)
