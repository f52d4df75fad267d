"""The layers to tune for: given by their sizes, or those that ``apply_rlrr`` adapts in a timm model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models import bypass
from rlrr_kernels.models.adapt import apply_rlrr


@dataclass(frozen=True)
class Shape:
    """x ``[m, k]`` and W ``[n, k]`` in ``groups`` blocks of rows; ``name``: the layers of this shape."""

    m: int
    n: int
    k: int
    groups: int = 1
    name: str = ""


def parse(text: str) -> Shape:
    """Parse ``M,N,K`` or ``M,N,K,groups``.

    Raises:
        ValueError: If the text is different, a size is below 1, or the groups do not divide N.
    """
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError(f"shape: expected M,N,K or M,N,K,groups, each 1 or more, got {text!r}")
    m, n, k, groups = sizes if len(sizes) == 4 else (*sizes, 1)
    shape = Shape(m, n, k, groups)
    if shape.n % shape.groups:
        raise ValueError(f"shape: {shape.groups} groups do not divide N = {shape.n} in {text!r}")
    return shape


def of_model(name: str, batch: int, img_size: int | None = None) -> list[Shape]:
    """Return the shapes of a timm model's adapted linears for ``batch`` images, without weights or computing.

    Raises:
        ValueError: If timm does not know the model, or it does not run on images of that size.
        TypeError: If ``apply_rlrr`` does not know the model's family.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError("model: needs timm: pip install 'rlrr_kernels[finetune]'") from error
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, **({"img_size": img_size} if img_size else {}))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model: {name!r} cannot be built: {error}") from error
    # the affines change no linear's shape
    apply_rlrr(model, norm_affine=False, patch_affine=False)
    image = bypass.example_input(model)
    if image is None:
        raise ValueError(f"model: {name!r} does not say for which image size it is; name one by --img-size")
    found: list[Shape] = []

    def stand_in(layer: str, module: FusedRLRRLinear, x: Tensor) -> Tensor:
        label = re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", layer)
        n, k = module.weight.shape
        found.append(Shape(x.shape[:-1].numel(), n, k, module.groups, f"{name}: {label}"))
        return x.new_empty(*x.shape[:-1], n)

    for layer, module in model.named_modules():
        if isinstance(module, FusedRLRRLinear):
            module.forward = partial(stand_in, layer, module)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            model.eval()(image.expand(batch, *image.shape[1:]))
    except RuntimeError as error:
        raise ValueError(f"model: {name!r} does not run on images of {list(image.shape[1:])}: {error}") from error
    return found


def unique(shapes: Iterable[Shape]) -> list[Shape]:
    """Return each shape once, in order, with all the names it came with."""
    names: dict[Shape, dict[str, None]] = {}
    for shape in shapes:
        names.setdefault(replace(shape, name=""), {})[shape.name] = None
    return [replace(shape, name=", ".join(filter(None, found))) for shape, found in names.items()]
