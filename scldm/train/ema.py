"""Exponential moving average of the weights: what is validated, exported and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages in float32, by parameter name.

    decay: of the long run; the average follows faster at first, with (1 + n) / (10 + n) after n updates
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.n_updates = module, decay, 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        parameters = [p.detach() for p in self.module.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the module's parameters are the averages."""
        live = [p.data for p in self.module.parameters()]
        for parameter, average in zip(self.module.parameters(), self.weights.values(), strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(self.module.parameters(), live, strict=True):
                parameter.data = data

    def load(self, weights: dict[str, Tensor], n_updates: int) -> None:
        self.n_updates = n_updates
        for name, average in self.weights.items():
            average.copy_(weights[name])
