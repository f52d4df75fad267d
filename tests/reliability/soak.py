"""Random problems for as long as one likes, with new seeds: ``python -m tests.reliability.soak --minutes 60``.

All backends that run here take turns, the CPU library once for each instruction set. It prints how many examples have
passed. It stops at the first that fails, shrinks it, prints the command that runs it alone, and exits with 1.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from collections import Counter

import hypothesis
from hypothesis import Phase, given, note, settings

from tests import conftest  # noqa: F401  (interprets Triton's kernels where there is no GPU)
from tests.reliability.properties.cases import Case, cases
from tests.reliability.properties.properties import examine
from tests.reliability.properties.solvers import backend, missing, own_instructions

#: Examples of one turn of each backend, which takes seconds.
TURNS = {
    **dict.fromkeys(("reference", "panels", "cpu", "cuda"), 300),
    **{"triton": 60, "cuda_host": 42, "cuda_host_large": 42, "hopper_host": 30},
}
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def run(name: str, examples: int, seed: int, shrink: bool = True) -> Counter[str]:
    """Examine this many cases of a backend.

    Args:
        name: of the backend.
        examples: how many, divided equally among the properties.
        seed: decides all that is drawn.
        shrink: whether a failing case is shrunk before it is printed.

    Returns:
        How many passed, by property.
    """
    target = backend(name)
    passed: Counter[str] = Counter()
    properties = target.domain.also
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    for index, also in enumerate(properties):
        share = (examples + index) // len(properties)

        @settings(max_examples=share, database=None, deadline=None, print_blob=True, phases=phases)
        @hypothesis.seed(seed * len(properties) + index)
        @given(case=cases(target.domain, also))
        def example(case: Case) -> None:
            note(f"python -m tests.reliability.soak --backend {name} --case {case.text()!r}")
            examine(target, case)
            passed[case.also or "values"] += 1

        if share:
            example()
    return passed


def lower_capabilities() -> list[str]:
    """Instruction sets below this CPU's own, which ``RLRR_CPU_CAPABILITY`` can ask for here."""
    return [] if missing("cpu") else list(LEVELS[: LEVELS.index(own_instructions())])


def run_limited(capability: str, examples: int, seed: int) -> Counter[str]:
    """``run("cpu", ...)`` with fewer instructions: in its own process, as the library reads once which it may use."""
    command = [sys.executable, "-m", "tests.reliability.soak", "--backend", "cpu"]
    command += ["--examples", str(examples), "--seed", str(seed)]
    environment = os.environ | {"RLRR_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"with RLRR_CPU_CAPABILITY={capability}:\n{done.stdout}{done.stderr}")
    return Counter(ast.literal_eval(done.stdout.splitlines()[-1]))


def soak(minutes: float, seed: int, names: list[str]) -> Counter[str]:
    """Turns of all backends until the time is over; ``cpu:avx2`` is the CPU library limited to AVX2."""
    passed: Counter[str] = Counter()
    start = told = time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        for full_name in names:
            name, _, capability = full_name.partition(":")
            examples = TURNS[name]
            turn = run_limited(capability, examples, seed) if capability else run(name, examples, seed)
            passed[full_name] += turn.total()
            seed += 1
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{(told - start) / 60:.0f} min, {passed.total()} examples: {dict(passed)}", flush=True)
    return passed


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first turn; default: a new one each time")
    parser.add_argument("--backend", choices=TURNS, help="this one alone")
    parser.add_argument("--examples", type=int, help="one turn of the backend with this many, however long it takes")
    parser.add_argument("--case", help="this case of the backend alone, as a failure prints it")
    options = parser.parse_args()
    if (options.case or options.examples) and not options.backend:
        parser.error("--case and --examples need --backend")
    if options.backend and (reason := missing(options.backend)):
        parser.error(f"{options.backend}: {reason}")
    if options.case:
        examine(backend(options.backend), Case(**ast.literal_eval(options.case)))
        print("passed")
        return
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    if options.examples:
        print(dict(run(options.backend, options.examples, seed)))
        return
    names = [name for name in TURNS if not missing(name)] + [f"cpu:{level}" for level in lower_capabilities()]
    passed = soak(options.minutes, seed, [options.backend] if options.backend else names)
    print(f"{passed.total()} examples passed: {dict(passed)}")


if __name__ == "__main__":
    main()
