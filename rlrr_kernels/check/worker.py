"""One pass of one backend, in a process of its own: ``python -m rlrr_kernels.check.worker SUBJECT PASS DEVICE``.

It writes messages to standard output, each in a line after :data:`MARK`: first what it will check, so that there is a
finding even if the process hangs or dies; then each case that it has launched and judged; then the result.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlrr_kernels.backends import verdicts
from rlrr_kernels.check import cases

MARK = "rlrr_kernels check: "


def one_line(words: object) -> str:
    """Return the first line of a text, without control characters."""
    line = next((line.strip() for line in str(words).splitlines() if line.strip()), "it said nothing")
    return "".join(c if c.isprintable() else " " for c in line)[:300]


def send(values: Mapping[str, Any]) -> None:
    """Send a message to the parent process; it is flushed, as the process may die at the next step."""
    print(f"\n{MARK}{json.dumps(values)}", flush=True)


def answer(subject: str, which: str, device: torch.device) -> dict[str, Any]:
    """Return the result: ``verdict``, and ``ratio``, ``worst`` and ``reason`` if there are any."""
    module = cases.module_of(subject, device)
    if isinstance(module, str):
        return {"verdict": "not here", "reason": one_line(module)}
    try:
        report = cases.run(
            module, which, device, cases.cases(which, device.type), lambda stage, case: send({stage: str(case)})
        )
    except torch.OutOfMemoryError as error:
        return {"verdict": "not tried", "reason": one_line(error)}
    if not report.tried:
        return {"verdict": "not here", "reason": one_line(report.refusal)}
    return {
        "verdict": "right" if report.reason is None else "wrong",
        "ratio": report.ratio if math.isfinite(report.ratio) else None,
        "worst": str(report.worst),
        "reason": "" if report.reason is None else one_line(report.reason),
    }


def main(arguments: Sequence[str]) -> int:
    """Check one pass and return 0."""
    subject, which, device = arguments[0], arguments[1], torch.device(arguments[2])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    send(verdicts.Where.of(subject, device)._asdict())
    send(answer(subject, which, device))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
