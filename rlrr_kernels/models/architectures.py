"""What the published method adapts in each of timm's transformer families.

The published code trains ViTs and Swin (RLRR, arXiv 2403.19067); the other families
follow the one they are built like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Shell patterns over module names.

    Attributes:
        linears: adapted ``nn.Linear`` modules. excluded: those of them that are not.
        groups: linears -> row blocks with a v each.
        norms: ``nn.LayerNorm`` modules with an affine after them.
        patch_affine: whether there is an affine after the patch embedding.
    """

    linears: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    patch_affine: bool = False


# q, k and v are three layers in the published ViT, fused in timm's
_VIT = Architecture(
    linears=("blocks.*",),
    groups={"*.attn.qkv": 3},
    norms=("blocks.*", "norm_pre", "norm", "fc_norm"),
    patch_affine=True,
)
# one layer in the published Swin, which also has no affine after patch embedding and patch merging;
# cpb_mlp computes Swin V2's position biases, not tokens
_SWIN = Architecture(
    linears=("layers.*.blocks.*", "layers.*.downsample.reduction"),
    excluded=("*.cpb_mlp.*",),
    norms=("layers.*.blocks.*.norm[12]", "norm"),
)

#: Class of timm -> what is adapted. Subclasses (distilled DeiT, ...) follow their base.
ARCHITECTURES = {
    "timm.models.vision_transformer.VisionTransformer": _VIT,
    "timm.models.eva.Eva": _VIT,
    "timm.models.beit.Beit": _VIT,
    "timm.models.swin_transformer.SwinTransformer": _SWIN,
    "timm.models.swin_transformer_v2.SwinTransformerV2": _SWIN,
}


def architecture_of(model: nn.Module) -> Architecture | None:
    """The entry for a model's class, or None. timm is not imported: a model of it has done so."""
    for base in type(model).__mro__:
        found = ARCHITECTURES.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return None
