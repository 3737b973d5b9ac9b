"""Exponential moving average of the weights: what is validated, exported and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scldm.parallel.surface import Engine


class EMA:
    """In float32, of the weights that this rank holds. As with the optimizer's moments, all ranks hold it once.

    decay: of the long run. The EMA follows faster at first, with (1 + n) / (10 + n) after n updates
    live, weights: the weights that are trained and their EMA, of each of the engine's pieces in their order
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay, self.n_updates = engine, decay, 0
        self.live = [piece.weight for piece in engine.pieces]
        self.weights = [weight.clone() for weight in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        if self.live:
            torch._foreach_lerp_(self.weights, self.live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the engine computes with the EMA. Collective."""
        live = [weight.clone() for weight in self.live]
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        if self.live and not self.live[0].is_cuda and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # of weights in host memory, copies to the GPU may be under way
        for weight, value in zip(self.live, values, strict=True):
            weight.copy_(value)
        self.engine.publish()
