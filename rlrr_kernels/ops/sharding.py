"""Both ops over DTensors: each process computes its part, and PyTorch's redistribution communicates.

The placement of W ``[N, K]`` along a dimension of the mesh decides the placement of everything else. Each process
runs the kernels on its own part. It communicates only where the table says Partial (the sum is formed when it is
needed) or where a tensor has another placement than the table's.

========================  =====  =======  =======  =======  ==========  =======  ==================
\\                         x      W        u        v        b, f        y        gradients to be summed
========================  =====  =======  =======  =======  ==========  =======  ==================
column (rows of W)        whole  Shard 0  Shard 0  whole    Shard 0     Shard -1  dx, dv
row (columns of W)        S(-1)  Shard 1  whole    S(-1)    added once  Partial  du, db, df
tokens (data parallel)    S(d)   whole    whole    whole    whole       S(d)     dW, du, dv, db, df
========================  =====  =======  =======  =======  ==========  =======  ==================

With groups of rows (a fused qkv projection) the column layout gives each process a whole number of equal blocks of
rows, each within one group, and the v of each block; if N does not divide so, W is gathered. Gradients have the
placements of their parameters.

The ops have no sharding rules of their own: the cache of PyTorch's ``register_sharding`` leaves booleans out of its
key, and its rules cannot say that groups of rows must stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, _redistribute, distribute_tensor

from rlrr_kernels.backends import reference

_WHOLE = Replicate()

#: Whether this torch can differentiate the gradient of a change of placement.
_TWICE = hasattr(_redistribute, "NestedRedistribute")


def linear(
    local: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Compute :func:`~rlrr_kernels.rescaled_linear` of DTensors.

    Args:
        local: the function itself, called with this process's parts.
        x, weight, scale_out, scale_in, bias, shift: as it takes them; shapes are those of the whole tensors.

    Returns:
        y ``[..., N]``, a DTensor laid out as the table above says.

    Raises:
        TypeError: If an argument is not a DTensor.
        ValueError: If an argument lies on another device mesh than weight.
    """
    named = {"x": x, "weight": weight, "scale_out": scale_out, "scale_in": scale_in, "bias": bias, "shift": shift}
    given = {name: _on_mesh(name, t, weight) for name, t in named.items() if t is not None}
    mesh, n = given["weight"].device_mesh, weight.shape[0]
    groups = scale_in.shape[0] if scale_in.dim() == 3 else 1
    weight_layout = _divisible(given["weight"], groups)
    layouts: dict[str, list[Placement]] = {name: [] for name in (*named, "y")}
    grads: dict[str, list[Placement]] = {name: [] for name in named}
    last = {"x": x.dim() - 1, "scale_in": scale_in.dim() - 1}
    added_here = True
    for along, of_weight, of_x in zip(range(mesh.ndim), weight_layout, given["x"].placements, strict=True):
        sharded: dict[str, Shard] = {}
        of_y: Placement = _WHOLE
        tokens = of_x.dim if type(of_x) is Shard and of_x.dim != last["x"] else None
        if of_weight == Shard(0):
            sharded = dict.fromkeys(("weight", "scale_out", "bias", "shift"), Shard(0))
            of_y = Shard(last["x"])
        elif of_weight == Shard(1) or (type(of_x) is Shard and tokens is None):
            sharded = {"weight": Shard(1)} | {name: Shard(dim) for name, dim in last.items()}
            of_y = Partial()
            added_here &= mesh.get_local_rank(along) == 0
        elif tokens is not None:
            sharded, of_y = {"x": Shard(tokens)}, Shard(tokens)
        layouts["y"].append(of_y)
        for name in named:
            layouts[name].append(sharded.get(name, _WHOLE))
            # a replicated tensor that meets a part of another one gets a part of its gradient's sum
            grads[name].append(sharded.get(name, Partial() if sharded else _WHOLE))
    # redistribute is called even if no placement changes: it gives the gradient its parameter's placements
    parts = {
        name: t.redistribute(placements=layouts[name]).to_local(grad_placements=grads[name])
        for name, t in given.items()
    }
    if groups > 1:
        parts["scale_in"] = _blocks(parts["scale_in"], mesh, layouts["weight"])
    if not added_here:
        parts |= {name: _zeros_of(parts[name]) for name in ("bias", "shift") if name in parts}
    y = local(**parts)
    return _Whole.apply(y, mesh, layouts["y"], (*x.shape[:-1], n))  # type: ignore[no-any-return]


def layer_norm(
    local: Callable[..., Tensor],
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    *rest: Any,
) -> Tensor:
    """Compute a function of rows ``[..., D]`` and vectors ``[D]`` on this process's rows of the DTensor x.

    Args:
        local: the function, called as ``local(x, *parameters, *rest)``.
        x: its last dimension is gathered if it is sharded.
        parameters: w, b, s and t ``[D]`` or None; gathered if they are sharded.
        rest: passed on.

    Raises:
        TypeError: If an argument is not a DTensor.
        ValueError: If an argument lies on another device mesh than x.
    """
    rows = _on_mesh("x", x, x, "x")
    named = zip(("weight", "bias", "ssf_scale", "ssf_shift"), parameters, strict=True)
    given = [None if t is None else _on_mesh(name, t, x, "x") for name, t in named]
    layout: list[Placement] = [p if type(p) is Shard and p.dim < x.dim() - 1 else _WHOLE for p in rows.placements]
    grads = [Partial() if p.is_shard() else _WHOLE for p in layout]
    whole = [_WHOLE] * len(layout)
    part = rows.redistribute(placements=layout).to_local(grad_placements=layout)
    vectors = [None if t is None else t.redistribute(placements=whole).to_local(grad_placements=grads) for t in given]
    y = local(part, *vectors, *rest)
    return _Whole.apply(y, rows.device_mesh, layout, tuple(x.shape))  # type: ignore[no-any-return]


@torch.no_grad()
def rescaled_weight(weight: Tensor, scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype) -> Tensor:
    """W' ``[N, K]`` in ``dtype``, laid out as W is, of DTensors u ``[N, r]`` and v ``[groups, r, K]``.

    Raises:
        TypeError, ValueError: As :func:`linear`.
    """
    given = [_on_mesh(*named, weight) for named in (("scale_out", scale_out), ("scale_in", scale_in))]
    whole = _on_mesh("weight", weight, weight)
    mesh, layout = whole.device_mesh, _divisible(whole, scale_in.shape[0])
    of_u: list[Placement] = [p if p == Shard(0) else _WHOLE for p in layout]
    of_v: list[Placement] = [Shard(2) if p == Shard(1) else _WHOLE for p in layout]
    placed = zip((whole, *given), (layout, of_u, of_v), strict=True)
    w, u, v = (t.redistribute(placements=placements).to_local() for t, placements in placed)
    parts = reference.rescaled_weight(w, u, _blocks(v, mesh, layout), dtype)
    stride = torch.empty(weight.shape, device="meta").stride()
    rescaled = DTensor.from_local(parts, mesh, layout, run_check=False, shape=weight.shape, stride=stride)
    return rescaled.redistribute(placements=whole.placements)


def laid_out_as(values: Tensor, like: Tensor) -> DTensor:
    """Give ``values`` the placements of the DTensor ``like``.

    Args:
        values: a DTensor, or a plain tensor that every process has in full; nothing is broadcast.
        like: a DTensor.
    """
    assert isinstance(like, DTensor)
    if isinstance(values, DTensor):
        return values.redistribute(like.device_mesh, like.placements)
    whole = values.detach().to(like.device_mesh.device_type)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class _Whole(torch.autograd.Function):
    """``DTensor.from_local`` with correct second derivatives.

    The backward of ``from_local`` itself assumes that a gradient with a Partial placement is equal in all processes,
    but each has a part of the sum.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: DeviceMesh, layout: list[Placement], shape: tuple[int, ...]) -> DTensor:
        ctx.layout = layout
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, layout, run_check=False, shape=torch.Size(shape), stride=stride)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not _TWICE:
            raise RuntimeError(
                f"second derivatives of a tensor parallel layer: torch {torch.__version__} leaves out what passes a "
                "change of layout; a later one is needed"
            )
        reduced = [_WHOLE if p.is_partial() else p for p in ctx.layout]
        return grad.redistribute(placements=reduced).to_local(grad_placements=ctx.layout), None, None, None


def _on_mesh(name: str, t: Tensor, like: Tensor, of: str = "weight") -> DTensor:
    if not isinstance(t, DTensor):
        raise TypeError(
            f"{name}: expected a DTensor, as {of} is one, got {type(t).__name__}; "
            "rlrr_kernels.layers.parallel has the styles that shard a whole layer"
        )
    assert isinstance(like, DTensor)
    if t.device_mesh != like.device_mesh:
        raise ValueError(f"{name}: expected device mesh {like.device_mesh} as {of}, got {t.device_mesh}")
    return t


def _row_shards(mesh: DeviceMesh, layout: Iterable[Placement]) -> tuple[int, int]:
    """The number of parts into which the rows of W are cut, and the index of this process's part."""
    parts, index = 1, 0
    for along, placement in enumerate(layout):
        if placement == Shard(0):
            index = index * mesh.size(along) + mesh.get_local_rank(along)
            parts *= mesh.size(along)
    return parts, index


def _divisible(weight: DTensor, groups: int) -> list[Placement]:
    """W's own placements if the kernels can work on its parts, else placements that replicate what they must."""
    known: list[Placement] = [
        p if p in (Shard(0), Shard(1)) and type(p) is Shard else _WHOLE for p in weight.placements
    ]
    parts, _ = _row_shards(weight.device_mesh, known)
    if groups > 1 and weight.shape[0] % math.lcm(groups, parts):
        return [_WHOLE if p == Shard(0) else p for p in known]
    return known


def _blocks(scale_in: Tensor, mesh: DeviceMesh, layout: list[Placement]) -> Tensor:
    """v ``[blocks, r, K]`` for this process's rows of W, one for each of its equal blocks of rows."""
    parts, index = _row_shards(mesh, layout)
    groups, rank, k = scale_in.shape
    count = math.lcm(groups, parts)
    blocks = scale_in.unsqueeze(1).expand(groups, count // groups, rank, k).reshape(count, rank, k)
    own = count // parts
    return blocks[index * own : (index + 1) * own]


def _zeros_of(term: Tensor) -> Tensor:
    """Zeros for a term that another process adds, with a gradient, so that all processes take part in its sum.

    Not ``0 * term``, which is NaN for an infinite term.
    """
    return nn.functional.pad(term[:0], (0, term.shape[0]))
