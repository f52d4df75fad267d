"""Launches kernels without a GPU: ``python -m tests.backends.triton.driver [quick|variants|grid|capture]...``

It uses the Triton that is installed. It prints a line of JSON for each op of each case, with the driver's log of the
first and second call and how often Triton's binder was called in each. It exits with 1 if a call was refused.
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

from tests.backends.triton.driver import cases
from tests.backends.triton.driver.stand_in import Machine

asked = [0]


def logged(machine: Machine, call: Callable[[], Any]) -> dict[str, Any]:
    """Return the driver's log of a call, how often the binder was called, and the error if there was one."""
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
    """Call each op of a case twice; return whether the driver accepted all calls."""
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
            if group == "capture":
                for name, call in cases.while_capturing(machine):
                    report({"capture": name, **logged(machine, call)})
            else:
                refused += sum(not launched(machine, case) for case in getattr(cases, group.upper()))
    print(f"Triton {triton.__version__}: {refused} cases refused", file=sys.stderr)
    return min(refused, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["quick", "variants", "grid", "capture"]))
