"""The engine turns micro-batch losses into an optimizer step, over all ranks.

Three engines with one surface (surface.py): DeepSpeedEngine, which users run, FSDPEngine, which needs torch alone, and
PlainEngine, a lone process, which is also what the others are tested against. All hold float32 master weights. bf16 is
autocast around the forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

from torch import nn

from scldm.errors import InputError
from scldm.parallel.deepspeed_engine import DeepSpeedEngine
from scldm.parallel.dist import World
from scldm.parallel.fsdp import FSDPEngine, check_torch
from scldm.parallel.plain import PlainEngine
from scldm.parallel.surface import HardwareConfig, OptimizerFactory

# the version whose private names the engine reads. 0.19.0 lacks one of them. pyproject.toml and constraints.txt say the
# same
DEEPSPEED = "0.19.8"


def check_engine(
    hardware: HardwareConfig, world: World, overrides: Mapping[str, Any]
) -> Literal["plain", "deepspeed", "fsdp"]:
    """Which engine runs.

    Raises: InputError where another version of what it needs is installed, or none. Also for a CPU where a GPU is
    required.
    """
    if hardware.require_gpu and world.device.type == "cpu":
        raise InputError("hardware.require_gpu=true: torch finds no GPU. hardware.require_gpu=false trains on the CPU")
    if hardware.engine == "fsdp":
        check_torch()
        return "fsdp"
    alone_on_a_cpu = world.size == 1 and world.device.type == "cpu" and not overrides and not hardware.offload_optimizer
    if hardware.engine == "plain" or (hardware.engine == "auto" and alone_on_a_cpu):
        return "plain"
    try:
        found = metadata.version("deepspeed").partition("+")[0]
    except metadata.PackageNotFoundError:
        found = "not installed"
    if found != DEEPSPEED:
        raise InputError(
            f"deepspeed is {found}, and scldm reads private parts of {DEEPSPEED} that other versions name otherwise: "
            f"pip install deepspeed=={DEEPSPEED}, or use hardware.engine=fsdp, or plain on one rank"
        )
    return "deepspeed"


def start_engine(
    model: nn.Module,
    make_optimizer: OptimizerFactory,
    hardware: HardwareConfig,
    clip: float,
    world: World,
    global_batch: int,
    overrides: Mapping[str, Any] | None = None,
) -> PlainEngine | DeepSpeedEngine | FSDPEngine:
    """The configured engine around a network. Collective.

    model: where it has `blocks`, fsdp gathers each of them by itself
    overrides: of DeepSpeed's own configuration, as `deepspeed.KEY=value` gives them

    Raises: InputError where ranks, micro-batch and global batch do not fit, an override would change the result, or
    another version of DeepSpeed is installed than the one that this works with.
    """
    hardware.accumulation(global_batch, world.size)
    kind = check_engine(hardware, world, overrides or {})
    if kind != "deepspeed" and overrides and world.is_first:
        print(f"scldm: hardware.engine={kind}: the keys of deepspeed have no effect", file=sys.stderr, flush=True)
    if kind == "deepspeed":
        return DeepSpeedEngine(model, make_optimizer, hardware, clip, world, global_batch, overrides or {})
    if kind == "fsdp":
        return FSDPEngine(model, make_optimizer, hardware, clip, world, global_batch)
    return PlainEngine(model, make_optimizer, hardware, clip, world)
