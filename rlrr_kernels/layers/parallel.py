"""Styles for ``parallelize_module`` that shard the package's layers, and clipping of mixed gradients.

::

    parallelize_module(model, mesh, {
        "blocks.*.mlp.fc1": RLRRColwiseParallel(),
        "blocks.*.mlp.fc2": RLRRRowwiseParallel(),
    })

:mod:`rlrr_kernels.ops.sharding` says how x, W, u, v, b, f and y are laid out. See ``docs/parallel.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFLayerNorm

_WHOLE = Replicate()


class _RLRRParallel(ParallelStyle):
    """Base of the styles, which say how each parameter is sharded and how x and y are laid out."""

    #: the layer that the style is for
    kind: type[nn.Module] = FusedRLRRLinear
    #: parameter -> the dimension that is sharded; the others are replicated
    dims: ClassVar[dict[str, int]] = {}
    input_layout: Placement
    output_layout: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or self.input_layout,)
        self.output_layouts = (output_layouts or self.output_layout,)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if not isinstance(module, self.kind):
            raise TypeError(f"{name}: expected a {self.kind.__name__}, got {type(module).__name__}")
        if isinstance(module, FusedRLRRLinear):
            if module.merged:
                raise RuntimeError(f"{name}: u, v, f are merged; unmerge before parallelize_module")
            parts, n = device_mesh.size(), module.out_features
            if self.dims["weight"] == 0 and module.groups > 1 and n % math.lcm(module.groups, parts):
                raise ValueError(
                    f"{name}: {n} rows in {module.groups} groups do not fall into equal blocks over {parts} processes; "
                    "RLRRRowwiseParallel shards any layer"
                )
        return distribute_module(module, device_mesh, self._partition, self._annotate, self._lay_out)

    def _partition(self, _: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(self.dims[name] % parameter.dim()) if name in self.dims else _WHOLE
            parts = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(parts, parameter.requires_grad))

    def _annotate(self, _: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x, *rest = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        return x, *rest

    def _lay_out(self, _: nn.Module, y: Any, mesh: DeviceMesh) -> Any:
        y = y.redistribute(placements=self.output_layouts)
        return y.to_local() if self.use_local_output else y

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, output_layouts={self.output_layouts}, "
            f"use_local_output={self.use_local_output})"
        )


class RLRRColwiseParallel(_RLRRParallel):
    """Shard a :class:`~rlrr_kernels.FusedRLRRLinear` by rows of W, u, b and f; v is replicated.

    The counterpart of PyTorch's ``ColwiseParallel``: each process computes some columns of y.

    Args:
        input_layouts: placement of x if it is not a DTensor. Default: replicated.
        output_layouts: placement of y. Default: sharded over the features.
        use_local_output: return this process's part of y as a plain tensor.

    Raises (by ``parallelize_module``):
        TypeError: If the module is not a FusedRLRRLinear.
        RuntimeError: If it is merged.
        ValueError: If N is not a multiple of the least common multiple of groups and processes.
    """

    dims: ClassVar = {"weight": 0, "bias": 0, "scale_out": 0, "shift": 0}
    input_layout, output_layout = _WHOLE, Shard(-1)


class RLRRRowwiseParallel(_RLRRParallel):
    """Shard a :class:`~rlrr_kernels.FusedRLRRLinear` by columns of W and v; u, b and f are replicated.

    The counterpart of PyTorch's ``RowwiseParallel``: y is summed over the processes. Any groups are allowed.

    Args:
        input_layouts: placement of x if it is not a DTensor. Default: sharded over the features.
        output_layouts: placement of y. Default: replicated.
        use_local_output: return this process's part of y as a plain tensor.

    Raises (by ``parallelize_module``):
        TypeError: If the module is not a FusedRLRRLinear.
        RuntimeError: If it is merged.
    """

    dims: ClassVar = {"weight": 1, "scale_in": -1}
    input_layout, output_layout = Shard(-1), _WHOLE


class RLRRSequenceParallel(_RLRRParallel):
    """Shard the tokens of an :class:`~rlrr_kernels.SSFLayerNorm`; w, b, s and t are replicated.

    The counterpart of PyTorch's ``SequenceParallel``, which would make the frozen w and b train.

    Args:
        input_layouts: placement of x if it is not a DTensor. Default: sharded over dimension 1 of ``[B, T, D]``.
        output_layouts: placement of y. Default: the same.
        use_local_output: return this process's part of y as a plain tensor.

    Raises (by ``parallelize_module``):
        TypeError: If the module is not an SSFLayerNorm.
    """

    kind = SSFLayerNorm
    input_layout, output_layout = Shard(1), Shard(1)


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip gradients of which some are DTensors and some are not; ``torch.nn.utils.clip_grad_norm_`` refuses these.

    Args:
        parameters: those without a gradient are left out. A plain one must have the same gradient in all processes.
        max_norm: the largest 2-norm of all gradients together.

    Returns:
        The norm before clipping, a plain tensor, equal in all processes.
    """
    grouped: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if (grad := parameter.grad) is not None:
            grouped.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(parameter)
    norms = []
    for group in grouped.values():
        norm = nn.utils.get_total_norm(p.grad for p in group if p.grad is not None)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    for group in grouped.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
