"""Compile what the launcher would launch, for a GPU that is not here, and report on the machine code.

Run as a script (``python -m tests.backends.triton.compile_probe``) it reads one JSON
request on standard input and prints one JSON line for each configuration. It is a
process of its own because kernels must not be imported for the interpreter here, and
because a compiler that aborts must fail a test, not end the test run.

The launcher itself is called, on tensors without memory; in place of the kernels
stands a recorder that specialises and compiles exactly the arguments it is given.
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

DTYPES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}


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


class Recorder:
    """Stands for a kernel: ``recorder[grid](...)`` compiles those arguments for a target."""

    def __init__(self, kernel: Any, capability: int, results: list[Any]) -> None:
        self.kernel, self.capability, self.results = kernel, capability, results

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.tools.tensor_descriptor import TensorDescriptor

        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for position, name in enumerate(names):
            value = values[name]
            aligned = False
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{DTYPES[str(value.base.dtype)]}{list(value.block_shape)}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + DTYPES[str(value.dtype)]
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, int) and not isinstance(value, bool) and value != 1 and name not in kwargs:
                signature[name] = "i32" if value < 2**31 else "i64"
                aligned = value % 16 == 0
            else:  # Triton specialises integers that are 1, too
                signature[name] = "constexpr"
                constants[position,] = value
            if aligned:
                attributes[position,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", self.capability, 32)
        self.results.append(triton.compile(source, target=target, options=options))


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

    from rlrr_kernels.backends.triton import config as configs
    from rlrr_kernels.backends.triton import launch

    request = json.load(sys.stdin)
    device = configs.Device(**request["device"] | {"capability": tuple(request["device"]["capability"])})
    major, minor = device.capability
    compiled: list[Any] = []
    kernels = ("forward_kernel", "grad_input_kernel", "grad_scales_kernel", "sum_partials_kernel")
    with contextlib.ExitStack() as stack:
        for name in kernels:
            recorder = Recorder(getattr(launch, name), 10 * major + minor, compiled)
            stack.enter_context(mock.patch.object(launch, name, recorder))
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
            else:
                launch.grad_scales(dy, x, weight, u, v, True, **arguments)
            for result in compiled:
                report = inspect(result, disassemble) | {"case": case, "name": result.metadata.name}
                print(json.dumps(report), flush=True)


def as_case(kernel: str, kind: str, config: Any, **rest: Any) -> dict[str, Any]:
    """A request's case, with a :class:`Config` spelled out."""
    return {"kernel": kernel, "kind": kind, "config": dataclasses.asdict(config), **rest}


if __name__ == "__main__":
    main()
