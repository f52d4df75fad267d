"""Whole training steps: images/s and peak memory. On a CPU two blocks of ViT-B/16 and four images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import cases, results, timing
from benchmarks.memory import peak_extra_bytes
from benchmarks.results import STEP_IMPLEMENTATIONS, StepCase
from benchmarks.steps import CLASSES, Step, build
from benchmarks.suite import REPLAY, Outcome, Recorder, Rivals, outcome, play, selected
from benchmarks.timing import Call, Variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 224


@dataclass(frozen=True)
class Model:
    """``name`` and ``depth`` (None: all) are timm's; ``title`` is what the results call it."""

    title: str
    name: str
    depth: int | None = None


SLICE = Model("ViT-B/16, 2 blocks", cases.STEP_MODELS["vit_b"], 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    chunk, images = option("--chunk"), option("--images")
    if chunk is None:
        planned = [("step-slice", SLICE, batch, dtype) for batch in images or (4,) for dtype in cases.DTYPES]
    else:
        planned = [
            (f"step-{key}-{batch}", Model(cases.MODELS[key][0].model, name), batch, "bfloat16")
            for key, name in cases.STEP_MODELS.items()
            for batch in images or cases.STEP_BATCHES
        ]
    parameters = []
    for name, model, batch, dtype in planned:
        if name.startswith(chunk or "") and dtype in option("--dtype"):
            label = f"{name}-{batch}-{dtype}"
            group = Rivals("step", name, (model, batch, dtype), label)
            parameters += [pytest.param(group, n, id=f"{label}-{n}") for n in STEP_IMPLEMENTATIONS]
    metafunc.parametrize(("group", "implementation"), parameters)


@pytest.mark.benchmark(timer=REPLAY)
def test_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    recorder: Recorder,
    rounds: tuple[int, int] | None,
    group: Rivals,
    implementation: str,
) -> None:
    """One implementation of a group; the group's first test measures all of them."""
    measure = functools.partial(_measure, group, rounds)
    play(benchmark, group, recorder.outcomes(group, selected(request, group), measure)[implementation])


def _measure(group: Rivals, rounds: tuple[int, int] | None, names: list[str]) -> dict[str, Outcome]:
    model, batch, dtype = group.key
    torch._dynamo.reset()
    torch.manual_seed(0)
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE)
    labels = torch.randint(CLASSES, (batch,), device=DEVICE)
    memory: dict[str, int] = {}

    def variant(name: str) -> Variant:
        made = build(name, model.name, DEVICE, **({} if model.depth is None else {"depth": model.depth}))
        step = Step(made, images, labels, getattr(torch, dtype))
        step()  # compiles, and makes the optimizer's state
        memory[name] = step.resident_bytes() + peak_extra_bytes(lambda: (step(),))
        return Variant([Call(step)])

    found = timing.interleaved(
        {name: functools.partial(variant, name) for name in names},
        timing.batches(4 if DEVICE == "cuda" else 1, wait=True),
        20.0 if DEVICE == "cuda" else 10.0,
        rounds or timing.ROUNDS,
        warm_seconds=1.0 if DEVICE == "cuda" and rounds is None else 0.0,
    )
    outcomes = {}
    for name in names:
        case = StepCase(model.title, batch, SIZE, dtype, name, name not in results.OTHER_FUNCTIONS)
        more = {}
        if found[name].error is None:
            _, median, _ = results.quartiles(found[name].seconds)
            more = {"images_per_second": round(batch / median, 3), "peak_bytes": memory[name]}
        outcomes[name] = outcome(case, found[name], more)
    return outcomes
