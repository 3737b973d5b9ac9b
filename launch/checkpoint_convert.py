"""`scldm checkpoint convert`: a checkpoint as other tools, or fewer files, want it.

Resuming needs none of it: training reads any checkpoint at any number of ranks and ZeRO stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.checkpoints import found_checkpoint
from scldm.checked import Checked, checked
from scldm.errors import InputError

PURPOSE = """Write a checkpoint as plain weights, for any tool (safetensors, or torch's distributed checkpoint), or as a
checkpoint again in another number of parts. One tensor at a time is in memory, and no GPU is needed. To resume on other
ranks or ZeRO stages, nothing has to be converted. For a model folder that scldm.load reads, there is `scldm export`."""
EXAMPLE = """
scldm checkpoint convert at=runs/vae which=best out=weights.safetensors
scldm checkpoint convert at=runs/vae file_gb=5 out=weights
scldm checkpoint convert at=runs/vae to=dcp out=weights.dcp
scldm checkpoint convert at=runs/vae weights=raw out=raw.safetensors
scldm checkpoint convert at=runs/vae to=checkpoint parts=1 out=archive/step-00001500
"""


@dataclass(frozen=True)
class CheckpointConvertConfig(Checked):
    """Which checkpoint, and what to make of it.

    at: folder of a run, or of one checkpoint
    out: file to write. With file_gb, and for to=dcp, a folder; for to=checkpoint, one that does not exist yet
    which: in a run's folder: latest, best, or the number of a step
    to: weights and buffers by name, float32, as safetensors or dcp (torch.distributed.checkpoint, a file
        for each), or checkpoint
    file_gb: safetensors in files of at most so many 1e9 bytes (or one larger tensor), and an index, as Hugging Face has
        them. 0 is one file
    weights: ema, which are validated and exported, or raw, which are trained
    parts: files of a checkpoint
    """

    at: str
    out: str
    which: str = "latest"
    to: Literal["safetensors", "dcp", "checkpoint"] = "safetensors"
    file_gb: float = checked(0.0, at_least=0)
    weights: Literal["ema", "raw"] = "ema"
    parts: int = checked(1, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file_gb and self.to != "safetensors":
            raise InputError(f"file_gb={self.file_gb:g} is for to=safetensors, not for to={self.to}")

    @property
    def makes_folder(self) -> bool:
        return self.to != "safetensors" or self.file_gb > 0


CONFIG = CheckpointConvertConfig


def main(config: CheckpointConvertConfig) -> Path:
    """Write it, whole or not at all. Returns where. Raises: InputError for a damaged checkpoint."""
    found, out = found_checkpoint(config.at, config.which), Path(config.out)
    run = found.resolve().parent.parent if found.resolve().parent.name == "checkpoints" else found.resolve()
    of_the_run = run in out.resolve().parents
    if out.is_dir() or (out.exists() and (config.makes_folder or of_the_run)):  # which may be anybody's
        raise InputError(f"out={out} exists already")
    from scldm.train.checkpoint import Checkpoint  # with torch, once there is something to read
    from scldm.train.converted import repartition, write_plain

    checkpoint = Checkpoint(found)
    checkpoint.check()
    if config.to == "checkpoint":
        repartition(checkpoint, out, config.parts)
    else:
        kind = "ema" if config.weights == "ema" else "weight"
        write_plain(checkpoint, out, config.to, kind, int(1e9 * config.file_gb))
    print(f"{checkpoint.folder.name} -> {out}")
    return out
