"""An exponential moving average of what trains, and of nothing else: the frozen weights need no second copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rlrr_kernels.finetune.distributed import local


class Average:
    """average = decay * average + (1 - decay) * value after each step, from the initial values.

    Args:
        parameters: name -> trained parameter; of sharded ones this process's part is averaged.
        decay: in [0, 1).

    Attributes:
        values: name -> average, in the parameter's shape, dtype and place.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = {name: local(p.detach()) for name, p in parameters.items()}
        self.values = {name: p.clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the values after a step."""
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the averages inside, and its own values again afterwards."""
        own = {name: p.clone() for name, p in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)
