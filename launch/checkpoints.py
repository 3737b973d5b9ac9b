"""What the verbs on checkpoints share: which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

from scldm.errors import InputError
from scldm.train.steps import STATE, pointed, steps_in


def found_checkpoint(at: str, which: str) -> Path:
    """The folder of one checkpoint: `at` itself, or the one that `which` names in the run folder `at`.

    which: latest, best, or a step's number
    """
    path = Path(at)
    if (path / STATE).is_file():
        return path
    folder = folder_of_checkpoints(path)
    if which.isdecimal():
        target = folder / f"step-{int(which):08d}"
    elif which in ("latest", "best"):
        target = pointed(folder / which) or folder / which
    else:
        raise InputError(f"which={which}: it must be latest, best or the number of a step")
    if not target.is_dir():
        steps = [int(p.name.removeprefix("step-")) for p in steps_in(folder)]
        raise InputError(f"{path} has no checkpoint which={which}. It has steps {', '.join(map(str, steps)) or 'none'}")
    return target


def folder_of_checkpoints(path: Path) -> Path:
    """Raises: InputError for a folder that is no run's."""
    if path.name == "checkpoints" and path.is_dir():
        return path
    if not (path / "checkpoints").is_dir():
        raise InputError(f"{path} is neither a checkpoint nor the folder of a run that has one")
    return path / "checkpoints"
