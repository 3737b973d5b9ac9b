"""One process in plain torch: what a lone process on a CPU runs, and what the other engines are tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from scldm.parallel.dist import World
from scldm.parallel.surface import (
    Autocast,
    HardwareConfig,
    OptimizerFactory,
    Piece,
    flat_moments,
    gradients_of,
    norm_of,
    set_lr,
    set_steps,
)
from scldm.tf32 import tf32_products


class PlainEngine:
    """One process, plain torch."""

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerFactory, hardware: HardwareConfig, clip: float, world: World
    ) -> None:
        self.module: nn.Module = model.to(world.device)
        self.is_whole = True
        self.optimizer = make_optimizer(self.module)
        self.clip = clip
        self.model: Any = Autocast(self.module, hardware.precision, world.device)
        self.bare: Any = self.model
        self.is_bf16 = hardware.precision == "bf16"
        self.shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        self.pieces = [
            Piece(name, 0, p.numel(), p.detach().view(-1), flat_moments(self.optimizer, p))
            for name, p in self.module.named_parameters()
        ]

    def backward(self, loss: Tensor) -> None:
        with tf32_products(self.is_bf16):
            loss.backward()

    def step(self, lr: float) -> float:
        set_lr(self.optimizer, lr)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = float(norm_of(gradients))
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, min(1.0, self.clip / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return gradients_of(self.module, loss)

    def publish(self) -> None:
        pass  # the pieces are the parameters

    def set_steps(self, n_steps: int) -> None:
        set_steps(self.optimizer, n_steps)
