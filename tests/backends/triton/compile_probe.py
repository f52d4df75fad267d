"""Compile what the launcher would launch, for a GPU that is not here, and report on the machine code.

Run as a script (``python -m tests.backends.triton.compile_probe``) it reads one JSON
request on standard input and prints one JSON line for each configuration. It is a
process of its own because kernels must not be imported for the interpreter here, and
because a compiler that aborts must fail a test, not end the test run.

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
from pathlib import Path
from typing import Any
from unittest import mock


def probe(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer in a process of its own; an abort of the compiler is an error with its last words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.triton.compile_probe"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        raise AssertionError(f"after {len(results)} configurations the compiler ended: {done.stderr[-3000:]}")
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


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def inspect(compiled: Any, disassemble: bool) -> dict[str, Any]:
    """Registers, stack and shared memory; on request the instructions of the product's loop."""
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
        if disassemble:
            report["loop"] = product_loop(_tool("nvdisasm", "-c", file.name))
    return report


def product_loop(sass: str) -> list[str]:
    """Instructions of the innermost loop with a tensor-core instruction in it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if branch and labels.get(branch[1], end + 1) <= end:
            body = instructions[labels[branch[1]] : end + 1]
            if any("MMA" in i for i in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def main() -> None:
    import torch
    from triton.runtime.driver import driver

    from rlrr_kernels.backends.triton import config as configs
    from rlrr_kernels.backends.triton import launch, layer_norm

    request = json.load(sys.stdin)
    device = configs.Device(**request["device"] | {"capability": tuple(request["device"]["capability"])})
    major, minor = device.capability
    driver.set_active(NoGPU(10 * major + minor))
    compiled: list[Any] = []
    kernels = [
        *((launch, name) for name in ("forward_kernel", "grad_input_kernel", "grad_scales_kernel")),
        *((layer_norm, name) for name in ("forward_kernel", "backward_kernel")),
        *((module, "sum_partials_kernel") for module in (launch, layer_norm)),
    ]
    with contextlib.ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(mock.patch.object(module, name, CompileOnly(getattr(module, name), compiled)))
        for name, value in (("interpreting", False), ("_device", device), ("_guard", contextlib.nullcontext())):
            stack.enter_context(mock.patch.object(launch, name, lambda *_, value=value: value))
        for case in request["cases"]:
            del compiled[:]
            arguments = dict(case)
            torch.backends.cuda.matmul.allow_tf32 = arguments.pop("kind") == "tf32"
            dtype, weight_dtype = (getattr(torch, arguments.pop(key)) for key in ("dtype", "weight_dtype"))
            m, n, k, groups = (arguments.pop(key) for key in ("m", "n", "k", "groups"))
            disassemble = arguments.pop("disassemble", False)
            kernel = arguments.pop("kernel")
            if "config" in arguments:
                arguments["config"] = configs.Config(**arguments["config"])
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
                launch.forward(x, weight, u, v, offset, offset, **arguments)
            elif kernel == "grad_input":
                launch.grad_input(dy, weight, u, v, **arguments)
            elif kernel == "layer_norm":  # over K, forward and backward
                own, (mean, rstd) = weight[0], torch.empty(2, m, 1, dtype=torch.float32, device="meta")
                layer_norm.forward(x, own, own, v[0, 0], v[0, 0], 1e-6, x.dtype)
                layer_norm.backward(x, x, mean, rstd, own, own, v[0, 0], True)
            else:
                launch.grad_scales(dy, x, weight, u, v, True, **arguments)
            for result in compiled:
                report = inspect(result, disassemble) | {"case": case, "name": result.metadata.name}
                print(json.dumps(report), flush=True)


def as_case(kernel: str, kind: str, config: Any = None, **rest: Any) -> dict[str, Any]:
    """A request's case, with a :class:`Config` spelled out; without one the heuristic chooses."""
    chosen = {} if config is None else {"config": dataclasses.asdict(config)}
    return {"kernel": kernel, "kind": kind, **chosen, **rest}


if __name__ == "__main__":
    main()
