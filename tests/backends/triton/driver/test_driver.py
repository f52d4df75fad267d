"""Triton's own launcher on a driver that refuses bad launches: every pass, dtype and odd shape, twice each."""

import json
import subprocess
import sys

import pytest

from tests.backends.triton.driver.log import launches, misaligned
from tests.once import once

KERNELS = {
    "forward": ["forward_kernel"],
    "grad_input": ["grad_input_kernel"],
    "grad_scales": ["grad_scales_kernel", "sum_partials_kernel"],
    "layer_norm": ["forward_kernel", "backward_kernel", "sum_partials_kernel"],
}


def _run(tmp_path_factory, *groups):
    """Run ``python -m tests.backends.triton.driver``, in a process that does not interpret; return what it prints."""

    def probe(folder):
        command = [sys.executable, "-m", "tests.backends.triton.driver", *groups]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        (folder / "lines").write_text(done.stdout)
        (folder / "end").write_text(done.stderr[-3000:])

    folder = once(tmp_path_factory, "driver " + " ".join(groups), probe)
    lines = [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
    end = (folder / "end").read_text()
    assert end.endswith("cases refused\n"), end
    return lines


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return _run(tmp_path_factory, "quick", "capture")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return _run(tmp_path_factory, "variants", "grid")


def _accepted(cases):
    for found in cases:
        what = found["case"], found["op"]
        for call in (found["first"], found["second"]):
            assert not call["error"], (*what, call["error"])
            assert not [line for line in call["log"] if line["refused"]], what
        first, second = launches(found["first"]["log"]), launches(found["second"]["log"])
        assert first == second, what
        # the code depends on which operands are aligned, which only the binder examines
        assert found["second"]["asked"] == sum(map(misaligned, second)), what
        own = [p for line in second for p in line["parameters"] if isinstance(p, str) and p.startswith("new")]
        assert not misaligned({"parameters": own}), (*what, own)
        names = list(dict.fromkeys(line["kernel"] for line in second))
        if found["case"].startswith(("rank 32", "rank 128")) and found["op"] != "grad_scales":
            assert names == ["panel_kernel"], what
            continue
        split = any(line["grid"][1] > 1 for line in second)
        assert names == KERNELS[found["op"]] + (["sum_splits_kernel"] if split else []), what


def test_every_launch_is_accepted(quick):
    _accepted([found for found in quick if "case" in found])


@pytest.mark.slow
def test_every_launch_is_accepted_in_every_dtype_and_shape(full):
    _accepted(full)


def test_a_first_use_while_a_graph_is_captured_is_one_clear_error_that_leaves_the_capture_whole(quick):
    found = {line.pop("capture"): line for line in [dict(line) for line in quick] if "capture" in line}
    cold = found.pop("first use")
    assert cold["log"] == [], "calling the driver would end the capture"
    assert "forward_kernel is not on the GPU yet for [128, 128] float16, [256, 128] float16" in cold["error"]
    assert "Run the layer once" in cold["error"]
    assert len(found) == 4
    for name, line in found.items():
        assert not line["error"], name
        assert not any(each["refused"] for each in line["log"]), name
        assert [each["kernel"] for each in launches(line["log"])] == ["forward_kernel"], name


def test_a_launch_is_given_its_operands_and_numbers_in_order(quick):
    cases = {(found["case"], found["op"]): launches(found["first"]["log"]) for found in quick if "case" in found}
    (whole,) = cases["another GPU", "forward"]
    assert (whole["device"], whole["grid"], whole["threads"]) == (1, [8, 1, 1], 128)
    # M, steps of a split, N, K, rows of a group, strides of x, W, v and y; strides of 1 are compiled in
    numbers = [128, 2, 256, 128, 128, 128, 128, 128, 256]
    assert whole["parameters"][:16] == ["x", "w", "v", "u", "b", "f", "new 0", *numbers]
    # the same with four columns of u and rows of v: only the stride from a group's v to the next differs
    (ranked,) = cases["rank 4", "forward"]
    assert ranked["parameters"][:16] == ["x", "w", "v", "u", "b", "f", "new 0", *numbers[:-2], 4 * 128, 256]
    split, added = cases["split", "forward"]
    assert (split["grid"], split["threads"]) == ([8, 2, 1], 128)
    assert split["parameters"][:8] == ["x", "w", "v", "u", "b", "f", "new 0", 128]
    assert added["parameters"][:7] == ["new 0", "b", "f", "new 1", 128, 2, 256]


def test_another_number_of_tokens_is_no_other_code(quick):
    """Nor is another number of splits: nothing is compiled, and Triton's binder is not called."""
    asked = {(found["case"], found["op"]): found["first"]["asked"] for found in quick if "case" in found}
    launched = {(found["case"], found["op"]): launches(found["first"]["log"]) for found in quick if "case" in found}
    for op in KERNELS:
        assert asked["plain", op] == len(KERNELS[op]), "once each"
        for case in ("another M", "one token"):
            assert asked[case, op] == 0, (case, op)
            tokens = [p for p in launched[case, op][0]["parameters"] if p in (130, 1)]
            assert tokens, "its own M"
    splits = [launched[case, "grad_scales"][0]["grid"][0] // 12 for case in ("plain", "another M", "one token")]
    assert splits == [2, 2, 1]


@pytest.mark.slow
def test_what_the_compiled_code_depends_on_is_asked_of_the_binder(full):
    asked = {(found["case"], found["op"]): found["first"]["asked"] for found in full}
    for case in ("plain", "float16", "8 warps", "2 stages", "split all", "bfloat16 offsets"):
        assert asked[case, "forward"] > 0, case
    assert asked["no bias", "forward"] == 1
    assert asked["bfloat16 offsets", "grad_input"] == 0, "it has no offsets"
