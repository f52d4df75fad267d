"""Checkpoints of the published code. The ``.npz`` backbones that it starts from are in npz.py.

The code (github.com/zstarN70/RLRR) calls u ``scale_line`` [N, 1], v ``scale_col`` [1, K] and f ``shift_bias`` [1, N].
Its ViT has q, k and v as three layers; its Swin has one fused qkv.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rlrr_kernels.checkpoint.trained import check_fit, copy_into
from rlrr_kernels.io.checks import summarize
from rlrr_kernels.io.reading import read_pickled
from rlrr_kernels.models.adapt import apply_rlrr
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import head, unwrapped

_QKV = ("query", "key", "value")

#: Endings of published names -> ours.
_LEAVES = {
    "mlp.weight": "weight",
    "mlp.bias": "bias",
    "scale_col": "scale_in",
    "scale_line": "scale_out",
    "shift_bias": "shift",
}
_LINEAR = "weight|bias|scale_in|scale_out|shift"

#: Published names with our endings -> timm's.
_VIT = {
    r"transformer\.embeddings\.position_embeddings": "pos_embed",
    r"transformer\.embeddings\.cls_token": "cls_token",
    r"transformer\.embeddings\.patch_embeddings\.(weight|bias)": r"patch_embed.proj.\1",
    r"transformer\.embeddings\.ssf_(scale|shift)_patch": r"patch_embed.norm.ssf_\1",
    r"transformer\.encoder\.layer\.(\d+)\.attention_norm\.(weight|bias)": r"blocks.\1.norm1.\2",
    r"transformer\.encoder\.layer\.(\d+)\.ssf_(scale|shift)_attn_norm": r"blocks.\1.norm1.ssf_\2",
    rf"transformer\.encoder\.layer\.(\d+)\.attn\.(query|key|value)\.({_LINEAR})": r"blocks.\1.attn.qkv.\3.\2",
    rf"transformer\.encoder\.layer\.(\d+)\.attn\.out\.({_LINEAR})": r"blocks.\1.attn.proj.\2",
    r"transformer\.encoder\.layer\.(\d+)\.ffn_norm\.(weight|bias)": r"blocks.\1.norm2.\2",
    r"transformer\.encoder\.layer\.(\d+)\.ssf_(scale|shift)_ffn_norm": r"blocks.\1.norm2.ssf_\2",
    rf"transformer\.encoder\.layer\.(\d+)\.ffn\.(fc[12])\.({_LINEAR})": r"blocks.\1.mlp.\2.\3",
    r"transformer\.encoder\.encoder_norm\.(weight|bias)": r"norm.\1",
    r"transformer\.encoder\.ssf_(scale|shift)_enc_norm": r"norm.ssf_\1",
    r"head\.(weight|bias)": r"head.\1",
}
_SWIN = {
    r"(patch_embed\.(?:proj|norm)\.(?:weight|bias))": r"\1",
    r"(layers\.\d+\.blocks\.\d+\.norm[12]\.(?:weight|bias))": r"\1",
    r"(layers\.\d+\.blocks\.\d+)\.ssf_(scale|shift)_(norm[12])": r"\1.\3.ssf_\2",
    rf"(layers\.\d+\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:{_LINEAR}))": r"\1",
    r"(layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table)": r"\1",
    # recomputed by timm, or (the bias) never used by either
    r"layers\.\d+\.blocks\.\d+\.(?:attn\.relative_position_index|attn_mask)": "",
    r"layers\.\d+\.downsample\.reduction\.bias": "",
    rf"(layers\.\d+\.downsample\.(?:norm\.(?:weight|bias)|reduction\.(?:{_LINEAR})))": r"\1",
    r"norm\.(weight|bias)": r"norm.\1",
    r"ssf_(scale|shift)_encode_norm": r"norm.ssf_\1",
    r"head\.(weight|bias)": r"head.fc.\1",
}


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the published code's tensors to those of a timm model after :func:`~rlrr_kernels.apply_rlrr`.

    Args:
        state: A whole state dict, or an adapter's (names with ``head``, ``scale`` or ``shift``), of its ViT or Swin.

    Returns:
        Name -> tensor. W ``[3 D, D]``, b, u ``[3 D, 1]`` and f ``[3 D]`` of q, k and v are concatenated by rows; v is
        ``[3, 1, D]``. Swin's patch mergings move from the end of a stage to the start of the next, as in timm.

    Raises:
        ValueError: If a name is not one of the published code's, only one or two of q, k and v are there, or u, v or f
            has another shape; names the tensor.
    """
    if not any(name.startswith(("transformer.", "layers.")) for name in state):
        raise ValueError("state: it has no names of the published ViT (transformer.*) or Swin (layers.*)")
    rules = _VIT if any(name.startswith("transformer.") for name in state) else _SWIN
    converted: dict[str, Tensor] = {}
    unknown = []
    for published, tensor in state.items():
        name = _rename(published, rules)
        if name is None:
            unknown.append(published)
        elif name:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{published}: expected a tensor, got {type(tensor).__name__}")
            if name in converted:
                raise ValueError(f"{published}: it is there twice, under two names")
            converted[name] = _reshape(published, tensor)
    if unknown:
        raise ValueError(f"state: names that the published code does not have: {summarize(unknown)}")
    return _join(converted)


def _rename(published: str, rules: Mapping[str, str]) -> str | None:
    """timm's name; "" if timm has no such tensor; None if no rule matches."""
    for ending, ours in _LEAVES.items():
        if published.endswith(f".{ending}"):
            published = published.removesuffix(ending) + ours
            break
    for pattern, name in rules.items():
        match = re.fullmatch(pattern, published)
        if match:
            renamed = match.expand(name)
            return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", renamed)
    return None


def _reshape(published: str, tensor: Tensor) -> Tensor:
    """Check the shapes of u, v and f, and flatten f."""
    ending = published.rpartition(".")[2]
    expected = {"scale_col": (0, "[1, K]"), "shift_bias": (0, "[1, N]"), "scale_line": (1, "[N, 1]")}.get(ending)
    if expected is not None and (tensor.dim() != 2 or tensor.shape[expected[0]] != 1):
        raise ValueError(f"{published}: expected shape {expected[1]}, got {list(tensor.shape)}")
    return tensor.flatten() if ending == "shift_bias" else tensor


def _join(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join ``<name>.{query,key,value}`` to one ``<name>``: by rows, and v to ``[3, 1, K]``."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused, _, part = name.rpartition(".")
        if part not in _QKV:
            joined[name] = tensor
            continue
        missing = [part for part in _QKV if f"{fused}.{part}" not in tensors]
        if missing:
            raise ValueError(f"state: {fused} is incomplete: it has no {' and no '.join(missing)}")
        parts = [tensors[f"{fused}.{part}"] for part in _QKV]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"state: {fused} has q, k and v of shapes {[list(part.shape) for part in parts]}")
        joined[fused] = torch.stack(parts) if fused.endswith(".scale_in") else torch.cat(parts)
    return joined


def load_official_adapter(model: nn.Module, path: str | Path, *, load_head: bool = True) -> nn.Module:
    """Load a ``.pth`` of the published code into ``model``, in place.

    Args:
        model: timm's ViT or Swin of the same size: plain, or prepared with the default
            :class:`~rlrr_kernels.RLRRConfig`. A plain one is prepared. Its frozen weights must be those that the
            adapter was trained on; the file does not say which.
        path: The file. Code in it is not run.
        load_head: Load the head if the file has one; False leaves the model's head unchanged.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, holds anything but tensors, or does not fit the model, for example in the
            number of classes. The model is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    state = read_pickled(path)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    try:
        tensors = convert_official(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    target = unwrapped(model)
    if load_head:
        _check_classes(target, tensors, path)
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    optional = set()
    if not any(name.startswith("head.") for name in tensors):
        owned = {id(parameter) for parameter in head(target).parameters()}
        optional = {name for name, parameter in target.named_parameters() if id(parameter) in owned}
    config = RLRRConfig()
    if check_fit(target, config, tensors, f"checkpoint {path}", optional):
        apply_rlrr(model, config)
    copy_into(target, tensors)
    return model


def _check_classes(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    weight = next((tensors[name] for name in ("head.weight", "head.fc.weight") if name in tensors), None)
    classes = getattr(model, "num_classes", None)
    if weight is not None and weight.dim() == 2 and classes is not None and weight.shape[0] != classes:
        raise ValueError(
            f"{path}: its head has {weight.shape[0]} classes, the model {classes}; build the model with "
            f"num_classes={weight.shape[0]}, or pass load_head=False"
        )
