"""``python -m rlrr_kernels.finetune``, the same as ``rlrr-finetune``."""

import sys

from rlrr_kernels.finetune.cli import main

sys.exit(main())
