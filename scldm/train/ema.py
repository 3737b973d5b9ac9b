"""Exponential moving average of the weights: what is validated, exported and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scldm.parallel.engine import Engine


class EMA:
    """Averages in float32 of the weights that this rank holds: as the optimizer's moments, they are kept once in all.

    decay: of the long run; the average follows faster at first, with (1 + n) / (10 + n) after n updates
    averages: of each of the engine's pieces, in their order
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay, self.n_updates = engine, decay, 0
        self.weights = [piece.weight for piece in engine.pieces]
        self.averages = [weight.clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        if self.averages:
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the engine computes with the averages; collective."""
        live = [weight.clone() for weight in self.weights]
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)
        self.engine.publish()
