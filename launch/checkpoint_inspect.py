"""`scldm checkpoint inspect`: what a checkpoint holds, without reading its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.checkpoints import found_checkpoint
from scldm.given_json import read_known

if TYPE_CHECKING:  # it imports torch, for which nobody waits who named no checkpoint
    from scldm.train.checkpoint import Checkpoint

PURPOSE = "Print what a checkpoint holds: step, metrics, parameters, who wrote it, what lies beside it."
EXAMPLE = """
scldm checkpoint inspect at=runs/vae
scldm checkpoint inspect at=runs/vae which=best parameters=true
"""


@dataclass(frozen=True)
class CheckpointInspectConfig:
    """Which checkpoint.

    at: folder of a run, or of one checkpoint
    which: in a run's folder: latest, best, or the number of a step
    parameters: list every parameter with its shape
    json: print JSON, not text
    """

    at: str
    which: str = "latest"
    parameters: bool = False
    json: bool = False


CONFIG = CheckpointInspectConfig


def main(config: CheckpointInspectConfig) -> dict[str, Any]:
    """Print it. Returns the same as JSON types."""
    found = found_checkpoint(config.at, config.which)
    from scldm.train.checkpoint import Checkpoint

    told = summary(Checkpoint(found), config.parameters)
    if config.json:
        print(json.dumps(told, indent=1))
    else:
        for key, value in told.items():
            if isinstance(value, dict):
                print(f"{key}:")
                print("\n".join(f"  {name:<40} {entry}" for name, entry in value.items()))
            else:
                print(f"{key}: {value}")
    return told


@dataclass(frozen=True)
class _Config:
    """What is shown of a run's config, which holds more."""

    hardware: dict[str, Any]


def summary(checkpoint: Checkpoint, parameters: bool) -> dict[str, Any]:
    state, shapes = checkpoint.state, checkpoint.shapes
    told: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "format": state["format"],
        "step": state["step"],
        "updates": state["n_updates"],
        "best": state["best"],
        "validation": state["validation"],
        "loader": state["loader"],
        "n_parameters": sum(math.prod(shape) for shape in shapes.values()),
        "n_ranks": checkpoint.n_ranks,
        "bytes": sum(entry.bytes for entry in checkpoint.files.values()),
        "files": {name: f"{entry.bytes:,} bytes" for name, entry in checkpoint.files.items()},
    }
    if "config.json" in state["files"]:
        told["hardware"] = read_known(_Config, checkpoint.folder / "config.json").hardware
    if parameters:
        told["parameters"] = {name: "x".join(map(str, shape)) or "scalar" for name, shape in shapes.items()}
    return told
