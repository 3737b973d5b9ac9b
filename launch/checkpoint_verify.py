"""`scldm checkpoint verify`: read every byte of checkpoints, and compare it with its hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.checkpoints import folder_of_checkpoints
from scldm.errors import InputError
from scldm.train.steps import STATE, candidates, steps_in

PURPOSE = "Read every byte of a checkpoint, or of all of a run's, and compare with the hashes. Exit code 2 for damage."
EXAMPLE = """
scldm checkpoint verify at=runs/vae
scldm checkpoint verify at=runs/vae/checkpoints/step-00001500
"""


@dataclass(frozen=True)
class CheckpointVerifyConfig:
    """What to verify.

    at: folder of a run, whose checkpoints are all read, or of one checkpoint
    """

    at: str


CONFIG = CheckpointVerifyConfig


def main(config: CheckpointVerifyConfig) -> None:
    """Print a line a checkpoint. Raises: InputError where one is damaged, after all were read."""
    at = Path(config.at)
    targets = [at]
    if not (at / STATE).is_file():
        folder = folder_of_checkpoints(at)
        targets = sorted({*candidates(folder), *steps_in(folder)}, reverse=True)  # also where `latest` names none
    if not targets:
        raise InputError(f"{at} has no checkpoint yet")
    from scldm.train.checkpoint import Checkpoint, Damaged  # with torch, once there is something to read

    damaged = []
    for target in targets:
        try:
            checkpoint = Checkpoint(target)
            checkpoint.check()
        except Damaged as error:
            damaged.append(target.name)
            print(f"{target.name}: DAMAGED: {error}")
        else:
            print(f"{target.name}: whole, {sum(entry.bytes for entry in checkpoint.files.values()):,} bytes")
    if damaged:
        raise InputError(f"{len(damaged)} of {len(targets)} checkpoints are damaged: {', '.join(damaged)}")
