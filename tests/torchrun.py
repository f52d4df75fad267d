"""Processes under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(*arguments, processes=2, timeout=1500, **options):
    """Run ``python -m`` with these arguments in several processes on the CPU; returns the completed torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, **options)
