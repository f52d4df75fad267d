"""Other ways to fine-tune, for comparison in the same loop: SSF, and LoRA through PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models.adapt import apply_rlrr, qkv_readers
from rlrr_kernels.models.bypass import meta_copy
from rlrr_kernels.models.modules import head, replace
from rlrr_kernels.models.parameters import count_parameters


class SSFLinear(nn.Linear):
    """y = (x W^T + b) * s + t with W, b frozen and s, t ``[N]`` trained (SSF, arXiv 2210.08823, Eq. 2).

    Args:
        linear: the layer whose weight and bias are shared and frozen.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, False, "meta")
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        new: dict[str, Any] = {"device": linear.weight.device, "dtype": accumulation_dtype(linear.weight.dtype)}
        self.ssf_scale = nn.Parameter(torch.empty(self.out_features, **new).normal_(1.0, 0.02))
        self.ssf_shift = nn.Parameter(torch.empty(self.out_features, **new).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        return F.linear(x, self.weight, self.bias) * self.ssf_scale + self.ssf_shift


def apply_ssf(model: nn.Module) -> nn.Module:
    """SSF as published: an affine after each linear of the blocks, each LayerNorm and the patch embedding; in place.

    It goes where :func:`~rlrr_kernels.apply_rlrr` puts its own; the head trains too.

    Raises:
        TypeError, ValueError: as there.
    """
    apply_rlrr(model, patch_affine=True, norm_affine=True)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FusedRLRRLinear):
            replace(model, name, SSFLinear(layer))
    # the record of what apply_rlrr did is not true any more
    del model.rlrr_config, model._rlrr_base
    return model


def apply_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA of PEFT on the linears that RLRR would adapt, with alpha = 2 rank, in place; the head trains too.

    Raises:
        ValueError: PEFT is not installed.
        TypeError: a model of a family that RLRR does not know.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("method: expected peft to be installed for lora (pip install peft)") from error
    targets = [name for name, _ in _linears(model)]
    for module in qkv_readers(model, targets):
        module.qkv_bias_separate = True
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    head(model).requires_grad_(True)
    return model


def matching_rank(model: nn.Module) -> int:
    """The smallest LoRA rank that trains no fewer parameters of the blocks than RLRR trains in all, head apart."""
    per_rank = sum(linear.in_features + linear.out_features for _, linear in _linears(model))
    count, _ = count_parameters(apply_rlrr(meta_copy(model), train_head=False))
    return -(-count // per_rank)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    adapted = apply_rlrr(meta_copy(model), train_head=False)
    return [(name, layer) for name, layer in adapted.named_modules() if isinstance(layer, FusedRLRRLinear)]
