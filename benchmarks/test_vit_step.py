"""Whole training steps: images/s and peak memory. On a CPU two blocks of ViT-B/16 and four images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import chunks, implementations, results, timing
from benchmarks.measures import Formula, peak_extra_bytes
from benchmarks.results import STEP_IMPLEMENTATIONS, StepCase
from benchmarks.steps import CLASSES, Step, build
from benchmarks.suite import (
    DEVICE,
    RANKS_PLACE,
    Outcome,
    Recorder,
    Rivals,
    interleaved,
    outcome,
    parametrize,
    rank_label,
    turn_by_turn,
)
from benchmarks.timing import Call, Rounds, Variant

SIZE = 224


@dataclass(frozen=True)
class Model:
    """A timm model by ``name``, with ``depth`` blocks (None: all); ``title`` is its name in the results."""

    title: str
    name: str
    depth: int | None = None


SLICE = Model("ViT-B/16, 2 blocks", chunks.STEP_MODELS["vit_b"], 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a group for each model, batch size, dtype and rank."""
    option = metafunc.config.getoption
    chunk, images = option("--chunk"), option("--images")
    tests: list[tuple[Rivals, str]] = []
    for name, model, batch, dtype, rank in _slice(images) if chunk is None else _chunks(chunk, images):
        if dtype in option("--dtype"):
            label = f"{name}-{batch}-{dtype}"
            group = Rivals("step", name, (model, batch, dtype, rank), label, place=2 if rank == 1 else RANKS_PLACE)
            tests += [(group, one) for one in STEP_IMPLEMENTATIONS if results.of_rank(one, rank)]
    parametrize(metafunc, tests)


def _slice(images: Sequence[int] | None) -> list[tuple[str, Model, int, str, int]]:
    cases = itertools.product(results.RANKS, images or (4,), chunks.DTYPES)
    return [(f"step-slice{rank_label(rank)}", SLICE, batch, dtype, rank) for rank, batch, dtype in cases]


def _chunks(prefix: str, images: Sequence[int] | None) -> list[tuple[str, Model, int, str, int]]:
    """Return name, model, batch size, dtype and rank of each chunk; ``images`` replaces the batch size of the name."""
    found: dict[tuple[str, int, int], tuple[str, Model, int, str, int]] = {}
    for chunk, (key, planned, rank) in chunks.STEPS.items():
        if chunk.startswith(prefix):
            for batch in images or (planned,):  # once, though several chunks of a model would measure the same
                model = Model(chunks.MODELS[key][0].model, chunks.STEP_MODELS[key])
                found.setdefault((key, batch, rank), (chunk, model, batch, "bfloat16", rank))
    return list(found.values())


def _measure(group: Rivals, rounds: tuple[int, int] | None, names: list[str], recorder: Recorder) -> dict[str, Outcome]:
    model, batch, dtype, rank = group.key
    torch._dynamo.reset()
    torch.manual_seed(0)
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE)
    labels = torch.randint(CLASSES, (batch,), device=DEVICE)
    memory: dict[str, int] = {}
    errors: dict[str, float | None] = {}
    tokens = torch.empty(batch * 197, 8, dtype=getattr(torch, dtype), device=DEVICE)

    def made(name: str) -> Step:
        options = {} if model.depth is None else {"depth": model.depth}
        return Step(build(name, model.name, DEVICE, rank, **options), images, labels, getattr(torch, dtype))

    formula = Formula(lambda: made(results.OFFICIAL).loss_and_gradient(), getattr(torch, dtype))

    def variant(name: str) -> Variant:
        implementations.served_by(name, tokens, tokens[:8], rank)
        step = made(name)
        if name not in results.OTHER_FUNCTIONS:
            errors[name] = formula.error(step.loss_and_gradient())
        step()  # compiles, and makes the optimizer's state
        memory[name] = step.resident_bytes() + peak_extra_bytes(lambda: (step(),))
        return Variant([Call(step)])

    def outcomes(found: Mapping[str, Rounds]) -> dict[str, Outcome]:
        """Return the outcomes of those that have rounds or failed."""
        results_of = {}
        for name, rival in found.items():
            if not rival.seconds and rival.error is None:
                continue
            case = StepCase(model.title, batch, SIZE, dtype, name, name not in results.OTHER_FUNCTIONS, rank)
            more: dict[str, Any] = {}
            if rival.error is None:
                _, median, _ = results.quartiles(rival.seconds)
                more = {"images_per_second": round(batch / median, 3), "peak_bytes": memory[name]}
            if name in errors:
                more["error_vs_formula"] = errors[name]
            results_of[name] = outcome(case, rival, more)
        return results_of

    found = interleaved(
        names,
        variant,
        rounds,
        stopwatch=timing.Batches(4 if DEVICE == "cuda" else 1, wait=True, settle=True),
        budget=20.0 if DEVICE == "cuda" else 10.0,
        warm_seconds=1.0 if DEVICE == "cuda" and rounds is None else 0.0,
        until=recorder.until,
        after_each=lambda found: recorder.keep(group, outcomes(found)),
    )
    return outcomes(found)


test_step = turn_by_turn(_measure, minutes_each=True)
