"""What is computed to check a backend, and the judgement: each pass runs twice at each shape.

The shapes are ViT-B's four linears at a batch of images; sizes that no tile divides, in several groups; one token; and
few tokens at a deep layer, whose sums GPUs split; and rank 8. On a GPU each shape and dtype compiles at most one Triton
kernel, and the four layers mostly share theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrr_kernels.backends import choice
from rlrr_kernels.check import yardstick
from rlrr_kernels.check.yardstick import Expected

#: Tokens of the ViT-B layers: 32 images on a GPU, so that four processes at once fit in 8 GB; 2 on a CPU, where the
#: exact results in float64 take most of the time.
TOKENS = {"cuda": 32 * 197, "cpu": 2 * 197}
#: The rank of some cases; the others have rank 1.
RANK = 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EPS = 1e-6
#: RuntimeErrors of cuBLAS, the driver (by torch or Triton) and torch on a CPU that mean that there is no memory.
_NO_ROOM = re.compile("CUBLAS_STATUS_ALLOC_FAILED|out of memory|can't allocate memory")


@dataclass(frozen=True)
class Case:
    """One set of sizes.

    Attributes:
        m, n, k, groups: x is ``[m, k]``, W ``[n, k]``; for LayerNorm there is only x.
        dtype: The dtype of x.
        weight_dtype: The dtype of W, if it is another.
        rank: Rank of u v.
    """

    m: int
    n: int
    k: int
    groups: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    rank: int = 1

    def __str__(self) -> str:
        sizes = f"M {self.m}, N {self.n}, K {self.k}" + (f", groups {self.groups}" if self.groups > 1 else "")
        sizes += f", rank {self.rank}" if self.rank > 1 else ""
        mixed = f" with W in {_short(self.weight_dtype)}" if self.weight_dtype else ""
        return f"{_short(self.dtype)}{mixed}, {sizes}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def module_of(subject: str, device: torch.device) -> ModuleType | str:
    """Return the backend of one of :data:`rlrr_kernels.backends.verdicts.SUBJECTS`, or why it is not here."""
    if subject != "cuda-hopper":
        return choice.load(subject)
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "it is for compute capability 9.x"
    library = choice.load("cuda")
    if not isinstance(library, str) and "90a" not in library.build():  # its plain kernels would serve
        return f"it is not built: the library has no 90a ({library.build()})"
    return library


def cases(which: str, device_type: str) -> Iterator[Case]:
    """Yield the cases of a pass, the quick ones first."""
    tokens = TOKENS[device_type]
    small = [(37, 51, 45, 3), (1, 768, 768, 1), (64, 768, 3072, 1)]
    layers = [(tokens, 768, 768, 1), (tokens, 2304, 768, 3), (tokens, 3072, 768, 1), (tokens, 768, 3072, 1)]
    if which == "layer_norm":  # its rows are the inputs of the layers
        small, layers = [(37, 0, 45, 1), (1, 0, 768, 1)], [(tokens, 0, 768, 1)]
    for dtype in _DTYPES:
        yield from (Case(*sizes, dtype) for sizes in (*small, *layers))
        if dtype.itemsize == 2:  # as under autocast
            yield Case(*layers[0], dtype, torch.float32)
        if which != "layer_norm":
            yield from (Case(*sizes, dtype, rank=RANK) for sizes in (small[0], layers[1]))


@dataclass
class Report:
    """The result of a pass's cases.

    Attributes:
        tried: How many cases the backend serves.
        ratio: The largest error divided by the allowed error.
        worst: The case that has it.
        reason: What is wrong, or None; no case is tried after it.
        refusal: Why the last case that the backend does not serve is not served.
    """

    tried: int = 0
    ratio: float = 0.0
    worst: Case | None = None
    reason: str | None = None
    refusal: str | None = None


def run(
    module: ModuleType,
    which: str,
    device: torch.device,
    chosen: Iterable[Case],
    tell: Callable[[str, Case], object] = lambda stage, case: None,
) -> Report:
    """Compute a pass twice for each case that the backend serves, and judge it.

    Args:
        module: A backend (see :mod:`rlrr_kernels.backends.choice`).
        which: A pass of :data:`rlrr_kernels.backends.verdicts.SUBJECTS`.
        device: Where it runs.
        chosen: The cases.
        tell: Called with ``"launched"`` when a case's kernels are compiled and launched, while a GPU may still run
            them, and with ``"done"`` when the case has been judged.

    Returns:
        The report; an error that the pass raises is its reason.

    Raises:
        torch.OutOfMemoryError: If there is not enough memory now.
    """
    prepare = _layer_norm if which == "layer_norm" else _product
    report = Report()
    for case in chosen:
        try:
            compute, wanted, refusal = prepare(module, which, case, device)
            if refusal is not None:
                report.refusal = refusal
                continue
            got = compute()
            tell("launched", case)
            again = compute()
            ratio, wrong = yardstick.judge(got, wanted())
            wrong = wrong or _difference(got, again)
            tell("done", case)
        except Exception as error:  # any error of a kernel is a finding; a GPU may do nothing after it
            if isinstance(error, torch.OutOfMemoryError) or _NO_ROOM.search(str(error)):
                raise torch.OutOfMemoryError(str(error)) from error
            ratio, wrong = math.inf, f"{type(error).__name__}: {error}"
        report.tried += 1
        if report.worst is None or ratio > report.ratio:
            report.ratio, report.worst = ratio, case
        if wrong is not None:
            report.reason = f"{case}: {wrong}"
            break
    return report


_Prepared = tuple[Callable[[], Sequence[Tensor]], Callable[[], list[Expected]], str | None]


def _difference(got: Sequence[Tensor], again: Sequence[Tensor]) -> str | None:
    for one, other in zip(got, again, strict=True):
        if not torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
            return "a second run gave other bits"
    return None


def _draws(case: Case, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(7919 * case.m + 104729 * case.n + 1299709 * case.k)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, generator=generator, device=device, dtype=wide).to(dtype)

    return draw


def _product(module: ModuleType, which: str, case: Case, device: torch.device) -> _Prepared:
    draw, wide = _draws(case, device), torch.promote_types(case.dtype, torch.float32)
    weight_dtype = case.weight_dtype or case.dtype
    x, dy = draw(case.m, case.k, dtype=case.dtype), draw(case.m, case.n, dtype=case.dtype)
    weight = draw(case.n, case.k, dtype=weight_dtype) * case.k**-0.5
    # u v has the same variance at each rank
    u = draw(case.n, case.rank, dtype=wide) * case.rank**-0.5
    v = 0.5 * draw(case.groups, case.rank, case.k, dtype=wide)
    bias, shift = draw(case.n, dtype=weight_dtype), draw(case.n, dtype=wide)

    def compute() -> Sequence[Tensor]:
        if which == "forward":
            return (module.forward(x, weight, u, v, bias, shift),)
        if which == "grad_input":
            return (module.grad_input(dy, weight, u, v),)
        # df also has a pass of its own, for layers of which neither u nor v trains
        return (*module.grad_scales(dy, x, weight, u, v, True), module.grad_shift(dy))

    def wanted() -> list[Expected]:
        found = yardstick.expected(which, x, weight, u, v, bias, shift, dy)
        return [*found, found[-1]._replace(name="df alone")] if which == "grad_scales" else found

    return compute, wanted, module.unsupported(x, weight, case.rank)


def _layer_norm(module: ModuleType, which: str, case: Case, device: torch.device) -> _Prepared:
    draw, wide = _draws(case, device), torch.promote_types(case.dtype, torch.float32)
    # a large mean shows a variance that is computed as a difference of large numbers
    x, dy = draw(case.m, case.k, dtype=case.dtype) + 8, draw(case.m, case.k, dtype=case.dtype)
    weight, bias = (draw(case.k, dtype=case.weight_dtype or case.dtype) for _ in range(2))
    scale, shift = (draw(case.k, dtype=wide) for _ in range(2))

    def compute() -> Sequence[Tensor]:
        y, mean, rstd = module.layer_norm(x, weight, bias, scale, shift, _EPS, x.dtype)
        return y, *module.layer_norm_backward(dy, x, mean, rstd, weight, bias, scale, True)

    def formula(dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, ...]:
        """Return y, dx, ds, dt as SSF defines them, by autograd."""
        rows, s, t = x.to(dtype).requires_grad_(), scale.to(wide).requires_grad_(), shift.to(wide).requires_grad_()
        normalised = F.layer_norm(rows, rows.shape[-1:], weight.to(dtype), bias.to(dtype), _EPS)
        y = (normalised * s + t).to(dtype)
        return y.detach(), *torch.autograd.grad(y, (rows, s, t), dy.to(dtype))

    def wanted() -> list[Expected]:
        exact = formula(torch.float64, torch.float64)
        narrow, sums = formula(case.dtype, wide)[:2], formula(wide, wide)[2:]
        names = ("y", "dx", "ds", "dt")
        return [Expected(*one) for one in zip(names, exact, (*narrow, *sums), strict=True)]

    return compute, wanted, module.unsupported_layer_norm(x)
