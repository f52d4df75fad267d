"""The model's report: what it prints, and its error against results that are made up here."""

import json
from dataclasses import replace

import pytest

from benchmarks import model, results
from benchmarks.search_space import GPUS, LAYERS, TARGETS, TOKENS, rows, variants
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import cost

H200 = GPUS["h200"][1]


def layer_result(direction, median, implementation=results.TRITON, backend="triton", dtype="bfloat16", **more):
    case = {"model": "ViT-B/16", "layer": "fc1", "n": 3072, "k": 768, "groups": 1, "m": 6304, "images": 32}
    timed = {} if median is None else {"median": median}
    return case | {"dtype": dtype, "direction": direction, "implementation": implementation, "backend": backend} | timed


def write_results(folder, found, suite="layer"):
    folder.mkdir(parents=True, exist_ok=True)
    head = {"chunk": "layer-vit_b", "date": "2000-01-01", "device": "made up", "processor": "", "versions": {}}
    text = json.dumps({"suite": suite, **head, "command": "", "results": found})
    (folder / f"{suite}.json").write_text(text)


def seconds(kernel, dtype="bfloat16", device=H200):
    return model.predict(kernel, 6304, 3072, 768, 1, dtype, device, False).prediction.seconds


def test_ratios_are_predicted_over_measured_and_add_up_over_kernels(tmp_path):
    forward, backward = seconds("forward"), seconds("grad_input") + seconds("grad_scales")
    write_results(
        tmp_path,
        [
            layer_result("forward", forward / 2),
            layer_result("backward", backward * 4),
            layer_result("both", forward + backward),
            layer_result("grad_scales", seconds("grad_scales"), results.GRAD_SCALES),
            layer_result("forward_no_grad", seconds("forward", "float32"), dtype="float32"),
            layer_result("forward", 1.0, results.FORMULA, None),
            layer_result("forward", 1.0, results.TRITON, "cuda"),
            layer_result("forward", None),
        ],
    )
    write_results(tmp_path, [{"implementation": results.TRITON}], suite="launch")
    found = model.errors(results.load(tmp_path), H200)
    assert [e.ratio for e in found] == pytest.approx([2, 0.25, 1, 1, 1])


def test_the_worst_case_is_the_farthest_from_one_on_either_side(tmp_path):
    base = seconds("forward")
    fast, slow, mid = (layer_result("forward", base * factor) for factor in (1 / 2, 5, 1 / 3))
    slow["layer"] = "fc2"
    write_results(tmp_path / "NVIDIA_H200", [fast, slow, mid])
    write_results(tmp_path / "cpu", [fast])
    (line,) = [line for line in model.error_tables(tmp_path) if line.startswith("| bfloat16")]
    assert line == "| bfloat16 | forward | 3 | 2.00 | 0.20 | ViT-B/16 fc2, M = 6,304 |"
    assert "No GPU has measured" not in model.page_tables(tmp_path)
    assert "No GPU has measured" in model.page_tables(tmp_path / "cpu")


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA_H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_gpus_are_told_by_the_names_drivers_report(name, gpu):
    assert model.gpu_of(name) == gpu


def test_a_row_of_the_table_is_the_heuristics_choice():
    lines = list(model.table(H200, ["vit_b fc2"], [197], "bfloat16", False))
    assert len(lines) == 2 + 3
    choice = configs.ranked("forward", 197, 768, 3072, 1, "half", "boxes", 2, 2, H200)[0]
    us, share = choice.prediction.seconds * 1e6, choice.prediction.useful / choice.prediction.seconds
    assert lines[2].startswith(f"| vit_b fc2 | 197 | forward | {us:.1f} | {share:.0%} | {choice.prediction.bound} |")
    c = choice.config
    assert f"{c.block_m}x{c.block_n}x{c.block_k} {c.num_warps}w {c.num_stages}s" in lines[2]
    assert choice.prediction.useful == pytest.approx(2 * 197 * 768 * 3072 / 989e12, rel=0.01)


def test_float32_is_by_tensor_cores_only_if_asked():
    exact, tf32 = (model.predict("forward", 6304, 3072, 768, 1, "float32", H200, flag) for flag in (False, True))
    assert exact.prediction.seconds > 2 * tf32.prediction.seconds
    assert exact.prediction.useful == pytest.approx(tf32.prediction.useful * 1024 / 128)


def test_the_page_keeps_what_is_written_by_hand():
    page = f"before\n{model.BEGIN}\nold\n{model.END}\nafter\n"
    once = model.regenerated(page, "new\n")
    assert once == f"before\n{model.BEGIN}\n\nnew\n\n{model.END}\nafter\n"
    assert model.regenerated(once, "new\n") == once
    with pytest.raises(ValueError, match="page: expected the lines"):
        model.regenerated("no markers", "new")


def test_the_page_is_what_the_model_gives():
    assert model.main(["--check"]) == 0, "run python -m benchmarks.model --write"


def test_the_command_says_that_it_predicts(capsys):
    assert model.main(["--gpu", "a100", "--layer", "vit_b proj", "--tokens", "197", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out
    assert out.count("| vit_b proj | 197 |") == 3


def test_gpus_of_the_page_reach_their_data_sheets_peaks():
    peaks = {"h200": 989, "h100": 989, "a100": 312, "l40s": 362, "b200": 2250, "rtx5090": 209.5}
    assert set(model.PAGE_GPUS) == set(peaks)
    for gpu, peak in peaks.items():
        assert cost.peak_flops("half", GPUS[gpu][1]) / 1e12 == pytest.approx(peak, rel=0.02)


def test_more_memory_bandwidth_is_all_that_sets_an_h200_apart():
    assert replace(GPUS["h100"][1], memory_bandwidth=H200.memory_bandwidth) == H200


def test_what_is_searched_fits_its_target_and_covers_the_paths():
    assert set(TOKENS) >= {1, 197, 6304, 50_432}
    assert {groups for _, _, groups in LAYERS.values()} == {1, 3}
    for architecture, device in TARGETS.items():
        names = [row.name for row in rows(device)]
        assert len(set(names)) == len(names) == (11 if device.has_wgmma else 8), architecture
        for row in rows(device):
            for config in variants("grad_input", row, device):
                assert config.num_stages >= 2
                assert row.path != "boxes" or configs.GROUP_STEP % config.block_n == 0
