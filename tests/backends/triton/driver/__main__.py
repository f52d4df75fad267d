"""Launch cases on GPUs that are not there: ``python -m tests.backends.triton.driver [quick|variants|grid|wrong]...``

With whichever Triton the interpreter finds. Prints a line of JSON for each op of each case: the driver's log of its
first and of its second call, and how often Triton's binder was asked in each. Ends in 1 if a call was refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.runtime.jit import JITFunction

from tests.backends.triton.driver import cases, wrong
from tests.backends.triton.driver.stand_in import Machine

asked = [0]


def logged(machine: Machine, call: Callable[[], Any]) -> dict[str, Any]:
    """What the driver was asked, how often the binder was, and the error if there was one."""
    asked[0] = 0
    error = ""
    try:
        call()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"log": machine.log(), "asked": asked[0], "error": error}


def report(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def launched(machine: Machine, case: cases.Case) -> bool:
    """Both calls of each op of a case; whether the driver accepted them all."""
    machine.device = case.device
    machine._exchange(case.current)
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    machine.names = cases.tensors(case)
    fine = True
    for op, call in cases.calls(case, machine.names).items():
        first, second = logged(machine, call), logged(machine, call)
        report({"case": case.name, "op": op, "first": first, "second": second})
        fine &= not any(r["error"] or line["refused"] for r in (first, second) for line in r["log"])
    machine.forget()
    machine._exchange(0)
    return fine


def main(groups: list[str]) -> int:
    run = JITFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[0] += 1
        return run(self, *args, **kwargs)

    refused = 0
    with mock.patch.object(JITFunction, "run", counting), Machine(cases.DEVICES) as machine:
        for group in groups:
            if group == "wrong":
                for name, reason, call in wrong.calls(machine):
                    report({"wrong": name, "expected": reason, **logged(machine, call)})
            else:
                refused += sum(not launched(machine, case) for case in getattr(cases, group.upper()))
    print(f"Triton {triton.__version__}: {refused} cases refused", file=sys.stderr)
    return min(refused, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["quick", "variants", "grid", "wrong"]))
