"""The candidates for one pass at one shape, their tensors, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.backends import BACKENDS, choice
from rlrr_kernels.backends.problem import Problem

if TYPE_CHECKING:
    from rlrr_kernels.backends.triton.choose import Device


class Candidate(NamedTuple):
    """A backend and its choice of tile (a frozen dataclass), or None if it has no tiles to choose from."""

    backend: str
    choice: Any = None

    @property
    def tile(self) -> dict[str, int] | None:
        """The choice as an entry stores it."""
        return None if self.choice is None else asdict(self.choice)

    def __str__(self) -> str:
        tile = self.tile or {}
        short = "".join(f" {name[-1]}{tile[name]}" for name in ("block_m", "block_n", "block_k") if name in tile)
        rest = ", ".join(
            f"{value} {name.removeprefix('num_')}"
            for name, value in tile.items()
            if not name.startswith("block_") and (name, value) != ("splits", 1)
        )
        return self.backend + short + (f", {rest}" if rest else "")


class Tensors(NamedTuple):
    """x ``[M, K]``, W ``[N, K]``, dy ``[M, N]``; u ``[N, r]``, v ``[groups, r, K]``, bias and shift ``[N]``.

    x or dy is empty for the pass that does not read it.
    """

    x: Tensor
    weight: Tensor
    dy: Tensor
    scale_out: Tensor
    scale_in: Tensor
    bias: Tensor
    shift: Tensor


def describe(problem: Problem) -> str:
    """Return the problem in words, as ``forward M=12608 N=2304 K=768 groups=3``."""
    groups = f" groups={problem.groups}" if problem.groups > 1 else ""
    rank = f" rank={problem.rank}" if problem.rank > 1 else ""
    return f"{problem.kernel} M={problem.m} N={problem.n} K={problem.k}{groups}{rank}"


def candidates(problem: Problem, device: torch.device, limit: int, names: Sequence[str] = ()) -> list[Candidate]:
    """Return what can compute the problem; the default backend with its own choice of tile comes first.

    Args:
        problem: The pass and its sizes.
        device: Where it is to run.
        limit: How many tiles of a backend are taken besides its own choice.
        names: The backends to take; default: all, but not the reference on a GPU, which keeps W' in memory.

    Raises:
        ValueError: If there are none.
    """
    x = torch.empty(1, 1, dtype=problem.dtype, device=device)
    weight = torch.empty(1, 1, dtype=problem.weight_dtype, device=device)
    found: list[Candidate] = []
    for name, (_, kinds) in sorted(BACKENDS.items(), key=lambda item: device.type not in item[1][1]):
        wanted = name in names if names else kinds or name != "reference" or device.type == "cpu"
        if (
            not wanted
            or choice.unavailable(name, device) is not None
            or choice.refusal(name, x, weight, problem.rank) is not None
        ):
            continue
        found += [Candidate(name, one) for one in tiles(name, problem, device)[: limit + 1]]
    if not found:
        raise ValueError(f"{describe(problem)}: no backend serves {problem.dtype} here")
    return found


def tiles(backend: str, problem: Problem, device: torch.device | Device) -> list[Any]:
    """Return a backend's choices for a GPU, its own first; ``[None]`` if it has none to make."""
    found = getattr(choice.load(backend), "candidates", None)
    if found is None:
        return [None]
    if isinstance(device, torch.device):
        from rlrr_kernels.backends.triton import choose, launch

        # on a CPU, Triton's interpreter chooses as for a GPU
        device = choose.cuda_device(device.index) if device.type == "cuda" else launch.INTERPRETED_DEVICE
    return list(dict.fromkeys(found(problem, device))) or [None]


def traffic(problem: Problem) -> int:
    """Return the bytes that one launch reads and writes, without the small vectors."""
    x_size, weight_size = problem.dtype.itemsize, problem.weight_dtype.itemsize
    return problem.m * (problem.k + problem.n) * x_size + problem.n * problem.k * weight_size


def copies_of(problem: Problem, cache_bytes: int) -> int:
    """Return how many sets of tensors, 2 to 64, are used in turn, so that none is in the cache at its turn."""
    return min(64, max(2, -(-2 * cache_bytes // traffic(problem))))


def make_tensors(problem: Problem, copies: int, device: torch.device) -> list[Tensors]:
    """Return sets of random tensors with values as in training; the small vectors are shared."""
    generator = torch.Generator(device).manual_seed(0)
    kernel, m, n, k, groups, dtype, weight_dtype, _, rank = problem
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    u, v, shift, bias = draw(n, rank), 0.5 * draw(groups, rank, k), draw(n), draw(n, dtype=weight_dtype)
    found = []
    for _ in range(copies):
        x = draw(m if kernel != "grad_input" else 0, k, dtype=dtype)
        weight = draw(n, k, dtype=weight_dtype) * k**-0.5
        dy = draw(m if kernel != "forward" else 0, n, dtype=dtype)
        found.append(Tensors(x, weight, dy, u, v, bias, shift))
    return found


def run(problem: Problem, t: Tensors, candidate: Candidate) -> tuple[Tensor, ...]:
    """Launch the pass once, as in training, and return (y,), (dx,), or (du, dv, df)."""
    module: Any = choice.load(candidate.backend)
    more = {} if candidate.choice is None else {"choice": candidate.choice}
    if problem.kernel == "forward":
        return (module.forward(t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift, **more),)
    if problem.kernel == "grad_input":
        return (module.grad_input(t.dy, t.weight, t.scale_out, t.scale_in, **more),)
    return module.grad_scales(t.dy, t.x, t.weight, t.scale_out, t.scale_in, True, **more)  # type: ignore[no-any-return]
