"""``examples/compare_methods.py``: the search for learning rates and the error of a difference."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples/compare_methods.py"
    spec = importlib.util.spec_from_file_location("compare_methods", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("peak", [1e-6, 1e-3, 3e-2, 3.0])
def test_rates_on_both_sides_of_the_chosen_one_are_tried(example, monkeypatch, tmp_path, peak):
    tried: list[float] = []

    def sweep(*command: str) -> None:
        words = list(command)
        rates = [float(word) for word in words[words.index("--lrs") + 1 : words.index("--weight-decays")]]
        tried[:] = rates
        best = max(rates, key=lambda rate: -abs(math.log(rate / peak)))
        (tmp_path / "sweep.json").write_text(json.dumps({"best": {"lr": best}}))

    monkeypatch.setattr(example, "run", sweep)
    assert example.chosen_rate(tmp_path, 3e-3, [], [0]) == peak
    ladder = example.LADDER
    at = ladder.index(peak)
    assert {ladder[max(at - 1, 0)], ladder[min(at + 1, len(ladder) - 1)]} <= set(tried)


def test_rates_that_diverge_are_left_behind_for_smaller_ones(example, monkeypatch, tmp_path):
    def sweep(*command: str) -> None:
        rates = [float(word) for word in command[command.index("--lrs") + 1 : command.index("--weight-decays")]]
        finite = [rate for rate in rates if rate < 1e-4]
        (tmp_path / "sweep.json").write_text(json.dumps({"best": {"lr": max(finite)} if finite else None}))

    monkeypatch.setattr(example, "run", sweep)
    assert example.chosen_rate(tmp_path, 3e-3, [], [0]) == 3e-5


def test_a_run_at_another_rate_is_not_taken_for_this_one(example, monkeypatch, tmp_path):
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(example, "run", lambda *command: commands.append(command))
    out = example.trained(tmp_path, 1e-2, [], 0)
    out.mkdir()
    (out / "metrics.json").write_text('{"finished": true}')
    monkeypatch.setattr(example, "read_metrics", lambda folder: json.loads((folder / "metrics.json").read_text()))
    assert example.trained(tmp_path, 1e-2, [], 0) == out
    assert len(commands) == 1
    assert example.trained(tmp_path, 1e-3, [], 0) != out
    assert commands[1][commands[1].index("--lr") + 1] == "0.001"


def test_a_difference_has_the_errors_of_seeds_and_of_images(example):
    ours = {0: [True, True, False, False], 1: [True, False, False, False]}
    other = {0: [True, True, True, False], 1: [True, True, True, True], 2: [False] * 4}
    gap, error = example.difference(ours, other)
    # by seed 25 and 75 points; by image 0, 50, 100 and 50
    assert gap == pytest.approx(50)
    assert error == pytest.approx(2 * math.sqrt(5000 / 3 / 4 + 1250 / 2))
    assert example.difference(ours, ours) == (0, 0)
