"""One kernel at one shape: what the launcher would be asked, the tensors, and the launch itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import cost, launch
from rlrr_kernels.backends.triton.config import Config, Device
from rlrr_kernels.backends.triton.tuned import Choice
from rlrr_kernels.backends.triton.tuned_file import Kernel, Layer
from rlrr_kernels.tune.shapes import Shape

KERNELS: tuple[Kernel, ...] = ("forward", "grad_input", "grad_scales")


@dataclass(frozen=True)
class Task:
    """What is tuned at once. ``layer`` and ``m`` are the key that the launcher looks up."""

    layer: Layer
    m: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    name: str = ""

    def __str__(self) -> str:
        sizes = f"M={self.m} N={self.layer.n} K={self.layer.k}"
        groups = f" groups={self.layer.groups}" if self.layer.groups > 1 else ""
        return f"{self.layer.kernel} {sizes}{groups}"

    def choices(self, device: Device, limit: int) -> list[Choice]:
        """The heuristic's choice, then up to ``limit`` others, best predicted first.

        Raises:
            ValueError: no tile fits the device.
        """
        _, n, k, groups, kind, path, x_size, weight_size = self.layer
        found: Any = configs.candidates(
            self.layer.kernel, self.m, n, k, groups, kind, path, x_size, weight_size, device
        )
        return list(dict.fromkeys(found))[: limit + 1]

    def predict(self, choice: Choice, device: Device) -> cost.Prediction:
        """What the heuristic's model expects of one of :meth:`choices`."""
        kernel, n, k, groups, kind, path, x_size, weight_size = self.layer
        config, split_tokens = choice if isinstance(choice, tuple) else (choice, self.m)
        tiles = configs.fitting_tiles(kernel, kind, path, x_size, weight_size, device)
        tile = next(tile for tile in tiles if tile.config(config.splits) == config)
        shape = self.m, n, k, groups, kind, x_size, weight_size, device
        if kernel == "grad_scales":
            return cost.predict_scales(tile, split_tokens, *shape)
        return cost.predict_product(kernel, tile, config.splits, *shape)


def task_of(kernel: Kernel, shape: Shape, dtype: torch.dtype, weight_dtype: torch.dtype, device: Device) -> Task:
    """As the launcher would classify contiguous tensors; the tensors here have no data."""
    x = torch.empty(shape.m, shape.k, dtype=dtype, device="meta")
    weight = torch.empty(shape.n, shape.k, dtype=weight_dtype, device="meta")
    dy = torch.empty(shape.m, shape.n, dtype=dtype, device="meta")
    v = torch.empty(shape.groups, shape.k, device="meta")
    kind = launch._arithmetic(dtype)
    if kernel == "forward":
        path = launch._path(device, kind, x, weight, v)
    elif kernel == "grad_input":
        whole = shape.groups == 1 or (shape.n // shape.groups) % configs.GROUP_STEP == 0
        path = launch._path(device, kind, dy, weight, boxes=whole)
    else:
        path = launch._path(device, kind, dy, x, weight, boxes=launch._fits_vectors(weight))
    layer = Layer(kernel, shape.n, shape.k, shape.groups, kind, path, x.element_size(), weight.element_size())
    return Task(layer, shape.m, dtype, weight_dtype, shape.name)


@dataclass(frozen=True)
class Tensors:
    """x ``[M, K]``, W ``[N, K]``, dy ``[M, N]``; u ``[N, 1]``, v ``[groups, 1, K]``, bias and shift ``[N]``.

    x and dy are empty for the kernel that does not read them.
    """

    x: Tensor
    weight: Tensor
    dy: Tensor
    scale_out: Tensor
    scale_in: Tensor
    bias: Tensor
    shift: Tensor


def traffic(task: Task) -> int:
    """Bytes of what one launch reads and writes, the small vectors left out."""
    m, n, k = task.m, task.layer.n, task.layer.k
    outer = {"forward": m * (k + n), "grad_input": m * (n + k), "grad_scales": m * (n + k)}[task.layer.kernel]
    return outer * task.layer.x_size + n * k * task.layer.weight_size


def copies_of(task: Task, l2_bytes: int) -> int:
    """How many sets of tensors to go round, so that none is in the second cache when its turn comes: 2 to 64."""
    return min(64, max(2, -(-2 * l2_bytes // traffic(task))))


def make_tensors(task: Task, copies: int, device: torch.device) -> list[Tensors]:
    """Random values of the size that training meets; the small vectors are shared."""
    generator = torch.Generator(device).manual_seed(0)
    m, n, k, groups = task.m, task.layer.n, task.layer.k, task.layer.groups

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    u, v, shift = draw(n, 1), 0.5 * draw(groups, 1, k), draw(n)
    bias = draw(n, dtype=task.weight_dtype)
    reads_x, reads_dy = task.layer.kernel != "grad_input", task.layer.kernel != "forward"
    return [
        Tensors(
            x=draw(m if reads_x else 0, k, dtype=task.dtype),
            weight=draw(n, k, dtype=task.weight_dtype) * k**-0.5,
            dy=draw(m if reads_dy else 0, n, dtype=task.dtype),
            scale_out=u,
            scale_in=v,
            bias=bias,
            shift=shift,
        )
        for _ in range(copies)
    ]


def run(task: Task, t: Tensors, choice: Choice) -> tuple[Tensor, ...]:
    """One launch as training does it: y; dx; or du, dv, df."""
    if isinstance(choice, Config):
        if task.layer.kernel == "forward":
            y = launch.forward(
                t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift, config=choice, path=task.layer.path
            )
            return (y,)
        return (launch.grad_input(t.dy, t.weight, t.scale_out, t.scale_in, config=choice, path=task.layer.path),)
    config, split_tokens = choice
    return launch.grad_scales(
        t.dy,
        t.x,
        t.weight,
        t.scale_out,
        t.scale_in,
        True,
        config=config,
        split_tokens=split_tokens,
        path=task.layer.path,
    )
