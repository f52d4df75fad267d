"""``rlrr-finetune table``: which runs count, what is averaged, and what is printed beside it."""

import json
import re

import pytest

from rlrr_kernels.finetune.recipes import BACKBONE, VTAB_GROUPS, recipe
from tests.finetune.commands.conftest import status


def write(folder, task="vtab/cifar", accuracy=0.5, seed=0, protocol="final", model=BACKBONE, **settings):
    """The part of a run's metrics.json that the table reads."""
    folder.mkdir(parents=True)
    values = {"model": model, "method": "rlrr", "task": task or "", "data": "digits", "seed": seed, "lr": 1e-3}
    values |= settings
    metrics = {"settings": values, "protocol": protocol, "task": task, "test_accuracy": accuracy}
    (folder / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if v is not None}))


def summary(capsys, *paths):
    capsys.readouterr()
    assert status("table", "--format", "json", *paths) == 0
    return json.loads(capsys.readouterr().out)


def test_the_two_means_differ_and_say_over_how_many_tasks(tmp_path, capsys):
    write(tmp_path / "runs" / "a", "vtab/cifar", 0.9)
    write(tmp_path / "runs" / "b", "vtab/svhn", 0.7)
    write(tmp_path / "runs" / "deep" / "c", "vtab/kitti", 0.2)
    (column,) = summary(capsys, tmp_path)["columns"]
    vtab = column["benchmarks"]["vtab"]
    assert vtab["mean_over_tasks"] == pytest.approx(0.6)
    assert vtab["mean_of_group_means"] == pytest.approx((0.8 + 0.2) / 2)
    assert vtab["groups"] == pytest.approx({"natural": 0.8, "structured": 0.2})
    assert (vtab["tasks"], vtab["of_tasks"], len(vtab["missing"])) == (3, 19, 16)
    assert "vtab/eurosat" in vtab["missing"]

    assert status("table", tmp_path, "--format", "markdown") == 0
    out = capsys.readouterr().out
    assert "| natural | cifar | 90.0 |" in out
    assert "| specialized | eurosat | - |" in out
    assert f"| 1 | rlrr | {BACKBONE} | final | 1 | 3 of 19 | 60.0 | 80.0 | - | 20.0 | 50.0 (of 2 groups) |" in out
    assert f"| paper | RLRR | {BACKBONE} | best-on-test* | - | 19 of 19 | 74.5* | - | - | - | - |" in out
    assert "| paper | LoRA | " in out


def test_all_tasks_give_the_mean_of_the_three_groups(tmp_path, capsys):
    for number, name in enumerate(name for names in VTAB_GROUPS.values() for name in names):
        write(tmp_path / name, f"vtab/{name}", number / 100)
    (column,) = summary(capsys, tmp_path)["columns"]
    vtab = column["benchmarks"]["vtab"]
    assert vtab["mean_over_tasks"] == pytest.approx(0.09)  # 0 to 18
    assert vtab["mean_of_group_means"] == pytest.approx((0.03 + 0.085 + 0.145) / 3)  # 0-6, 7-10, 11-18
    assert vtab["missing"] == []


def test_seeds_are_averaged_before_tasks(tmp_path, capsys):
    for seed, accuracy in enumerate((0.2, 0.4, 0.9)):
        write(tmp_path / f"cifar{seed}", "vtab/cifar", accuracy, seed)
    write(tmp_path / "svhn", "vtab/svhn", 0.7)
    (column,) = summary(capsys, tmp_path)["columns"]
    cifar = column["tasks"]["vtab/cifar"]
    assert cifar["mean"] == pytest.approx(0.5)
    assert cifar["std"] == pytest.approx(0.13**0.5)  # (0.09 + 0.01 + 0.16) / (3 - 1)
    assert cifar["seeds"] == [0, 1, 2]
    assert column["tasks"]["vtab/svhn"]["std"] is None
    assert column["benchmarks"]["vtab"]["mean_over_tasks"] == pytest.approx(0.6)
    assert status("table", tmp_path, "--format", "markdown") == 0
    out = capsys.readouterr().out
    assert "| natural | cifar | 50.0 ± 36.1 (3) |" in out
    assert "| 1 to 3 | 2 of 19 |" in out


def test_protocols_are_never_averaged_together_and_best_on_test_is_marked(tmp_path, capsys):
    write(tmp_path / "a", accuracy=0.5, protocol="final")
    write(tmp_path / "b", accuracy=0.9, protocol="best-on-test")
    first, second = summary(capsys, tmp_path)["columns"]
    assert (first["protocol"], first["tasks"]["vtab/cifar"]["mean"]) == ("best-on-test", 0.9)
    assert (second["protocol"], second["tasks"]["vtab/cifar"]["mean"]) == ("final", 0.5)
    assert status("table", tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(r"cifar\W+90\.0\*\W+50\.0 ", out)
    assert re.search(r"1 of 19\W+90\.0\*", out)
    assert "50.0*" not in out
    assert "* best-on-test: the epoch was chosen on the test images" in out


def test_fgvc_has_one_mean_and_data_of_no_benchmark_none(tmp_path, capsys):
    write(tmp_path / "cub", "fgvc/cub", 0.8)
    write(tmp_path / "cars", "fgvc/cars", 0.9)
    write(tmp_path / "digits", None, 0.95, model="tiny", data="digits")
    found = summary(capsys, tmp_path)
    tiny = next(column for column in found["columns"] if column["model"] == "tiny")
    assert tiny["tasks"]["digits"]["mean"] == 0.95
    assert tiny["benchmarks"] == {}
    fgvc = next(column for column in found["columns"] if column["model"] == BACKBONE)["benchmarks"]["fgvc"]
    assert fgvc["mean_over_tasks"] == pytest.approx(0.85)
    assert fgvc["mean_of_group_means"] is None
    assert fgvc["missing"] == ["fgvc/nabirds", "fgvc/flowers", "fgvc/dogs"]
    assert {entry["benchmark"] for entry in found["published"]} == {"fgvc"}
    assert status("table", tmp_path, "--format", "markdown") == 0
    out = capsys.readouterr().out
    assert "| 2 of 5 | 85.0 |" in out
    assert "| digits | 95.0 |" in out
    assert "| cub | 95.0 |" not in out


def test_of_a_sweep_only_the_final_runs_count(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    write(sweep / "runs" / "one", accuracy=0.1)
    write(sweep / "final" / "two", accuracy=0.7, seed=1)
    write(sweep / "final" / "earlier choice", accuracy=0.2, seed=1)
    (sweep / "sweep.json").write_text(json.dumps({"final": [{"folder": "final/two"}]}))
    (column,) = summary(capsys, tmp_path)["columns"]
    assert column["tasks"]["vtab/cifar"]["accuracies"] == [0.7]


def test_a_sweep_without_a_final_run_is_left_out_also_where_it_is_named(tmp_path, capsys):
    sweep = tmp_path / "runs" / "deep" / "sweep"
    write(sweep / "runs" / "one", accuracy=0.1)
    (sweep / "sweep.json").write_text(json.dumps({"final": []}))
    why = f"{sweep}: a sweep that has no final run yet"
    assert status("table", tmp_path) == 2  # nothing else was found
    assert why in capsys.readouterr().err
    write(tmp_path / "runs" / "a", accuracy=0.7)
    found = summary(capsys, tmp_path, tmp_path / "runs" / "deep")
    assert [column["tasks"]["vtab/cifar"]["accuracies"] for column in found["columns"]] == [[0.7]]
    (line,) = found["left_out"]
    assert line.startswith(why)
    for form in ("markdown", "console"):
        assert status("table", tmp_path, "--format", form) == 0
        assert f"left out: {why}" in capsys.readouterr().out
    for named in (sweep, sweep / "sweep.json"):
        found = summary(capsys, tmp_path / "runs" / "a", named)
        assert found["left_out"] == [line]
        assert [column["tasks"]["vtab/cifar"]["accuracies"] for column in found["columns"]] == [[0.7]]


def test_what_a_killed_process_left_hidden_is_no_run(tmp_path, capsys):
    write(tmp_path / "runs" / "a", accuracy=0.9)
    write(tmp_path / "runs" / ".b.3f.partial", accuracy=0.1, lr=7.0)
    (column,) = summary(capsys, tmp_path / "runs")["columns"]
    assert column["benchmarks"]["vtab"]["mean_over_tasks"] == pytest.approx(0.9)


def test_one_run_given_twice_counts_once(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    (column,) = summary(capsys, tmp_path / "a", tmp_path, "a/metrics.json", ".")["columns"]
    assert column["tasks"]["vtab/cifar"]["seeds"] == [0]


def test_runs_without_a_test_are_left_out_and_named(tmp_path, capsys):
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1, accuracy=None)
    assert summary(capsys, tmp_path)["left_out"] == [f"{tmp_path / 'b'}: no test accuracy"]
    assert status("table", tmp_path / "b") == 2
    assert "b was tested" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "differ", "cells"),
    [
        ({"seed": 1, "batch_size": 64}, ["batch_size"], ("seed 0, batch_size 32", "seed 1, batch_size 64")),
        ({"seed": 0, "out": "elsewhere", "device": "cuda"}, [], ("seed 0", "seed 0")),
    ],
    ids=["two batch sizes", "one command twice"],
)
def test_runs_that_clash_are_listed_and_the_rest_is_printed(tmp_path, capsys, other, differ, cells):
    write(tmp_path / "a", accuracy=0.25)
    write(tmp_path / "b", accuracy=0.5, **other)
    assert status("table", tmp_path, "--format", "markdown") == 0  # nothing else is there
    assert f"| vtab/cifar | {tmp_path / 'b'} | {cells[1]} | 50.0 |" in capsys.readouterr().out
    write(tmp_path / "c", "vtab/svhn", 0.75)
    found = summary(capsys, tmp_path)
    (clash,) = found["clashes"]
    assert (clash["task"], clash["differ"]) == ("vtab/cifar", differ)
    runs = [(run["folder"], run["accuracy"]) for run in clash["runs"]]
    assert runs == [(str(tmp_path / "a"), 0.25), (str(tmp_path / "b"), 0.5)]
    (column,) = found["columns"]
    assert column["tasks"].keys() == {"vtab/svhn"}
    assert column["benchmarks"]["vtab"]["mean_over_tasks"] == 0.75
    for form in ("markdown", "console"):
        assert status("table", tmp_path, "--format", form) == 0
        out = capsys.readouterr().out
        assert re.search(rf"vtab/cifar\W+{re.escape(str(tmp_path / 'a'))}\W+{cells[0]}\W+25\.0 ", out)
        assert re.search(r"\bfinal\W+1\W+1 of 19\W+75\.0 ", out)


def test_what_cannot_be_read_hides_no_other_run(tmp_path, capsys):
    write(tmp_path / "a", accuracy=0.25)
    write(tmp_path / "far off", accuracy=7, seed=1)
    broken = {
        "cut off/metrics.json": "{",
        "no sweep/sweep.json": "[]",
        "torn/sweep.json": '{"final": [{"folder": "x"}]}',
    }
    for name, text in {**broken, "notes.txt": "", "empty/notes.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = summary(capsys, *sorted(tmp_path.iterdir()))
    assert [column["tasks"]["vtab/cifar"]["accuracies"] for column in found["columns"]] == [[0.25]]
    reasons = (
        ("cut off", "is not what a run writes"),
        ("far off", "test_accuracy: expected 0 to 1, got 7"),
        ("no sweep", "is not what a sweep writes"),
        ("torn/x", "is not a run folder"),
        ("notes.txt", "no run in it"),
        ("empty", "no run in it"),
    )
    assert len(found["left_out"]) == len(reasons)
    for name, why in reasons:
        assert any(line.startswith(str(tmp_path / name)) and why in line for line in found["left_out"]), name


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("rank", 4, "rank 4"),
        ("init", "identity", "init identity"),
        ("norm_affine", False, "norm_affine off"),
        ("patch_affine", False, "patch_affine off"),
        ("frozen_dtype", "bf16", "frozen_dtype bf16"),
        ("pretrained", False, "pretrained off"),
        ("checkpoint", "some.npz", "checkpoint some.npz"),
        ("img_size", 384, "img_size 384"),
        ("precision", "bf16", "precision bf16"),
        ("head_init", "zero", "head_init zero"),
        ("drop_path_kind", "element", "drop_path_kind element"),
        ("ema", 0.9998, "ema 0.9998"),
    ],
)
def test_runs_of_different_methods_under_one_name_are_columns_of_their_own(tmp_path, capsys, option, value, shown):
    write(tmp_path / "a", "vtab/cifar", 0.9)
    write(tmp_path / "b", "vtab/svhn", 0.1, **{option: value})
    write(tmp_path / "c", "vtab/cifar", 0.3, seed=1, **{option: value})
    columns = {column["settings"][option]: column for column in summary(capsys, tmp_path)["columns"]}
    assert len(columns) == 2
    assert columns.pop(value)["benchmarks"]["vtab"]["mean_over_tasks"] == pytest.approx(0.2)
    (plain,) = columns.values()
    assert plain["benchmarks"]["vtab"]["mean_over_tasks"] == pytest.approx(0.9)
    assert status("table", tmp_path, "--format", "markdown") == 0
    out = capsys.readouterr().out
    (number,) = re.findall(rf"\| (\d) \| rlrr † \| {BACKBONE} \| final \| 1 \| 2 of 19 \| 20\.0 \|", out)
    assert f"† Column {number} is rlrr with {shown}." in out
    assert out.count("†") == 2
    assert f" | rlrr | {BACKBONE} | final | 1 | 1 of 19 | 90.0 |" in out


def test_lora_s_rank_makes_a_column_and_options_of_other_methods_none(tmp_path, capsys):
    write(tmp_path / "a", "vtab/cifar", 0.9, method="lora", lora_rank=4)
    write(tmp_path / "b", "vtab/svhn", 0.1, method="lora", lora_rank=8)
    write(tmp_path / "c", "vtab/cifar", 0.2, method="full")
    write(tmp_path / "d", "vtab/svhn", 0.4, method="full", init="identity", norm_affine=False, lora_rank=8)
    write(tmp_path / "e", "vtab/cifar", 0.5, checkpoint="w.pth")
    write(tmp_path / "f", "vtab/svhn", 0.7, checkpoint="w.pth", pretrained=False)
    columns = summary(capsys, tmp_path)["columns"]
    means = [(column["method"], column["benchmarks"]["vtab"]["mean_over_tasks"]) for column in columns]
    assert means == [("full", pytest.approx(0.3)), ("lora", 0.9), ("lora", 0.1), ("rlrr", pytest.approx(0.6))]
    assert [column["settings"].get("lora_rank") for column in columns] == [None, 4, 8, None]


def test_a_setting_that_is_not_recorded_has_its_default(tmp_path, capsys):
    """As in runs from before the setting was added."""
    write(tmp_path / "a", seed=0)
    write(tmp_path / "b", seed=1, init="paper", ema=0.0, epochs=20)
    (column,) = summary(capsys, tmp_path)["columns"]
    assert column["tasks"]["vtab/cifar"]["seeds"] == [0, 1]


def test_other_settings_in_which_tasks_of_a_mean_differ_are_named(tmp_path, capsys):
    write(tmp_path / "a", "vtab/cifar", **recipe("vtab/cifar"))
    write(tmp_path / "b", "vtab/svhn", **recipe("vtab/svhn"))
    vtab = summary(capsys, tmp_path)["columns"][0]["benchmarks"]["vtab"]
    assert vtab["differ"] == {"drop_path": "recipe", "lr": "recipe"}
    write(tmp_path / "c", "vtab/clevr_count", **recipe("vtab/clevr_count") | {"epochs": 7, "lr": 0.25})
    vtab = summary(capsys, tmp_path)["columns"][0]["benchmarks"]["vtab"]
    assert vtab["differ"] == {"drop_path": "recipe", "epochs": "given", "flip": "recipe", "lr": "given"}
    for form in ("markdown", "console"):
        assert status("table", tmp_path, "--format", form) == 0
        out = capsys.readouterr().out
        assert "Column 1 averages over tasks that differ in drop_path, flip (as in their recipes); epochs, lr." in out
    # one task has nothing to differ from
    assert summary(capsys, tmp_path / "a")["columns"][0]["benchmarks"]["vtab"]["differ"] == {}


def test_paths_without_runs_are_refused(tmp_path, capsys):
    assert status("table", tmp_path) == 2
    assert "no run in" in capsys.readouterr().err
    assert status("table", tmp_path / "none") == 2
    assert "none does not exist" in capsys.readouterr().err


def test_a_real_run_is_read(tuned, capsys):
    (column,) = summary(capsys, tuned)["columns"]
    assert (column["method"], column["protocol"]) == ("rlrr", "choose-epoch")
