"""Several processes of a test's own, under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(*arguments, processes=2, timeout=1500, **options):
    """``python -m`` these arguments in each of some processes on the CPU; the finished process, its output kept."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, **options)
