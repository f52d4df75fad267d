"""The small vision transformer whose weights are part of the package.

It lets ``rlrr-finetune`` do real work without a model hub. Importing this module registers it with timm, so that it
is used like any other model::

    timm.create_model("vit_embedded_patch7_28", pretrained=True, num_classes=10)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

EMBEDDED_MODEL = "vit_embedded_patch7_28"
WEIGHTS = Path(__file__).parent / "weights" / "vit_embedded_patch7_28.fashion_mnist.safetensors"

default_cfgs = generate_default_cfgs(
    {
        f"{EMBEDDED_MODEL}.fashion_mnist": {
            "file": str(WEIGHTS),
            "num_classes": 10,
            "input_size": (1, 28, 28),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "fixed_input_size": True,
            "mean": (0.5,),
            "std": (0.5,),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_embedded_patch7_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 28x28 grey input, patch 7, width 128, depth 5, 4 heads: 1.0M parameters."""
    arch = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 128, "depth": 5, "num_heads": 4}
    # the filter resizes position embeddings to another image size
    return build_model_with_cfg(
        VisionTransformer, EMBEDDED_MODEL, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **(arch | kwargs)
    )
