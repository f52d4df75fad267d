"""Reading one entry: everything that a launch would stumble over is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlrr_kernels.backends import triton as backend
from rlrr_kernels.backends.triton import tuned_file
from rlrr_kernels.backends.triton.config import Config
from rlrr_kernels.backends.triton.tuned_file import kernels_digest, parse
from tests.tune.entries import CONFIG, FORWARD, GRAD_INPUT, GRAD_SCALES, entry

GOOD = {
    "forward": entry(1000),
    "heuristic": entry(1000, config=None),
    "splits": entry(197, config=Config(64, 64, 64, 4, 3, splits=3)),
    "grad_input": entry(1000, GRAD_INPUT, Config(64, 64, 128, 8, 3)),
    "grad_scales": entry(1000, GRAD_SCALES, CONFIG, split_tokens=512),
    "measured": entry(1000, measured={"best_seconds": 1e-5}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_was_written_is_read(name):
    assert parse(GOOD[name].to_json()) == GOOD[name]
    assert parse(GOOD[name].to_json()).measured == GOOD[name].measured


@pytest.mark.parametrize(
    ("of", "field", "value"),
    [
        ("forward", "gpu", ""),
        ("forward", "gpu", 5),
        ("forward", "capability", [9]),
        ("forward", "capability", [9, "0"]),
        ("forward", "triton", None),
        ("forward", "kernels", []),
        ("forward", "kernel", "backward"),
        ("forward", "kernel", ["forward"]),
        ("forward", "m", 0),
        ("forward", "m", True),
        ("forward", "m", 1000.0),
        ("forward", "n", 2**50),
        ("forward", "k", "768"),
        ("forward", "groups", 5),
        ("forward", "kind", "bf16"),
        ("forward", "path", "box"),
        ("forward", "x_size", 8),
        ("forward", "x_size", 2.0),
        ("forward", "weight_size", 1),
        ("forward", "config", 5),
        ("forward", "config", {"block_m": 128}),
        ("forward", "config.block_m", 8),
        ("forward", "config.block_n", 96),
        ("forward", "config.block_k", 1024),
        ("forward", "config.block_k", 64.0),
        ("forward", "config.num_warps", 3),
        ("forward", "config.num_stages", 0),
        ("forward", "config.num_stages", True),
        ("forward", "config.splits", 0),
        ("forward", "config.splits", 2),  # over the workspace at 1000 tokens
        ("forward", "measured", []),
        ("grad_input", "config.block_n", 128),  # would run into the next group
        ("grad_scales", "config.splits", 2),
        ("grad_scales", "split_tokens", None),
        ("grad_scales", "split_tokens", 100),  # not whole steps of 128
        ("grad_scales", "split_tokens", 0),
    ],
)
def test_a_bad_field_is_named(of, field, value):
    raw = GOOD[of].to_json()
    name, _, leaf = field.partition(".")
    if leaf:
        raw[name][leaf] = value
    else:
        raw[name] = value
    with pytest.raises(ValueError, match=f"^{field}: "):
        parse(raw)


@pytest.mark.parametrize("field", [*FORWARD._fields, "gpu", "capability", "triton", "kernels", "m", "config"])
def test_a_missing_field_is_named(field):
    raw = GOOD["forward"].to_json()
    del raw[field]
    with pytest.raises(ValueError, match=f"^{field}: "):
        parse(raw)


def test_a_box_of_v_whose_stages_would_lie_too_close_is_refused():
    raw = entry(config=CONFIG).to_json()
    raw["config"]["block_k"] = 16
    with pytest.raises(ValueError, match="block_k: expected 32 or more with boxes, got 16"):
        parse(raw)


def test_more_splits_than_anything_needs_are_refused():
    raw = entry(2**20, GRAD_SCALES, CONFIG, split_tokens=128).to_json()
    with pytest.raises(ValueError, match="split_tokens: 8192 splits"):
        parse(raw)


def test_any_change_of_a_kernel_changes_the_digest(tmp_path):
    def digest(change: str = "", text: str = "\n") -> str:
        folder = tmp_path / f"{change or 'same'}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(Path(backend.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if change:
            with open(folder / change, "a") as file:
                file.write(text)
        return kernels_digest(folder)

    assert digest() == kernels_digest()
    for name in ("forward", "grad_input", "grad_scales", "tiles", "launch", "a_new_kernel"):
        assert digest(f"{name}.py") != kernels_digest(), name
    # what only chooses may change
    for name in ("config", "tuned", "layer_norm"):
        assert digest(f"{name}.py") == kernels_digest(), name


def test_the_format_is_stated():
    assert tuned_file.FORMAT == 1
