"""PEFT on the package's op: its HiRA layers accelerated in place, and RLRR as one of its methods."""

from rlrr_kernels.peft.hira import HiraReport, accelerate_hira, restore_hira
from rlrr_kernels.peft.method import RlrrConfig, RlrrLayer, RlrrLinear, RlrrModel

__all__ = ["HiraReport", "RlrrConfig", "RlrrLayer", "RlrrLinear", "RlrrModel", "accelerate_hira", "restore_hira"]
