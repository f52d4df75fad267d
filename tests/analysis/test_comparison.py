"""Tuned models side by side: what is compared with what, and how it is summed up."""

import json

import pytest
import torch

from rlrr_kernels import apply_rlrr
from rlrr_kernels.analysis import Tuned, analyze, layer_view, rlrr_of_model, scales_view
from rlrr_kernels.analysis.comparison import FORMAT, parts, summary
from rlrr_kernels.analysis.figure import draw
from rlrr_kernels.analysis.updates import LowRank, OutputScaled, Replaced
from tests.small_models import small_vit, stir


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rlrr():
    return rlrr_of_model(stir(apply_rlrr(small_vit())))


def others():
    return [
        Tuned("SSF", "ssf", {"blocks.0.mlp.fc1": OutputScaled(1 + 0.1 * normal(192))}),
        Tuned("LoRA", "one", {"blocks.0.mlp.fc1": LowRank(normal(2, 48), 0.01 * normal(192, 2), 2.0)}),
        Tuned("LoRA", "two", {"blocks.0.attn.proj": LowRank(normal(2, 48), 0.01 * normal(48, 2), 2.0)}, ("head",)),
    ]


def test_q_k_and_v_are_compared_apart_each_with_its_own_v(rlrr):
    base, tuned = rlrr
    (method,) = analyze(base, [tuned], layers="blocks.0.*", top=3)["methods"]
    assert list(method["layers"]) == [
        *(f"blocks.0.attn.{letter}" for letter in "qkv"),
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ]
    weight, update = base["blocks.0.attn.qkv"], tuned.updates["blocks.0.attn.qkv"]
    k = method["layers"]["blocks.0.attn.k"]
    expected = layer_view(weight[48:96], update(weight)[48:96], top=3)
    assert k["angles_in"] == pytest.approx(expected.angles_in)
    assert k["shape"] == (48, 48)
    assert k["scales"]["v"]["mean"] == pytest.approx(
        scales_view(update.scale_out[48:96], update.scale_in[1]).v.mean, rel=1e-6
    )
    assert k["share_rescaling"] == pytest.approx(1, abs=1e-6)


def test_only_a_fused_qkv_is_taken_apart():
    assert [(n, r.start, r.stop) for n, r in parts("b.qkv", normal(12, 4))] == [
        ("b.q", 0, 4),
        ("b.k", 4, 8),
        ("b.v", 8, 12),
    ]
    assert next(parts("qkv", normal(12, 4)))[0] == "q"
    for name, weight in (("b.qkv", normal(8, 4)), ("b.qkv_mlp", normal(12, 4)), ("b.fc1", normal(12, 4))):
        assert list(parts(name, weight)) == [(name, slice(0, len(weight)))]


def test_each_method_has_the_layers_that_it_tuned_under_a_label_of_its_own(rlrr):
    base, tuned = rlrr
    found = analyze(base, [tuned, *others()], layers="blocks.0.[am]*", top=2)
    assert (found["format"], found["top"]) == (FORMAT, 2)
    assert {m["label"]: len(m["layers"]) for m in found["methods"]} == {"RLRR": 6, "SSF": 1, "LoRA 1": 1, "LoRA 2": 1}
    by_label = {m["label"]: m for m in found["methods"]}
    fc1 = "blocks.0.mlp.fc1"
    assert by_label["SSF"]["layers"][fc1]["share_out"] == pytest.approx(1)
    assert by_label["SSF"]["layers"][fc1]["scales"]["u"]["mean"] == pytest.approx(
        float(0.1 * normal(192).mean()), rel=1e-5
    )
    assert by_label["LoRA 1"]["layers"][fc1]["update_rank"] == 2
    assert by_label["LoRA 1"]["layers"][fc1]["scales"] is None
    assert by_label["LoRA 2"]["skipped"] == ["head"]
    assert json.loads(json.dumps(found, allow_nan=False))["methods"][0]["label"] == "RLRR"


def test_a_method_that_no_chosen_layer_has_is_left_out(rlrr):
    base, tuned = rlrr
    assert [m["label"] for m in analyze(base, [tuned, *others()], layers="*.fc2", top=1)["methods"]] == ["RLRR"]
    with pytest.raises(ValueError, match=r"layers: 'blocks.7.\*' matches no layer that was tuned"):
        analyze(base, [tuned], layers="blocks.7.*")


def test_progress_sees_each_layer_once(rlrr):
    base, tuned = rlrr
    seen = []
    analyze(base, [tuned], layers="*.fc1", progress=lambda names: (seen.append(name) or name for name in names))
    assert seen == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


def test_errors_name_the_file_and_the_layer():
    base = {"a": normal(4, 3)}
    with pytest.raises(ValueError, match=r"here: a: the update is for a weight of shape \[5, 3\]"):
        analyze(base, [Tuned("full", "here", {"a": Replaced(normal(5, 3))})])
    with pytest.raises(ValueError, match="a: weight: expected finite numbers"):
        analyze(base, [Tuned("full", "here", {"a": Replaced(normal(4, 3) / 0)})])


def test_the_summary_is_the_median_over_layers_that_have_the_figure():
    base = {name: torch.eye(3) for name in "abc"}
    changes = {"a": 1.0, "b": 1.2, "c": 1.5}
    tuned = Tuned("full", "", {name: Replaced(factor * torch.eye(3)) for name, factor in changes.items()})
    found = analyze(base, [tuned])["methods"][0]["summary"]
    assert found["relative_update"] == pytest.approx(0.2)
    assert found["share_out"] == pytest.approx(1)  # of b and c: a has none
    unchanged = analyze(base, [Tuned("full", "", {"a": Replaced(torch.eye(3))})])["methods"][0]
    assert unchanged["summary"]["share_low_rank"] is None
    assert summary({})["rotation_in"] is None


@pytest.mark.parametrize("kinds", ["all", "without scales", "unchanged"])
def test_the_figure_is_a_png_with_a_panel_for_u_and_v_where_there_are_any(rlrr, kinds):
    base, tuned = rlrr
    chosen = {
        "all": [tuned, *others()],
        "without scales": others()[1:],
        "unchanged": [Tuned("full", "", {name: Replaced(weight) for name, weight in base.items()})],
    }[kinds]
    png = draw(analyze(base, chosen, top=2), "title")
    assert png.startswith(b"\x89PNG")
    height = int.from_bytes(png[20:24])
    assert (height > 1500) == (kinds == "all")
