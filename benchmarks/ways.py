"""The ways of computing attention that the model's benchmarks compare, and what the chip could do at most.

Reading order: Way, ways, unable, as_way, of_preset, peak_flops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import seconds_of
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
    if device.type != "cuda":
        return NO_GPU  # the interpreter shows that it is right, not how fast it is
    try:
        check_available(device)
    except InputError as error:
        return str(error)
    return ""


def as_way(way: Way, call: Any, device: torch.device) -> Any:
    """A module or function, compiled where the way says so."""
    if not way.compiled:
        return call
    # on a CPU, the compiler of torch 2.13 fails in inference where it looks for attention written out in operations
    options: Any = {"pattern_matcher": False} if device.type == "cpu" else None
    return torch.compile(call, dynamic=False, options=options)


def of_preset(name: str, model: VAEConfig) -> VAEConfig:
    """The shape of a preset in configs/vae; `model` where none is named."""
    return VAEConfig(**dict(load_preset(f"vae/{name}")["model"])) if name else model


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device).to(dtype)
    x = x @ x / n**0.5
    return max(2 * n**3 / seconds_of(lambda: x @ x, device) for _ in range(5))
