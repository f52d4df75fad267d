"""Compile what the launcher would launch, for a GPU that is not here, and report on the machine code.

Run as a script (``python -m benchmarks.disassemble``) it reads one JSON request on
standard input and prints one JSON line for each kernel compiled. It is a process of
its own because kernels must not be imported for the interpreter here, and because a
compiler that aborts must fail one request, not the caller.

The launcher itself is called, on tensors without memory, and Triton's own binder
specialises the arguments (strides of 1, sizes of 1, multiples of 16) as at a launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    """The compiler took its process with it. ``reports``: what it had finished before."""

    def __init__(self, reports: list[dict[str, Any]], last_words: str) -> None:
        super().__init__(f"after {len(reports)} kernels the compiler ended: {last_words[-3000:]}")
        self.reports = reports


#: The first line of an answer: everything is imported, and what fails from here on is the compiler.
READY = "ready"


def probe(request: dict[str, Any], python: str = sys.executable) -> list[dict[str, Any]]:
    """Answer in a process of its own, by the interpreter ``python``: another one brings another Triton.

    A request is ``{"device": fields of Device, "cases": [as_case(...), ...]}``; a report names its case by
    ``index``, and a case can have several kernels. Raises :class:`CompilerEnded` where the process does
    not live to the last case, RuntimeError where it cannot even begin.
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
    """The part of Triton's driver that compiling asks for: a target, and no device behind it."""

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
    """Stands for a kernel: ``kernel[grid](...)`` specialises and compiles, and launches nothing."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)
        return lambda *args, **kwargs: self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))


@contextlib.contextmanager
def without_gpu(device: Any, compiled: list[Any]) -> Iterator[None]:
    """The launchers take tensors without data as those of a GPU ``device`` (a ``choose.Device``), and only compile.

    ``compiled`` gets what each launch compiled. Triton's cache on disk is filled as by a launch on such a GPU.
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
                if isinstance(kernel, JITFunction) and name.endswith("_kernel"):  # not what kernels call
                    stack.enter_context(mock.patch.object(module, name, CompileOnly(kernel, compiled)))
        for name, value in (("interpreting", False), ("device_of", device), ("guard", contextlib.nullcontext())):
            stack.enter_context(mock.patch.object(launch, name, lambda *_, value=value: value))
        yield


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def inspect(compiled: Any, disassemble: bool, sass: bool = False) -> dict[str, Any]:
    """Registers, stack and shared memory.

    ``disassemble``: also the product's loop, and how much code there is besides. ``sass``: also the machine code.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", file.name))
        assert usage
        report: dict[str, Any] = {
            "registers": int(usage[1]),
            "stack": int(usage[2]),
            "shared": compiled.metadata.shared,
        }
        if disassemble or sass:
            text = _tool("nvdisasm", "-c", file.name)
        if disassemble:
            loop, total = product_loop(text)
            report |= {"loop": loop, "outside": total - len(loop)}
        if sass:
            report["sass"] = text
    return report


def product_loop(sass: str) -> tuple[list[str], int]:
    """Instructions of the innermost loop that multiplies tiles, and the number of all instructions."""
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
    # without tensor cores: the densest in multiply-adds, the innermost of those that tie
    return max(loops, key=lambda body: (sum("FFMA" in i for i in body), -len(body)), default=[]), count


def main() -> None:
    import torch

    from rlrr_kernels.backends.triton import choose, launch, norm
    from rlrr_kernels.backends.triton.gluon import launch as gluon

    request = json.load(sys.stdin)
    device = choose.Device(**request["device"] | {"capability": tuple(request["device"]["capability"])})
    compiled: list[Any] = []
    with without_gpu(device, compiled):
        print(json.dumps(READY), flush=True)
        for index, case in enumerate(request["cases"]):
            del compiled[:]
            arguments = dict(case)
            torch.backends.cuda.matmul.allow_tf32 = arguments.pop("kind") == "tf32"
            dtype, weight_dtype = (getattr(torch, arguments.pop(key)) for key in ("dtype", "weight_dtype"))
            m, n, k, groups = (arguments.pop(key) for key in ("m", "n", "k", "groups"))
            wanted = arguments.pop("disassemble", False), arguments.pop("sass", False)
            kernel = arguments.pop("kernel")
            plain = arguments.pop("backend", "triton") == "triton"
            backend, tile = (launch, choose.Choice) if plain else (gluon, gluon.Width)
            if "choice" in arguments:
                arguments["choice"] = tile(**arguments["choice"])
            x, dy, weight, u, v, offset = (
                torch.empty(shape, dtype=t, device="meta")
                for shape, t in (
                    ((m, k), dtype),
                    ((m, n), dtype),
                    ((n, k), weight_dtype),
                    ((n, 1), torch.float32),
                    ((groups, 1, k), torch.float32),
                    ((n,), torch.float32),
                )
            )
            if kernel == "forward":
                backend.forward(x, weight, u, v, offset, offset, **arguments)
            elif kernel == "grad_input":
                backend.grad_input(dy, weight, u, v, **arguments)
            elif kernel == "layer_norm":  # over K, forward and backward
                own, (mean, rstd) = weight[0], torch.empty(2, m, 1, dtype=torch.float32, device="meta")
                norm.layer_norm(x, own, own, v[0, 0], v[0, 0], 1e-6, x.dtype)
                norm.layer_norm_backward(x, x, mean, rstd, own, own, v[0, 0], True)
            else:
                backend.grad_scales(dy, x, weight, u, v, True, **arguments)
            for result in compiled:
                report = inspect(result, *wanted) | {"case": case, "index": index, "name": result.metadata.name}
                print(json.dumps(report), flush=True)


def as_case(kernel: str, kind: str, choice: Any = None, **rest: Any) -> dict[str, Any]:
    """A request's case, with a ``Choice`` spelled out; without one the launcher chooses."""
    chosen = {} if choice is None else {"choice": dataclasses.asdict(choice)}
    return {"kernel": kernel, "kind": kind, **chosen, **rest}


if __name__ == "__main__":
    main()
