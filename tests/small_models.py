"""Small layers and models that the tests share."""

import timm
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, apply_rlrr
from rlrr_kernels.backends import reference

#: One image batch that all of them but Swin V2 and CLIP take.
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

#: Rows for :func:`small_layer`.
ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def small_layer(**options) -> FusedRLRRLinear:
    """A layer from 8 to 6 features with a nonzero shift, the same at each call."""
    torch.manual_seed(0)
    made = FusedRLRRLinear(8, 6, **options)
    nn.init.normal_(made.shift)
    return made


def formula_of(layer: FusedRLRRLinear) -> torch.Tensor:
    """What it makes of :data:`ROWS`, by the plain formula."""
    v = layer.scale_in.view(layer.groups, 1, 8)
    return reference.formula(ROWS, layer.weight, layer.scale_out, v, layer.bias, layer.shift)


def small_vit(classes: int = 5, **options) -> nn.Module:
    """48 wide, two blocks, 32 pixels; the same weights at each call."""
    torch.manual_seed(0)
    arch = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": classes}
    return timm.create_model("vit_tiny_patch16_224", **(arch | options)).eval()


def small_swin(classes: int = 5, name: str = "swin_tiny_patch4_window7_224", **options) -> nn.Module:
    """Two stages of 24 and 48 features, 32 pixels."""
    torch.manual_seed(0)
    arch = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return timm.create_model(name, num_classes=classes, **(arch | options)).eval()


def stir(model: nn.Module) -> nn.Module:
    """Change everything that trains a little, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def tuned(make=small_vit, **options) -> nn.Module:
    """A model that is adapted and changed as by training."""
    return stir(apply_rlrr(make(), **options))


def names_of(model: nn.Module, kind: type | tuple[type, ...]) -> set[str]:
    """Names of the modules of these kinds in a model."""
    return {name for name, module in model.named_modules() if isinstance(module, kind)}
