"""The ways of computing attention that the model's benchmarks compare, and what the chip could do at most.

Reading order: Way, ways, unable, of_preset, peak_flops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launch.bench.measure import seconds_of
from launch.config import load_preset
from scldm.errors import InputError
from scldm.kernels import check_available
from scldm.model.attention import AttentionKind
from scldm.model.vae import VAEConfig

NO_GPU = "not measured on a GPU"


@dataclass(frozen=True)
class Way:
    """kind: of attention; compiled: by torch.compile."""

    name: str
    kind: AttentionKind
    compiled: bool = False


PLAIN, SDPA, FACTORISED, FUSED = (Way(kind, kind) for kind in ("plain", "sdpa", "factorised", "fused"))
OPPONENT = Way("sdpa, compiled", "sdpa", True)  # the formula at its fastest: torch's kernels, all else fused by it


def ways(compiled: bool) -> list[Way]:
    return [PLAIN, SDPA, *([OPPONENT] if compiled else []), FACTORISED, FUSED]


def unable(way: Way, device: torch.device) -> str:
    """Why a way can't be measured here; empty where it can."""
    if way.kind != "fused":
        return ""
    try:
        check_available(device)
    except InputError as error:
        return str(error)
    return "" if device.type == "cuda" else NO_GPU  # the interpreter shows that it is right, not how fast it is


def of_preset(name: str, model: VAEConfig) -> VAEConfig:
    """The shape of a preset in configs/vae; `model` where none is named."""
    return VAEConfig(**dict(load_preset(f"vae/{name}")["model"])) if name else model


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device).to(dtype)
    x = x @ x / n**0.5
    return max(2 * n**3 / seconds_of(lambda: x @ x, device) for _ in range(5))
