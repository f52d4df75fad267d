"""What is measured: the linears of four vision transformers, how many images, and which chunk holds what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: Batch sizes of the whole suite, and of the slice that suits a device: on a GPU about 7 minutes with its training
#: steps, by the estimates of :func:`layer_chunk`; on a CPU as far as the clock lets it come.
IMAGES = (1, 8, 32, 64, 256)
SLICE_IMAGES = {"cuda": (1, 32), "cpu": (1, 8, 32)}
DTYPES = ("bfloat16", "float32")
#: Searching tiles for a minute a shape, ``max-autotune`` is measured in bfloat16 for the ViTs at these batch sizes.
SEARCHED_IMAGES = (1, 32, 256)


@dataclass(frozen=True)
class Shape:
    """One linear layer: ``n`` output and ``k`` input features, ``tokens`` an image, row groups with a v each."""

    key: str
    model: str
    layer: str
    tokens: int
    n: int
    k: int
    groups: int


def _block(key: str, model: str, tokens: int, dim: int, hidden: int, groups: int, stage: str = "") -> list[Shape]:
    sizes = {"qkv": (3 * dim, dim, groups), "proj": (dim, dim, 1), "fc1": (hidden, dim, 1), "fc2": (dim, hidden, 1)}
    return [Shape(key, model, stage + layer, tokens, *size) for layer, size in sizes.items()]


#: Key on the command line -> the linears of a block (of each stage for Swin, whose published qkv trains one v).
MODELS: dict[str, list[Shape]] = {
    "vit_b": _block("vit_b", "ViT-B/16", 197, 768, 3072, 3),
    "vit_l": _block("vit_l", "ViT-L/16", 197, 1024, 4096, 3),
    "vit_h": _block("vit_h", "ViT-H/14", 257, 1280, 5120, 3),
    "swin_b": [
        shape
        for stage, tokens in enumerate((3136, 784, 196, 49))
        for shape in _block("swin_b", "Swin-B", tokens, 128 << stage, 512 << stage, 1, f"{stage + 1}.")
    ],
}


def searched(shape: Shape, images: int, dtype: str) -> bool:
    """Whether ``max-autotune`` is measured there."""
    return images in SEARCHED_IMAGES and dtype == "bfloat16" and shape.key != "swin_b"


def layer_chunk(shape: Shape, dtype: str) -> str:
    """The chunk of the whole suite that measures a layer in a dtype.

    On an H200 about 4 minutes for a ViT's layer in bfloat16, 8 for a ViT in float32 and for a stage of
    Swin in one dtype. The estimate: compiling 8 s a number of tokens and 40 s more where tiles are searched,
    then :data:`~benchmarks.timing.BUDGET` for each direction.
    """
    if shape.key == "swin_b":
        return f"layer-swin_b-{dtype}-stage{shape.layer[0]}"
    return f"layer-{shape.key}-{dtype}" + (f"-{shape.layer}" if dtype == "bfloat16" else "")


#: Training steps: key -> timm's name. Batch sizes are chunks of their own, as compiling takes minutes.
STEP_MODELS = {"vit_b": "vit_base_patch16_224", "vit_l": "vit_large_patch16_224"}
STEP_BATCHES = (64, 256)


def chunks() -> Iterator[str]:
    """Every chunk of the whole suite, each of under ten minutes on an H200 (an estimate), in order."""
    found = (layer_chunk(shape, dtype) for shapes in MODELS.values() for dtype in DTYPES for shape in shapes)
    yield from dict.fromkeys(found)
    yield "norm"
    yield "launch"
    yield from (f"step-{key}-{batch}" for key in STEP_MODELS for batch in STEP_BATCHES)
