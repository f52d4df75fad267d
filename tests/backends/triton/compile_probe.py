"""Compiling without a GPU, under the name that tests use: see ``benchmarks/disassemble.py``."""

from benchmarks.disassemble import as_case, probe

__all__ = ["as_case", "probe"]
