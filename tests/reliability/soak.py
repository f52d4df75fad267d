"""The property tests for as long as one likes, with new seeds: ``python -m tests.reliability.soak --minutes 60``.

All backends that run here take turns, the CPU library once for each instruction set. It prints how many examples
have passed, and stops at the first that does not: shrunk, with the command that runs it alone, and exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from collections import Counter

from tests import conftest  # noqa: F401  (where there is no GPU it has Triton's kernels interpreted)
from tests.reliability.properties.cases import Case
from tests.reliability.properties.properties import examine
from tests.reliability.properties.run import run
from tests.reliability.properties.solvers import backend, missing, own_instructions

#: Examples of one turn: seconds each, not minutes.
TURNS = {
    "reference": 300,
    "panels": 300,
    "cpu": 300,
    "triton": 60,
    "cuda": 300,
    "cuda_host": 42,
    "cuda_host_large": 42,
    "hopper_host": 30,
}
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def lower_capabilities() -> list[str]:
    """Instruction sets below this CPU's own: what ``RLRR_CPU_CAPABILITY`` can ask for here."""
    if missing("cpu"):
        return []
    return list(LEVELS[: LEVELS.index(own_instructions())])


def run_limited(capability: str, examples: int, seed: int) -> Counter[str]:
    """``run("cpu", ...)`` in a process of its own: the library reads once which instructions it may use."""
    command = [sys.executable, "-m", "tests.reliability.soak", "--backend", "cpu"]
    command += ["--examples", str(examples), "--seed", str(seed)]
    environment = os.environ | {"RLRR_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"with RLRR_CPU_CAPABILITY={capability}:\n{done.stdout}{done.stderr}")
    return Counter(ast.literal_eval(done.stdout.splitlines()[-1]))


def turn(name: str, examples: int, seed: int) -> Counter[str]:
    """One backend's turn; ``cpu:avx2`` is the CPU library held to AVX2."""
    name, _, capability = name.partition(":")
    return run_limited(capability, examples, seed) if capability else run(name, examples, seed)


def soak(minutes: float, seed: int, names: list[str]) -> Counter[str]:
    """Turns of all backends until the time is over; examples that passed, by backend."""
    passed: Counter[str] = Counter()
    start = told = time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        for name in names:
            passed[name] += sum(turn(name, TURNS[name.partition(":")[0]], seed).values())
            seed += 1
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{(told - start) / 60:.0f} min, {passed.total()} examples: {dict(passed)}", flush=True)
    return passed


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first turn; by default a new one each time")
    parser.add_argument("--backend", choices=TURNS, help="this one alone")
    parser.add_argument("--examples", type=int, help="one turn of the backend with so many, whatever it takes")
    parser.add_argument("--case", help="this case of the backend alone, as a failure prints it")
    given = parser.parse_args(arguments)
    if (given.case or given.examples) and not given.backend:
        parser.error("--case and --examples need --backend")
    if given.backend and (reason := missing(given.backend)):
        parser.error(f"{given.backend}: {reason}")
    if given.case:
        examine(backend(given.backend), Case(**ast.literal_eval(given.case)))
        print("passed")
        return
    seed = int.from_bytes(os.urandom(4)) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    if given.examples:
        print(dict(run(given.backend, given.examples, seed)))
        return
    names = [name for name in TURNS if not missing(name)] + [f"cpu:{level}" for level in lower_capabilities()]
    passed = soak(given.minutes, seed, [given.backend] if given.backend else names)
    print(f"{passed.total()} examples passed: {dict(passed)}")


if __name__ == "__main__":
    main()
