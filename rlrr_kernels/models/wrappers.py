"""What may be around a model that is handed over: ``torch.compile``, data-parallel wrappers, FSDP."""

from __future__ import annotations

from torch import nn

from rlrr_kernels.layers.ownership import under_fsdp


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile``'s and data-parallel wrappers."""
    parallel = nn.parallel.DataParallel, nn.parallel.DistributedDataParallel
    while True:
        inner = model.module if isinstance(model, parallel) else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """A name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


def check_replaceable(model: nn.Module) -> None:
    """``TypeError`` if DDP or FSDP has taken over the parameters of the model or of a part of it.

    They reduce the gradients of the parameters that they were given, and FSDP puts those back at each pass.
    """
    for module in model.modules():
        ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        if ddp or under_fsdp(module):
            raise TypeError(
                f"model: {'DistributedDataParallel' if ddp else 'FSDP'} has taken over its parameters; adapt the plain "
                "model (apply_rlrr, load_adapter), and wrap or shard it then"
            )
