"""`scldm checkpoint convert`: a checkpoint as other tools, or fewer files, want it.

Resuming needs none of it: training reads any checkpoint at any number of ranks and ZeRO stage.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.checkpoints import found_checkpoint
from launch.cli import run_verb
from scldm.checked import Checked, checked
from scldm.errors import InputError
from scldm.files import PARTIAL, made_aside
from scldm.train.checkpoint import KINDS, Checkpoint
from scldm.train.saver import commit, write_part

PURPOSE = """Write a checkpoint as one file of plain weights, for any tool (safetensors, or a state_dict for torch.load)
or as a checkpoint again in another number of parts. To resume on other ranks or ZeRO stages, nothing has to be
converted; for a model folder that scldm.load reads, there is `scldm export`."""
EXAMPLE = """
scldm checkpoint convert at=runs/vae which=best out=weights.safetensors
scldm checkpoint convert at=runs/vae to=torch weights=raw out=weights.pt
scldm checkpoint convert at=runs/vae to=checkpoint parts=1 out=archive/step-00001500
"""


@dataclass(frozen=True)
class CheckpointConvertConfig(Checked):
    """Which checkpoint, and what to make of it.

    at: folder of a run, or of one checkpoint
    out: file to write, or for to=checkpoint a folder that does not exist yet
    which: in a run's folder: latest, best, or the number of a step
    to: safetensors or torch, one file of weights and buffers by name, float32; or checkpoint
    weights: ema, which are validated and exported, or raw, which are trained
    parts: files of a checkpoint
    """

    at: str
    out: str
    which: str = "latest"
    to: Literal["safetensors", "torch", "checkpoint"] = "safetensors"
    weights: Literal["ema", "raw"] = "ema"
    parts: int = checked(1, at_least=1)


CONFIG = CheckpointConvertConfig


def main(config: CheckpointConvertConfig) -> Path:
    """Write it, whole or not at all; returns where. Raises: InputError for a damaged checkpoint."""
    checkpoint, out = Checkpoint(found_checkpoint(config.at, config.which)), Path(config.out)
    checkpoint.check()
    if config.to == "checkpoint":
        if out.exists():
            raise InputError(f"out={out} exists already")
        repartition(checkpoint, out, config.parts)
    else:
        kind = "ema" if config.weights == "ema" else "weight"
        tensors = {name: checkpoint.whole(kind, name) for name in checkpoint.shapes} | dict(checkpoint.buffers())
        with made_aside(out) as part:
            if config.to == "safetensors":
                save_file(tensors, part, {"step": str(checkpoint.step), "weights": config.weights})
            else:
                torch.save(tensors, part)
    print(f"{checkpoint.folder.name} -> {out}")
    return out


def repartition(checkpoint: Checkpoint, out: Path, parts: int) -> None:
    """The same checkpoint in this many parts, of which each has an equal stretch of every parameter."""
    for k in range(parts):
        tensors: dict[str, Tensor] = {}
        ranges: dict[str, tuple[int, int]] = {}
        for name, shape in checkpoint.shapes.items():
            n = torch.Size(shape).numel()
            start, stop = n * k // parts, n * (k + 1) // parts
            if start < stop:
                ranges[name] = (start, stop)
                tensors |= {f"{kind}/{name}": checkpoint.read(kind, name, start, stop) for kind in KINDS}
        if k == 0:
            tensors |= {f"buffer/{name}": buffer for name, buffer in checkpoint.buffers()}
        write_part(out.with_suffix(PARTIAL) / f"part-{k}-of-{parts}.safetensors", tensors, ranges)
    state = {key: value for key, value in checkpoint.state.items() if key not in ("format", "parts", "files")}
    commit(out, parts, state, checkpoint.folder)


if __name__ == "__main__":
    sys.exit(run_verb("checkpoint convert", sys.argv[1:]))
