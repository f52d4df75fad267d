"""Whole training steps of a timm vision transformer, by this package and by its rivals."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import results
from benchmarks.baselines import weight_by_autograd
from benchmarks.implementations import require_peft
from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr
from rlrr_kernels.finetune.backbone import apply_lora, apply_ssf
from rlrr_kernels.models.bypass import meta_copy
from rlrr_kernels.models.modules import adapters, head, replace

CLASSES = 100
#: The same for all methods, as only the cost of a step matters here.
LEARNING_RATE = 1e-5


class FormulaLinear(nn.Module):
    """The layer as the published code computes it: W' by autograd at every forward, one linear with both biases.

    It costs less than the published model in two ways, which favours it. W' is W * (1 + u v), of which autograd keeps
    only W; the published code multiplies W by v, then by u, and adds W, which keeps W * v too. And timm's fused qkv
    stays one product in three groups; the published model calls three layers. Both keep W' in the product's dtype
    (under autocast), and x, for backward.

    Args:
        layer: The layer whose frozen and trained parameters it shares.
    """

    def __init__(self, layer: FusedRLRRLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.scale_out, self.shift = layer.scale_out, layer.shift
        self.scale_in = layer.scale_in
        self.groups = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]`` in x's dtype, or autocast's."""
        v = self.scale_in.view(self.groups, -1, self.weight.shape[1])
        # W' stays in the parameters' dtype: under autocast the product rounds it
        weight = weight_by_autograd(self.weight, self.scale_out, v)
        return F.linear(x, weight, self.shift if self.bias is None else self.bias + self.shift)


def apply_formula(model: nn.Module, rank: int = 1) -> nn.Module:
    """Apply RLRR as published, by plain operations, to what ``apply_rlrr`` adapts; in place."""
    before = dict(model.named_modules())
    apply_rlrr(model, rank=rank)
    for name, module in list(adapters(model)):
        if isinstance(module, FusedRLRRLinear):
            replace(model, name, FormulaLinear(module))
        elif isinstance(module, SSFLayerNorm):
            affine = SSFAffine(module.normalized_shape[0], module.ssf_scale.device)
            affine.ssf_scale, affine.ssf_shift = module.ssf_scale, module.ssf_shift
            replace(model, name, nn.Sequential(before[name], affine))
    # these attributes describe modules that were replaced
    del model.rlrr_config, model._rlrr_base
    return model


def _apply_hira(model: nn.Module, rank: int) -> nn.Module:
    """Apply PEFT's HiRA to the linears that RLRR adapts; the head trains too."""
    peft = require_peft()
    adapted = apply_rlrr(meta_copy(model), train_head=False)
    targets = [name for name, layer in adapted.named_modules() if isinstance(layer, FusedRLRRLinear)]
    peft.inject_adapter_in_model(peft.HiraConfig(r=rank, target_modules=targets), model)
    head(model).requires_grad_(True)
    return model


def build(implementation: str, name: str, device: str, rank: int = 1, **options: Any) -> nn.Module:
    """Return a timm model that an implementation trains; equal seeds give equal frozen weights.

    Args:
        implementation: One of ``STEP_IMPLEMENTATIONS``.
        name: Of ``timm.create_model``.
        device: Where it trains.
        rank: Of u v, in ours, the formula and HiRA.
        options: Of ``timm.create_model``.

    Raises:
        Unavailable: If it needs PEFT, which is not installed or has no HiRA.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **({"num_classes": CLASSES} | options)).to(device)
    method = implementation.removesuffix(" compiled")
    if method == results.OURS:
        apply_rlrr(model, rank=rank)
    elif method == results.OFFICIAL:
        apply_formula(model, rank)
    elif method == results.LORA or method in results.HIRAS.values():
        require_peft()
        apply_lora(model, 8) if method == results.LORA else _apply_hira(model, rank)
    elif method == results.SSF:
        apply_ssf(model)
    elif method == results.PROBE:
        model.requires_grad_(False)
        head(model).requires_grad_(True)
    model.train()
    # fullgraph: a graph break, or too many recompilations, is an error and does not fall back to eager PyTorch
    compiled: Any = torch.compile(model, dynamic=False, fullgraph=True)
    return model if implementation == method else compiled


#: Ops whose Triton kernels leave partial sums, which a second kernel adds.
_ADDS_PARTS = ("rlrr::grad_scales", "rlrr::layer_norm_backward")


class _Launches(TorchDispatchMode):
    """Counts operations that are not views and do not only allocate, by the kernels that each launches at least."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        only_allocates = func.namespace == "aten" and ("empty" in func._opname or func._opname == "_unsafe_view")
        if not is_view and not only_allocates and func.namespace != "profiler":
            self.number += 2 if func._schema.name in _ADDS_PARTS else 1
        return func(*args, **(kwargs or {}))


class Step:
    """Forward, cross-entropy, backward and AdamW on one batch of random images.

    Args:
        model: The model.
        images: ``[B, 3, H, W]``.
        labels: ``[B]``.
        dtype: Of autocast; float32 for none.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.model, self.images, self.labels, self.dtype = model, images, labels, dtype
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=images.is_cuda)

    def __call__(self) -> Tensor:
        """Take a step, and return the loss before it ``[]``."""
        loss = self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _backward(self) -> Tensor:
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return the loss and the norm of the whole gradient, each ``[]``, to compare methods of one model."""
        loss = self._backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return loss, torch.stack([g.norm() for g in gradients]).norm()

    def launches(self) -> int:
        """Count the kernels that forward and backward launch at least on a GPU, where Triton serves our ops."""
        self.optimizer.zero_grad()
        with _Launches() as counted:
            self._backward()
        self.optimizer.zero_grad()
        return counted.number

    def resident_bytes(self) -> int:
        """Return the bytes of parameters, buffers and the optimizer's state."""
        state = (t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor))
        held = {t.untyped_storage().data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers(), *state)}
        return sum(t.untyped_storage().nbytes() for t in held.values())
