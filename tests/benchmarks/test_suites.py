"""The suites: their shapes are those of the models, groups are measured once, and failures are recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from benchmarks import (
    chunks,
    conftest,
    implementations,
    results,
    suite,
    test_launch,
    test_layer,
    test_norm,
    test_vit_step,
    timing,
)
from benchmarks.chunks import MODELS, Shape
from benchmarks.groups import groups
from benchmarks.results import LaunchCase, Result
from benchmarks.suite import Outcome, Recorder, Rivals
from rlrr_kernels import FusedRLRRLinear, apply_rlrr

ROOT = Path(__file__).parents[2]
TINY = Shape("vit_b", "tiny", "qkv", 5, 24, 16, 3)


@pytest.mark.parametrize(
    ("key", "name", "blocks"),
    [
        ("vit_b", "vit_base_patch16_224", ["blocks.0"]),
        pytest.param("vit_l", "vit_large_patch16_224", ["blocks.0"], marks=pytest.mark.slow),
        pytest.param("vit_h", "vit_huge_patch14_224", ["blocks.0"], marks=pytest.mark.slow),
        ("swin_b", "swin_base_patch4_window7_224", [f"layers.{i}.blocks.0" for i in range(4)]),
    ],
)
def test_shapes_are_those_that_the_model_trains(key, name, blocks):
    with torch.device("meta"):
        model = timm.create_model(name)
    seen: dict[str, int] = {}

    def count(block: str, x: torch.Tensor) -> None:
        seen[block] = x.numel() // x.shape[-1]

    for block in blocks:
        model.get_submodule(block).register_forward_pre_hook(lambda _, args, block=block: count(block, args[0]))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    apply_rlrr(model)
    expected = [
        (layer.split(".")[-1], seen[block], linear.out_features, linear.in_features, linear.groups)
        for block in blocks
        for layer, linear in model.get_submodule(block).named_modules()
        if isinstance(linear, FusedRLRRLinear)
    ]
    got = [(s.layer.split(".")[-1], s.tokens, s.n, s.k, s.groups) for s in MODELS[key]]
    assert got == expected


def _group(direction: str, dtype: str = "float32") -> Rivals:
    return Rivals("layer", "layer-tiny", (TINY, 2, dtype, direction, 1), "label")


def _fail(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate too much\nmore")


def test_a_group_survives_a_rival_and_its_file_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(implementations._FUNCTIONS, results.FACTORED, _fail)
    monkeypatch.setattr(implementations.choice, "refusal", lambda name, *_: "them" if name == "cuda" else None)
    names = [results.OURS, results.FACTORED, results.CUDA, results.FORMULA, results.THREE_OPS]
    recorder = Recorder(tmp_path, "command")
    calls = []

    def measure(asked: list[str]) -> dict[str, Outcome]:
        calls.append(asked)
        return test_layer._measure(_group("both"), (3, 3), asked)

    for _ in names:
        outcomes = recorder.outcomes(_group("both"), names, measure)
    assert calls == [names]
    assert outcomes[results.CUDA].unavailable
    assert outcomes[results.CUDA].result.error == "Unavailable: backend 'cuda' cannot serve them"
    (chunk,) = results.load(tmp_path)
    rows = {row["implementation"]: row for row in chunk["results"]}
    assert rows.keys() == {results.OURS, results.FACTORED, results.FORMULA, results.THREE_OPS}
    assert rows[results.FACTORED]["error"] == "OutOfMemoryError: tried to allocate too much"
    assert "seconds" not in rows[results.FACTORED]
    ours, formula = rows[results.OURS], rows[results.FORMULA]
    assert (ours["model"], ours["layer"], ours["n"], ours["k"], ours["groups"]) == ("tiny", "qkv", 24, 16, 3)
    assert (ours["m"], ours["images"], ours["direction"]) == (10, 2, "both")
    assert (ours["backend"], formula["backend"]) == (
        implementations.backend_for(torch.empty(10, 16), torch.empty(24, 16)),
        None,
    )
    assert all(len(row["seconds"]) == 3 for row in (ours, formula))
    assert (ours["same_function"], rows[results.THREE_OPS]["same_function"]) == (True, False)
    assert (ours["saved_bytes"], ours["saved_x"]) == (0, True)
    assert formula["saved_bytes"] >= 4 * 24 * 16


def test_a_file_is_complete_only_with_every_planned_test(tmp_path):
    def result(call: str, name: str = results.OURS) -> Outcome:
        return Outcome(Result(LaunchCase(call, "float32", name, "cpu"), [1.0]))

    first, second = (Rivals("launch", "a", (call,), call) for call in ("forward", "both"))
    planned = {"a": {(first, results.OURS), (first, results.PLAIN), (second, results.OURS)}}
    both = [results.OURS, results.PLAIN]

    def measure(group: Rivals):
        return lambda names: {name: result(group.key[0], name) for name in names}

    recorder = Recorder(tmp_path, "command", planned)
    recorder.outcomes(first, both, measure(first))
    assert [path.name for path in tmp_path.iterdir()] == ["a-partial.json"]
    recorder.outcomes(second, [results.OURS], measure(second))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (chunk,) = results.load(tmp_path)
    assert (chunk["complete"], len(chunk["results"]), chunk["rounds"]) == (True, 3, [10, 200])
    # with one implementation deselected: beside it
    recorder = Recorder(tmp_path, "command", planned)
    recorder.outcomes(first, [results.OURS], measure(first))
    recorder.outcomes(second, [results.OURS], measure(second))
    assert json.loads((tmp_path / "a-partial.json").read_text())["complete"] is False
    assert len(results.load(tmp_path)[0]["results"]) == 3
    # of other cases or rounds than planned
    Recorder(tmp_path / "b", "command").outcomes(first, both, measure(first))
    assert not results.load(tmp_path / "b")[0]["complete"]


def test_a_broken_gpu_ends_the_session_after_the_group_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "gpu_fault", lambda: "AcceleratorError: illegal access")
    group = Rivals("launch", "a", ("forward",), "launch-forward")
    outcome = Outcome(Result(LaunchCase("forward", "float32", results.OURS, "cpu"), [1.0]))
    with pytest.raises(pytest.exit.Exception, match="under launch-forward, chunk a ends here: AcceleratorError"):
        Recorder(tmp_path, "c").outcomes(group, [results.OURS], lambda _: {results.OURS: outcome})
    (chunk,) = results.load(tmp_path)
    assert (chunk["complete"], len(chunk["results"])) == (False, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in results.NORM_IMPLEMENTATIONS if n != results.FORMULA_COMPILED])
def test_layer_norms_rivals_compute_the_same(name, dtype):
    x = torch.randn(3, test_norm.D).to(test_norm.DEVICE, dtype).requires_grad_()
    dy = torch.randn_like(x)
    rivals = test_norm.layers(dtype)
    (layer, trained), (norm, _) = rivals[name], rivals[results.LAYER_NORM]
    assert isinstance(norm, nn.LayerNorm)
    if name == results.LAYER_NORM:
        assert not any(p.requires_grad for p in norm.parameters())
        return
    s, t = trained
    wide = [p.detach().double().requires_grad_() for p in (x, s, t)]
    weight, bias = norm.weight.double(), norm.bias.double()
    want = nn.functional.layer_norm(wide[0], (test_norm.D,), weight, bias, norm.eps) * wide[1] + wide[2]
    y = layer(x)
    assert y.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, s, t), dy)), (want, *torch.autograd.grad(want, wide, dy.double())), strict=True
    )
    for got, exact in pairs:
        assert (got.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("option", [None, "--results", "--chunk", "--everything"])
def test_a_plain_session_has_the_strongest_rivals_only(option):
    asked = {"--dtype": chunks.DTYPES} | ({option: "layer-vit_b"} if option else {})
    config = SimpleNamespace(getoption=asked.get, stash=pytest.Stash())
    found: list[str] = []
    metafunc = SimpleNamespace(config=config, parametrize=lambda _, tests: found.extend(t.values[1] for t in tests))
    test_layer.pytest_generate_tests(metafunc)
    assert {results.OURS, results.FORMULA, results.RECOMPUTE_COMPILED, results.PLAIN} <= set(found)
    assert (results.HIRA in found) == (results.FACTORED in found) == (option is not None)
    assert bool(suite.everything(config)) == (option is not None)


def _asked(**options) -> SimpleNamespace:
    """Return the config of a session with these options, ``chunk="a"`` for ``--chunk a``."""
    asked = {"--dtype": chunks.DTYPES} | {f"--{name}": value for name, value in options.items()}
    asked["keyword"] = options.get("keyword", "")
    return SimpleNamespace(getoption=asked.get, stash=pytest.Stash(), invocation_params=SimpleNamespace(args=()))


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"chunk": "step-vit_b-64"}, [("step-vit_b-64", 64)]),
        (
            {"chunk": "step-vit_b"},
            [("step-vit_b-64", 64), ("step-vit_b-256", 256), ("step-vit_b-r8", 64), ("step-vit_b-r32", 64)],
        ),
        # in place of the batch size that names the chunk, once
        ({"chunk": "step-vit_b-64", "images": [1]}, [("step-vit_b-64", 1)]),
        (
            {"chunk": "step-vit_b", "images": [1, 2]},
            [(f"step-vit_b-{end}", images) for end in ("64", "r8", "r32") for images in (1, 2)],
        ),
        ({"chunk": "step-vit_b-64", "dtype": ["float32"]}, []),
        ({"images": [2]}, [("step-slice", 2), ("step-slice-r8", 2), ("step-slice-r32", 2)]),
    ],
)
def test_images_change_what_a_chunk_measures_and_not_which_it_is(options, groups):
    config = _asked(**options)
    found: list[Rivals] = []
    metafunc = SimpleNamespace(config=config, parametrize=lambda _, tests: found.extend(t.values[0] for t in tests))
    test_vit_step.pytest_generate_tests(metafunc)
    bfloat16 = [group for group in dict.fromkeys(found) if group.key[2] == "bfloat16"]
    assert [(group.chunk, group.key[1]) for group in bfloat16] == groups
    assert suite.planned(config) == bool(found)


def _planned(module, **options) -> dict[Rivals, set[str]]:
    """Return group -> implementations of a suite's session."""
    found: dict[Rivals, set[str]] = {}

    def parametrize(_, tests):
        for test in tests:
            found.setdefault(test.values[0], set()).add(test.values[1])

    module.pytest_generate_tests(SimpleNamespace(config=_asked(**options), parametrize=parametrize))
    return found


@pytest.mark.parametrize("module", [test_layer, test_vit_step, test_launch])
@pytest.mark.parametrize(("rank", "other"), [(8, 32), (32, 8)])
def test_groups_of_a_rank_have_its_rivals_alone_and_come_last(module, rank, other, monkeypatch):
    monkeypatch.setattr(module, "DEVICE", "cpu")
    found = _planned(module, results="folder")
    own = {group: names for group, names in found.items() if group.key[-1] == rank}
    never = {results.LORA, results.HIRA, results.FACTORED, results.PRODUCTS, results.THREE_OPS, results.PROBE}
    for names in own.values():
        assert {results.OURS, results.HIRAS[rank]} <= names
        assert not names & {results.HIRAS[other], *never}
    first = {group: names for group, names in found.items() if group.key[-1] == 1}
    assert not any(results.HIRAS[rank] in names for names in first.values())
    assert min(group.place for group in own) > max(group.place for group in first)
    assert {f"-r{rank}" in group.label for group in own} == {True}
    assert {f"-r{rank}" in group.label for group in first} == {False}
    keys = {group.key[1:3] if module is test_vit_step else group.key[:2] for group in own}
    calls = {(call, dtype) for call in test_launch.CALLS for dtype in chunks.DTYPES}
    assert (
        keys
        == {
            test_layer: {(shape, 8) for shape in MODELS["vit_b"] if shape.layer in ("qkv", "proj")},
            test_vit_step: {(4, dtype) for dtype in chunks.DTYPES},
            test_launch: calls,
        }[module]
    )


def test_options_that_leave_no_test_are_an_error():
    config = _asked(chunk="step-vit_b-64", dtype=["float32"])
    with pytest.raises(pytest.UsageError, match=r"--chunk: expected the start .* dtypes float32, got 'step-vit_b-64'"):
        conftest.pytest_collection_modifyitems(config, [])


def test_sessions_narrowed_in_different_ways_keep_what_each_measured(tmp_path):
    """The report takes one of several measurements of a group."""
    group = Rivals("launch", "a", ("forward",), "label")
    for seconds, options in ((1.0, {}), (2.0, {"images": [64, 1]}), (3.0, {"keyword": "not autotune"})):
        recorder = suite.recorder_of(_asked(results=tmp_path, **options))
        case = LaunchCase("forward", "float32", results.OURS, "cpu")
        recorder.outcomes(group, [results.OURS], lambda _, s=seconds, c=case: {results.OURS: Outcome(Result(c, [s]))})
    names = ["a-partial-images-64-1.json", "a-partial-k-not-autotune.json", "a-partial.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (found,) = groups(results.load(tmp_path))
    assert found.median(results.OURS) == 2.0  # of the first in order
    results.write(tmp_path, "launch", "a", "command", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_training_step_is_written_as_its_rounds_go(tmp_path, monkeypatch):
    """If its process is killed in between, a group of minutes leaves what it has, as incomplete."""
    names = [results.OURS, results.OFFICIAL, results.PROBE]
    model = test_vit_step.Model("tiny", "vit_tiny_patch16_224", 1)
    group = Rivals("step", "step-slice", (model, 1, "float32", 1), "label")
    recorder = Recorder(tmp_path, "command", {"step-slice": {(group, name) for name in names}}, rounds=(3, 3))
    kept: list[tuple[bool, dict[str, int]]] = []

    def kill_in_the_second_round(group, found):
        keep(group, found)
        (chunk,) = results.load(tmp_path)
        kept.append((chunk["complete"], {row["implementation"]: len(row["seconds"]) for row in chunk["results"]}))
        if len(kept) == 2:
            raise KeyboardInterrupt

    keep = recorder.keep
    monkeypatch.setattr(recorder, "keep", kill_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        recorder.outcomes(group, names, lambda names: test_vit_step._measure(group, (3, 3), names, recorder))
    assert kept == [(False, dict.fromkeys(names, 1)), (False, dict.fromkeys(names, 2))]


def test_groups_that_would_end_too_late_are_left_out(tmp_path, monkeypatch):
    """Each takes a minute for each unit of its work; there are two and a half minutes."""
    now = [0.0]
    monkeypatch.setattr(suite.time, "monotonic", lambda: now[0])
    recorder = Recorder(tmp_path, "command", minutes=2.5)

    def outcomes(suite: str, call: str, work: float) -> dict[str, Outcome]:
        def measure(names: list[str]) -> dict[str, Outcome]:
            now[0] += 60 * work
            return {results.OURS: Outcome(Result(LaunchCase(call, "float32", results.OURS, "cpu"), [1.0]))}

        return recorder.outcomes(Rivals(suite, suite, (call,), call, work=work), [results.OURS], measure)

    assert outcomes("launch", "forward", 1.0)
    assert outcomes("launch", "both", 2.0) == {}  # two minutes, and one has passed
    assert outcomes("launch", "no_grad", 1.0)
    assert outcomes("launch", "both", 2.0) == {}
    assert outcomes("launch", "forward", 1.0)  # measured before
    assert outcomes("layer", "both", 0.1) == {}  # of another suite nothing is known: half a minute is left
    assert {group.suite for group in recorder.left_out} == {"launch", "layer"}
    assert [[row["call"] for row in chunk["results"]] for chunk in recorder.chunks()] == [["forward", "no_grad"]]


@pytest.mark.slow
def test_a_plain_session_measures_and_ends_with_the_table(tmp_path):
    """A real session on two of a group's rivals; ours is measured beside them, though not selected."""
    options = [
        "-k",
        "no_grad-float32-plain or no_grad-float32-formula",
        "--rounds",
        "4",
    ]
    written = ["--results", str(tmp_path), f"--benchmark-json={tmp_path / 'table'}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks/test_launch.py"]
    # a session of its own, also where this one is a worker of pytest-xdist: that would switch timing off
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *options, *written], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    *_, title, head, line, _ = done.stdout.strip().splitlines()
    assert "above 1 where ours is faster" in title
    assert "formula" in head
    assert line.startswith("call: no_grad  float32  forward, no graph  ")
    (chunk,) = results.load(tmp_path)
    rows = {row["implementation"]: row for row in chunk["results"]}
    assert rows.keys() == {results.PLAIN, results.FORMULA, results.OURS}
    medians = {name: row["median"] for name, row in rows.items()}
    ratios = (medians[results.FORMULA] / medians[results.OURS], medians[results.PLAIN] / medians[results.OURS])
    assert line.split("graph")[1].split() == [f"{ratios[0]:.2f}", "plain", "linear", f"{ratios[1]:.2f}"]
    (file,) = tmp_path.glob("*.json")
    assert not chunk["complete"]
    assert file.name == "launch-partial-rounds-4-k-no-grad-float32-plain-or-no-grad-float32-formula.json"
    assert chunk["command"].startswith("python -m pytest -p no:cacheprovider benchmarks/test_launch.py -k 'no_grad")
    table = json.loads((tmp_path / "table").read_text())["benchmarks"]
    assert {bench["group"] for bench in table} == {"launch-no_grad-float32"}
    assert {bench["params"]["implementation"] for bench in table} == {results.PLAIN, results.FORMULA}
    for bench in table:
        row = rows[bench["params"]["implementation"]]
        assert bench["stats"]["data"] == pytest.approx(row["seconds"], abs=1e-9)
        assert bench["extra_info"]["clock"] == "wall"
