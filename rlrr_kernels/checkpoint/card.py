"""The README of an adapter folder, with front matter for model hubs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from rlrr_kernels.checkpoint.manifest import Manifest
from rlrr_kernels.io.checks import sanitize


def model_card(model: nn.Module, manifest: Manifest, metadata: Mapping[str, str]) -> bytes:
    """Markdown text: what the adapter is, how to load it, and a table of ``metadata``."""
    hub_name = _hub_name(model)
    front = {"library_name": "rlrr_kernels", "tags": ["rlrr", "parameter-efficient-fine-tuning"]}
    if hub_name is not None:
        front["base_model"] = hub_name
        if manifest.num_classes:
            front["pipeline_tag"] = "image-classification"
    method = "an RLRR adapter" if manifest.rlrr is not None else "the trained parameters"
    base = hub_name or manifest.base_model["architecture"] or manifest.base_model["class"]
    lines = [
        "---",
        # JSON strings and lists are valid YAML
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        "---",
        "",
        f"# Adapter of {base}",
        "",
        f"This folder holds {method} of `{base}`: {manifest.parameters:,} numbers in `adapter_model.safetensors`, "
        "and none of the frozen weights. `adapter_config.json` says which layers they belong to.",
        "",
        "```python",
        *_code(model, manifest),
        "```",
        "",
    ]
    if metadata:
        lines += ["| | |", "| --- | --- |", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in metadata.items()), ""]
    if manifest.class_names is not None:
        names = ", ".join(_cell(sanitize(name)) for name in manifest.class_names)
        lines += [f"Classes, in the order of the logits: {names}.", ""]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines += [f"Written with {versions}.", ""]
    return "\n".join(lines).encode()


def _code(model: nn.Module, manifest: Manifest) -> list[str]:
    architecture, tag = manifest.base_model["architecture"], manifest.base_model["tag"]
    load = ['load_adapter(model, "path/to/this/folder")']
    if architecture is None:
        return ["from rlrr_kernels import load_adapter", "", "model = ...  # the model that was tuned", *load]
    arguments = [json.dumps(architecture + (f".{tag}" if tag else "")), "pretrained=True"]
    if manifest.num_classes is not None:
        arguments.append(f"num_classes={manifest.num_classes}")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(_config(model).get("input_size") or ())[1:]:
        arguments.append(f"img_size={tuple(size)}")
    # models that another package registers with timm are known after its import only
    registrar = _registrar(architecture)
    imports = ["import timm", *([f"import {registrar}"] if registrar else [])]
    return [
        *sorted(imports),
        "from rlrr_kernels import load_adapter",
        "",
        f"model = timm.create_model({', '.join(arguments)})",
        *load,
    ]


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _hub_name(model: nn.Module) -> str | None:
    name = _config(model).get("hf_hub_id")
    return name if isinstance(name, str) and name.count("/") == 1 and not name.endswith("/") else None


def _registrar(architecture: str) -> str | None:
    timm = sys.modules.get("timm")
    if timm is None or not timm.is_model(architecture):
        return None
    module: str = timm.model_entrypoint(architecture).__module__
    return None if module.startswith("timm.") else module


def _cell(text: str) -> str:
    """Escape text for one cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
