"""Findings as the check makes them on this CPU."""

from __future__ import annotations

import torch

from rlrr_kernels.backends.verdicts import SUBJECTS, Finding, Where

CPU = torch.device("cpu")


def findings(subject: str = "cpu", wrong: str | None = None, device: torch.device = CPU) -> list[Finding]:
    """Of every pass of a subject; ``wrong``: the one that failed."""
    where = Where.of(subject, device)
    return [
        Finding(where, which, which != wrong, 0.5, "y: not finite" if which == wrong else "", "2026-01-02")
        for which in SUBJECTS[subject][1]
    ]
