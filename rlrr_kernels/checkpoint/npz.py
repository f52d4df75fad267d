"""Google's ViT weights in ``.npz`` files: all arrays are checked, then timm's own loader copies them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rlrr_kernels.checkpoint.trained import check_unmerged
from rlrr_kernels.io.checks import summarize
from rlrr_kernels.io.reading import Header, npz_arrays, npz_headers
from rlrr_kernels.models.disable import remember_base
from rlrr_kernels.models.modules import adapters, head, unwrapped

Shape = tuple[int, ...]

_POSITIONS = "Transformer/posembed_input/pos_embedding"

#: Arrays by which timm recognises other layouts, which are not supported here.
_OTHER_LAYOUTS = (
    "params/embedding/kernel",
    "params/img/embedding/kernel",
    "pos_embedding",
    "Transformer/encoderblock/LayerNorm_0/scale",
)


def load_npz_backbone(model: nn.Module, path: str | Path) -> nn.Module:
    """Load Google's ViT weights (such as ``imagenet21k/ViT-B_16.npz``) into a timm ViT, with timm's own loader.

    Position embeddings are resized as timm does. The head is loaded if it has the same number of classes.

    Args:
        model: A timm ``VisionTransformer``, plain or after :func:`~rlrr_kernels.apply_rlrr`.
        path: The file, in the layout with ``Transformer/encoderblock_<i>``; pickled arrays are refused.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If the model is not a timm ``VisionTransformer``.
        ValueError: If an array is missing, damaged or of another shape, or the model has a parameter for which the
            format has no array. The model is then unchanged.
    """
    from timm.models.vision_transformer import VisionTransformer

    path, target = Path(path), unwrapped(model)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not isinstance(target, VisionTransformer):
        raise TypeError(f"model: expected a timm VisionTransformer, got {type(target).__name__}")
    check_unmerged(target)
    expected = _expected_arrays(target)
    headers = npz_headers(path)
    try:
        names = _check(headers, expected, target)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    # verifies the checksums before anything is copied
    npz_arrays(path, names)
    target.load_pretrained(str(path))
    if hasattr(target, "rlrr_config"):
        remember_base(target)
    return model


def _expected_arrays(model: Any) -> dict[str, Shape]:
    """Name -> shape of all arrays that the model's parameters are made of.

    Raises:
        ValueError: If the format has no array for a parameter, or a parameter has no data.
    """
    dim = model.embed_dim
    arrays: dict[str, dict[str, Shape]] = {
        "cls_token": {"cls": (1, 1, dim)},
        "pos_embed": {_POSITIONS: (1, 0, dim)},  # _check fills in the length that the file has
        "norm.weight": {"Transformer/encoder_norm/scale": (dim,)},
        "norm.bias": {"Transformer/encoder_norm/bias": (dim,)},
    }
    patch = getattr(model.patch_embed, "proj", None)
    if isinstance(patch, nn.Conv2d):
        arrays["patch_embed.proj.weight"] = {"embedding/kernel": (*patch.kernel_size, patch.in_channels, dim)}
        arrays["patch_embed.proj.bias"] = {"embedding/bias": (dim,)}
    for i, block in enumerate(model.blocks):
        arrays |= _block_arrays(block, f"blocks.{i}", f"Transformer/encoderblock_{i}", dim)
    own = {id(parameter) for parameter in head(model).parameters()}
    for _, module in adapters(model):
        own |= {id(p) for name, p in module.named_parameters(recurse=False) if name not in ("weight", "bias")}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own and name not in arrays:
            raise ValueError(f"model: Google's .npz format has no array for its {name}")
        if parameter.is_meta:
            raise ValueError(f"model: {name} is on the meta device; load into a model that has memory")
    lacking = sorted(arrays.keys() - {name for name, _ in model.named_parameters()})
    if lacking:
        raise ValueError(f"model: it has no {lacking[0]}, as a ViT of Google's .npz format has")
    return {array: shape for of_one in arrays.values() for array, shape in of_one.items()}


def _block_arrays(block: Any, ours: str, theirs: str, dim: int) -> dict[str, dict[str, Shape]]:
    """Parameter -> its arrays (three for a fused qkv) and their shapes, of one block."""
    heads, hidden = block.attn.num_heads, block.mlp.fc1.out_features
    attention, mlp = f"{theirs}/MultiHeadDotProductAttention_1", f"{theirs}/MlpBlock_3"
    split = (heads, dim // heads)
    qkv = ("query", "key", "value")
    arrays: dict[str, dict[str, Shape]] = {
        f"{ours}.attn.qkv.weight": {f"{attention}/{part}/kernel": (dim, *split) for part in qkv},
        f"{ours}.attn.qkv.bias": {f"{attention}/{part}/bias": split for part in qkv},
        f"{ours}.attn.proj.weight": {f"{attention}/out/kernel": (*split, dim)},
        f"{ours}.attn.proj.bias": {f"{attention}/out/bias": (dim,)},
        f"{ours}.mlp.fc1.weight": {f"{mlp}/Dense_0/kernel": (dim, hidden)},
        f"{ours}.mlp.fc1.bias": {f"{mlp}/Dense_0/bias": (hidden,)},
        f"{ours}.mlp.fc2.weight": {f"{mlp}/Dense_1/kernel": (hidden, dim)},
        f"{ours}.mlp.fc2.bias": {f"{mlp}/Dense_1/bias": (dim,)},
    }
    for norm, number in (("norm1", 0), ("norm2", 2)):
        arrays[f"{ours}.{norm}.weight"] = {f"{theirs}/LayerNorm_{number}/scale": (dim,)}
        arrays[f"{ours}.{norm}.bias"] = {f"{theirs}/LayerNorm_{number}/bias": (dim,)}
    return arrays


def _check(file: Mapping[str, Header], expected: Mapping[str, Shape], model: Any) -> list[str]:
    """Check shapes and dtypes, and return the names in the file of the arrays that the model is made of."""
    prefix = "opt/target/" if "opt/target/embedding/kernel" in file else ""
    other = next((name for name in _OTHER_LAYOUTS if name in file or prefix + name in file), None)
    if other is not None:
        raise ValueError(f"{other} belongs to another layout than that of ViT-B_16.npz")
    wanted = dict(expected)
    if prefix + "embedding/kernel" in file:
        shape = file[prefix + "embedding/kernel"].shape
        if len(shape) == 4 and shape[2] == 3:  # timm adapts three colours to the model's channels
            wanted["embedding/kernel"] = (*wanted["embedding/kernel"][:2], 3, model.embed_dim)
    if prefix + _POSITIONS in file:
        wanted[_POSITIONS] = _resizable(file[prefix + _POSITIONS].shape, tuple(model.pos_embed.shape))
    head, biases = model.head, file.get(prefix + "head/bias")
    if isinstance(head, nn.Linear) and biases is not None and biases.shape[-1:] == head.bias.shape:
        # timm loads it then
        wanted |= {"head/kernel": tuple(head.weight.T.shape), "head/bias": tuple(head.bias.shape)}
    problems = []
    for name, shape in wanted.items():
        if prefix + name not in file:
            problems.append(f"missing {prefix + name}")
            continue
        array = file[prefix + name]
        if array.shape != shape:
            problems.append(f"{prefix + name} of shape {list(array.shape)}, expected {list(shape)}")
        elif array.dtype.kind != "f" or array.dtype.itemsize > 8 or not array.dtype.isnative:
            problems.append(f"{prefix + name} of {array.dtype}, expected floating point numbers")
    if problems:
        raise ValueError(summarize(problems))
    return [prefix + name for name in wanted]


def _resizable(found: Shape, expected: Shape) -> Shape:
    """``found`` if timm can resize such position embeddings (a class token and a square grid), else ``expected``."""
    if len(found) != 3 or found[0] != 1 or found[1] < 2 or found[2] != expected[2]:
        return expected
    return found if math.isqrt(found[1] - 1) ** 2 == found[1] - 1 else expected
