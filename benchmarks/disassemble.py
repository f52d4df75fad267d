"""Compile what the launcher would launch, for a GPU that is not here, and report on the machine code.

As a script (``python -m benchmarks.disassemble``) it reads one JSON request from standard input and prints one JSON
line for each kernel. It runs in a process of its own, as kernels must not be imported for the interpreter there, and a
compiler that aborts must not end the caller.

It calls the launcher itself, on tensors without memory, and Triton's own binder specialises the arguments (strides of
1, sizes of 1, multiples of 16) as in a launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class CompilerEnded(AssertionError):
    """The compiler ended its process. ``reports``: the kernels that were finished before."""

    def __init__(self, reports: list[dict[str, Any]], last_words: str) -> None:
        super().__init__(f"after {len(reports)} kernels the compiler ended: {last_words[-3000:]}")
        self.reports = reports


#: The first line of an answer: everything is imported, and later failures are the compiler's.
READY = "ready"


def probe(request: dict[str, Any], python: str = sys.executable) -> list[dict[str, Any]]:
    """Compile in a process of its own.

    Args:
        request: ``{"device": fields of Device, "cases": [as_case(...), ...]}``.
        python: The interpreter; another one has another Triton.

    Returns:
        The reports; each names its case by ``index``, and a case can have several kernels.

    Raises:
        CompilerEnded: If the process ends before the last case.
        RuntimeError: If it does not start.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [python, "-m", "benchmarks.disassemble"],
        input=json.dumps(request),
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    ready, *results = [json.loads(line) for line in done.stdout.splitlines()] or [None]
    if ready != READY:
        raise RuntimeError(f"the process that compiles did not start: {done.stderr[-3000:]}")
    if done.returncode:
        raise CompilerEnded(results, done.stderr)
    return results


class NoGPU:
    """The part of Triton's driver that compiling uses: a target without a device."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Replaces a kernel: ``kernel[grid](...)`` specialises and compiles, and launches nothing."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)
        return lambda *args, **kwargs: self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))


@contextlib.contextmanager
def without_gpu(device: Any, compiled: list[Any]) -> Iterator[None]:
    """Make the launchers take tensors without data as tensors of a GPU ``device``, and only compile.

    Args:
        device: A ``choose.Device``.
        compiled: Gets what each launch compiled. Triton's cache on disk is filled as by a launch on such a GPU.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from rlrr_kernels.backends.triton import launch, norm
    from rlrr_kernels.backends.triton.gluon import launch as gluon

    major, minor = device.capability
    driver.set_active(NoGPU(10 * major + minor))
    with contextlib.ExitStack() as stack:
        for module in (launch, norm, gluon):
            for name, kernel in vars(module).copy().items():
                if isinstance(kernel, JITFunction) and name.endswith("_kernel"):  # not the functions that kernels call
                    stack.enter_context(mock.patch.object(module, name, CompileOnly(kernel, compiled)))
        for name, value in (("interpreting", False), ("device_of", device), ("guard", contextlib.nullcontext())):
            stack.enter_context(mock.patch.object(launch, name, lambda *_, value=value: value))
        yield


@functools.cache
def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], check=True, capture_output=True, text=True).stdout


def inspect(compiled: Any, disassemble: bool, sass: bool = False) -> dict[str, Any]:
    """Return registers, stack, shared and tensor memory of a compiled kernel.

    Args:
        compiled: The kernel.
        disassemble: Add the product's loop, and the number of instructions outside of it.
        sass: Add the machine code if the kernel has ``wgmma`` products, which is what is looked for in it.
    """
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", cubin))
    assert usage
    report: dict[str, Any] = {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": compiled.metadata.shared,
        # of Blackwell; a kernel that asks for more than the 512 columns there are is compiled to an endless loop
        "tensor_memory": compiled.metadata.tmem_size,
    }
    if disassemble:
        loop, total = product_loop(_tool("nvdisasm", "-c", cubin))
        report |= {"loop": loop, "outside": total - len(loop)}
    if sass and "wgmma" in compiled.asm["ptx"]:
        report["sass"] = _tool("nvdisasm", "-c", cubin)
    return report


def product_loop(sass: str) -> tuple[list[str], int]:
    """Return the instructions of the innermost loop that multiplies tiles, and the number of all instructions."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops = []
    for end, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append(instructions[labels[branch[1]] : end + 1])
    count = sum(not i.startswith(("NOP", "BRA `(.L_x")) for i in instructions)
    with_tensor = [body for body in loops if any("MMA" in i for i in body)]
    if with_tensor:
        return min(with_tensor, key=len), count
    # without tensor cores: the loop with most multiply-adds, and of equal ones the innermost
    return max(loops, key=lambda body: (sum("FFMA" in i for i in body), -len(body)), default=[]), count


def launch_without_data(problem: Any, candidate: Any) -> None:
    """Launch a candidate of ``rlrr-tune`` for a problem, on tensors without data."""
    import torch

    from rlrr_kernels.tune.candidates import Tensors, run

    _, m, n, k, groups, dtype, weight_dtype, _, rank = problem

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dy = empty(m, k, dtype=dtype), empty(n, k, dtype=weight_dtype), empty(m, n, dtype=dtype)
    run(problem, Tensors(x, weight, dy, empty(n, rank), empty(groups, rank, k), empty(n), empty(n)), candidate)


def main() -> None:
    """Answer the request on standard input."""
    import torch

    from rlrr_kernels.backends.problem import Problem
    from rlrr_kernels.backends.triton import choose, norm
    from rlrr_kernels.backends.triton.gluon.launch import Width
    from rlrr_kernels.tune.candidates import Candidate

    request = json.load(sys.stdin)
    device = choose.Device(**request["device"] | {"capability": tuple(request["device"]["capability"])})
    compiled: list[Any] = []
    with without_gpu(device, compiled):
        print(json.dumps(READY), flush=True)
        for index, case in enumerate(request["cases"]):
            del compiled[:]
            torch.backends.cuda.matmul.allow_tf32 = case["kind"] == "tf32"
            dtype, weight_dtype = (getattr(torch, case[key]) for key in ("dtype", "weight_dtype"))
            if case["kernel"] == "layer_norm":
                x = torch.empty(case["m"], case["k"], dtype=dtype, device="meta")
                weight, scale = (torch.empty(case["k"], dtype=t, device="meta") for t in (weight_dtype, torch.float32))
                mean, rstd = torch.empty(2, case["m"], 1, device="meta")
                norm.layer_norm(x, weight, weight, scale, scale, 1e-6, dtype)
                norm.layer_norm_backward(x, x, mean, rstd, weight, weight, scale, True)
            else:
                backend = case.get("backend", "triton")
                tile = (Width if backend == "gluon" else choose.Choice)(**case["choice"]) if "choice" in case else None
                sizes = case["m"], case["n"], case["k"], case["groups"]
                problem = Problem(case["kernel"], *sizes, dtype, weight_dtype, rank=case.get("rank", 1))
                launch_without_data(problem, Candidate(backend, tile))
            for result in compiled:
                report = inspect(result, case.get("disassemble", False), case.get("sass", False))
                report |= {"case": case, "index": index, "name": result.metadata.name}
                print(json.dumps(report), flush=True)


def as_case(kernel: str, kind: str, choice: Any = None, **rest: Any) -> dict[str, Any]:
    """Return a request's case with a ``Choice`` as a dict; without a choice the launcher chooses."""
    chosen = {} if choice is None else {"choice": dataclasses.asdict(choice)}
    return {"kernel": kernel, "kind": kind, **chosen, **rest}


if __name__ == "__main__":
    main()
