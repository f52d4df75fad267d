"""Every backend behind one call: inputs in, the results of a user out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrr_kernels import rescaled_linear, use_backend
from rlrr_kernels.backends import choice
from tests.cuda_host.machine import LARGE, PASSES, SMALL, HopperMachine, Machine, Unsupported, build, build_hopper
from tests.oracle import Problem, device_of
from tests.reliability.properties.cases import NAMES, Case, Domain, Inputs

#: y and the gradients of what needs one, by name: dx, dweight, dscale_out, ...
Results = dict[str, Tensor]

NARROW = ("float16", "bfloat16", "float32")
PAIRS = tuple((x, w) for x in NARROW for w in NARROW)
ALSO = ("", "layouts", "powers of two", "two runs", "u du", "other rows")


@dataclass(frozen=True)
class Backend:
    """A backend as the properties see it."""

    name: str
    device: str
    domain: Domain
    solve: Callable[[Case, Inputs], Results]
    #: whether layouts change no bit of a case; where they do, sums run in another order
    same_bits: Callable[[Case], bool]


def through_autograd(name: str) -> Callable[[Case, Inputs], Results]:
    """As users call it."""

    def solve(case: Case, inputs: Inputs) -> Results:
        tensors = [None if t is None else t.detach() for t in inputs.forward_args]
        needed = [n for n, t, need in zip(NAMES, tensors, case.needs, strict=True) if t is not None and need]
        for given_name, t in zip(NAMES, tensors, strict=True):
            if given_name in needed:
                assert t is not None
                t.requires_grad_()
        with use_backend(name):
            y = rescaled_linear(*tensors)  # type: ignore[arg-type]
            assert y.requires_grad == bool(needed)
            leaves = [t for t in tensors if t is not None and t.requires_grad]
            grads = torch.autograd.grad(y, leaves, inputs.dy) if needed else ()
        return {"y": y.detach()} | {f"d{n}": g for n, g in zip(needed, grads, strict=True)}

    return solve


def _of_problem(solve: Callable[[Problem], dict[str, Tensor]]) -> Callable[[Case, Inputs], Results]:
    """A host model of a GPU, which takes canonical problems as ``csrc/cuda/register.cpp`` gives them to the kernels."""

    def run(case: Case, inputs: Inputs) -> Results:
        p = inputs.problem()
        p.scale_out, p.scale_in = p.scale_out.float().contiguous(), p.scale_in.float().contiguous()
        for name in ("bias", "shift"):
            t = getattr(p, name)
            if t is not None:
                setattr(p, name, (t.float() if t.dtype is torch.float64 else t).contiguous())
        got = solve(p)
        results = {"y": got["y"].view(inputs.dy.shape), "dx": got["dx"].view(inputs.x.shape)}
        results["dscale_out"] = got["du"].view(inputs.scale_out.shape).to(inputs.scale_out.dtype)
        results["dscale_in"] = got["dv"].view(inputs.scale_in.shape).to(inputs.scale_in.dtype)
        for name in ("bias", "shift"):
            t = getattr(inputs, name)
            if t is not None:
                results[f"d{name}"] = got["df"].to(t.dtype)
        return results

    return run


@functools.cache
def base_machine() -> Machine:
    return Machine(build())


@functools.cache
def hopper_machine() -> HopperMachine:
    return HopperMachine(build_hopper())


def _hopper_passes(p: Problem) -> dict[str, Tensor]:
    """Each pass that the Hopper kernels do not take goes to the base kernels, as in the library."""
    results: dict[str, Tensor] = {}
    for name, keys in zip(PASSES, (("y",), ("dx",), ("du", "dv", "df")), strict=True):
        try:
            answer = hopper_machine().solve(p, 3, passes=(name,))
        except Unsupported:
            answer = base_machine().solve(p, SMALL, passes=(name,))
        results |= {key: getattr(answer, key) for key in keys}
    return results


def own_instructions() -> str:
    """The instruction set that ``csrc/cpu`` uses here, as ``RLRR_CPU_CAPABILITY`` names it."""
    from rlrr_kernels.backends import cpu

    return cpu.build().rpartition(" ")[2]


def own_cpu_kernels(case: Case) -> bool:
    """Whether the kernels in ``csrc/cpu/packed`` serve a case, so that no BLAS decides the order of sums."""
    # plain PyTorch serves empty tensors
    return (
        own_instructions() != "baseline" and case.dtypes[0] in ("float32", "bfloat16") and case.m * case.n * case.k > 0
    )


def backend(name: str) -> Backend:
    """A backend by name: those of ``use_backend``, and ``cuda_host``, ``cuda_host_large`` and ``hopper_host``."""
    both = (("float64", "float64"),)
    ranks = ranks_of(name)
    never, always = (lambda case: False), (lambda case: True)
    if name in ("reference", "panels"):
        return Backend(
            name, "cpu", Domain((*PAIRS, *both), 160, True, ALSO, ranks=ranks), through_autograd(name), never
        )
    if name == "cpu":
        pairs = tuple(p for p in (*PAIRS, *both) if "float16" not in p)
        return Backend(
            name, "cpu", Domain(pairs, 320, True, ALSO, ranks=ranks), through_autograd(name), own_cpu_kernels
        )
    if name == "triton":
        # the interpreter is slow
        most = 300 if device_of(name) == "cuda" else 66
        return Backend(
            name, device_of(name), Domain(PAIRS, most, True, ALSO, groups=4, ranks=ranks), through_autograd(name), never
        )
    if name == "cuda":
        return Backend(name, "cuda", Domain(PAIRS, 320, True, ALSO, ranks=ranks), through_autograd(name), always)
    if name == "hopper_host":
        pairs = tuple(p for p in PAIRS if p[0] != "float32" and p[0] == p[1])
        also = tuple(a for a in ALSO if a != "layouts")
        solve = _of_problem(_hopper_passes)
        return Backend(name, "cpu", Domain(pairs, 136, False, also, multiple=8, groups=4, strided=False), solve, always)
    multiprocessors = {"cuda_host": SMALL, "cuda_host_large": LARGE}[name]
    solve = _of_problem(lambda p: vars(base_machine().solve(p, multiprocessors)))
    return Backend(name, "cpu", Domain(PAIRS, 140, False, ALSO), solve, always)


def ranks_of(name: str) -> tuple[int, ...]:
    """The ranks to draw from: 1 most often, and others that the backend serves. The models of GPUs have rank 1."""
    if name.endswith(("host", "host_large")):
        return (1,)
    x = torch.empty(1, 1, device=device_of(name))
    return (1, 1, 1, 1, *(rank for rank in (2, 3, 8, 17) if choice.refusal(name, x, x, rank) is None))


def missing(name: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if name.endswith(("host", "host_large")):
        from tests.cuda_host.machine import compiler

        return None if compiler() else "needs a C++ compiler"
    device = device_of(name)
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    x = torch.empty(1, 1, device=device)
    return choice.refusal(name, x, x)
