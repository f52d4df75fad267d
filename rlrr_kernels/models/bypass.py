"""Finds layers that a model does not call as modules.

Some models read ``layer.weight`` and multiply by it themselves (timm's Swin V2, BEiT and EVA-02 do so for qkv). An
adapter in the place of such a layer is never called, and what it should train gets no gradient. So the model's calls
are watched before anything is trained.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def example_input(model: nn.Module) -> Tensor | None:
    """Return an image ``[1, C, H, W]`` on the meta device, of the size that a timm model was built for.

    Returns None if the model does not say for which size that is.
    """
    patch_embed = getattr(model, "patch_embed", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size") or (None, None, None)
    size = getattr(patch_embed, "img_size", None) or size
    weight = getattr(getattr(patch_embed, "proj", None), "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 4:
        channels = weight.shape[1]
    if channels is None or None in size:
        return None
    return torch.empty(1, channels, *size, device="meta")


def uncalled(model: nn.Module, names: Iterable[str], inputs: Any) -> list[str]:
    """Return which of the named modules one forward pass does not call.

    The pass runs on a copy on the meta device: it computes nothing and leaves the model as it is.

    Args:
        model: Any module that can be copied.
        names: Names of modules in it.
        inputs: A tensor, or a tuple of positional arguments. Only shapes and dtypes matter.

    Raises:
        Exception: Whatever the model's code raises if it cannot run on such tensors.
    """
    copied = meta_copy(model)
    called: set[str] = set()
    for name in names:
        copied.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    dtype = next((p.dtype for p in copied.parameters() if p.is_floating_point()), torch.float32)

    def to_meta(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="meta", dtype=dtype if t.is_floating_point() else t.dtype)

    # a compiled model runs in eager mode here: compiling it for this one pass would take long
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        copied.eval()(*tree_map_only(Tensor, to_meta, arguments))
    return [name for name in names if name not in called]


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def first_names(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def message(model: nn.Module, names: list[str]) -> str:
    """Return the message for a model that does not call the named layers."""
    return (
        f"{type(model).__name__} does not call {first_names(names)} as modules but reads their weights, so nothing "
        "there would train. Name them in exclude_modules, or use a model that calls its layers"
    )


class FirstPassWatch:
    """Watches the first training pass of a model that could not be run beforehand, and warns of uncalled layers.

    It removes its hooks afterwards. It is copied and pickled with the model.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names, self.called = list(names), set[str]()
        for name in self.names:
            model.get_submodule(name).register_forward_pre_hook(functools.partial(self._mark, name))
        model.register_forward_hook(self._report)

    def _mark(self, name: str, module: nn.Module, args: Any) -> None:
        # not under a compiler, which would have to trace the set
        if not torch.compiler.is_compiling():
            self.called.add(name)

    def _report(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        for name in self.names:
            hooks = model.get_submodule(name)._forward_pre_hooks
            for key in [k for k, hook in hooks.items() if getattr(hook, "func", None) == self._mark]:
                del hooks[key]
        for key in [k for k, hook in model._forward_hooks.items() if hook == self._report]:
            del model._forward_hooks[key]
        missing = [name for name in self.names if name not in self.called]
        if missing:
            warnings.warn(f"rlrr_kernels: in its first training pass {message(model, missing)}", stacklevel=2)
