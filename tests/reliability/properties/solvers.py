"""Every backend behind one call: inputs in, what a user would get out."""

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
from tests.reliability.properties.cases import NAMES, Case, Inputs
from tests.reliability.properties.strategies import Domain

#: y and the gradients of whatever needs one, by name: dx, dweight, dscale_out, ...
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
    #: whether layout changes no bit; where it does, sums run in another order
    same_bits: Callable[[Case], bool]


def through_autograd(name: str) -> Callable[[Case, Inputs], Results]:
    """As users call it."""

    def solve(case: Case, inputs: Inputs) -> Results:
        tensors = [None if t is None else t.detach() for t in inputs.args()]
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
    """A machine that knows canonical problems, as ``csrc/cuda/register.cpp`` hands them to the kernels."""

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
    """Pass by pass: what this path does not take goes to the base kernels, as in the library."""
    results: dict[str, Tensor] = {}
    for name, keys in zip(PASSES, (("y",), ("dx",), ("du", "dv", "df")), strict=True):
        try:
            answer = hopper_machine().solve(p, 3, passes=(name,))
        except Unsupported:
            answer = base_machine().solve(p, SMALL, passes=(name,))
        else:
            taken[name] += 1
        results |= {key: getattr(answer, key) for key in keys}
    return results


#: How many passes the Hopper kernels took.
taken = dict.fromkeys(PASSES, 0)


def own_instructions() -> str:
    """What ``csrc/cpu`` uses here, as ``RLRR_CPU_CAPABILITY`` names it."""
    from rlrr_kernels.backends import cpu

    return cpu.build().rpartition(" ")[2]


def own_cpu_kernels(case: Case) -> bool:
    """Whether no BLAS decides the order of sums: the kernels in ``csrc/cpu/packed``."""
    # plain PyTorch serves what is empty
    return (
        own_instructions() != "baseline" and case.dtypes[0] in ("float32", "bfloat16") and case.m * case.n * case.k > 0
    )


def never(case: Case) -> bool:
    return False


def always(case: Case) -> bool:
    return True


def backend(name: str) -> Backend:
    """A backend by name: those of ``use_backend``, and ``cuda_host``, ``cuda_host_large`` and ``hopper_host``."""
    both = (("float64", "float64"),)
    if name in ("reference", "panels"):
        return Backend(name, "cpu", Domain((*PAIRS, *both), 160, True, ALSO), through_autograd(name), never)
    if name == "cpu":
        pairs = tuple(p for p in (*PAIRS, *both) if "float16" not in p)
        return Backend(name, "cpu", Domain(pairs, 320, True, ALSO), through_autograd(name), own_cpu_kernels)
    if name == "triton":
        # the interpreter takes a second for what a GPU does in microseconds
        most = 300 if device_of(name) == "cuda" else 66
        return Backend(name, device_of(name), Domain(PAIRS, most, True, ALSO, groups=4), through_autograd(name), never)
    if name == "cuda":
        return Backend(name, "cuda", Domain(PAIRS, 320, True, ALSO), through_autograd(name), always)
    if name == "hopper_host":
        pairs = tuple(p for p in PAIRS if p[0] != "float32" and p[0] == p[1])
        also = tuple(a for a in ALSO if a != "layouts")
        solve = _of_problem(_hopper_passes)
        return Backend(name, "cpu", Domain(pairs, 136, False, also, multiple=8, groups=4, strided=False), solve, always)
    multiprocessors = {"cuda_host": SMALL, "cuda_host_large": LARGE}[name]
    solve = _of_problem(lambda p: vars(base_machine().solve(p, multiprocessors)))
    return Backend(name, "cpu", Domain(PAIRS, 140, False, ALSO), solve, always)


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
