"""A new run that begins with another one's checkpoint: weights, moments, EMA, its place in the cells' order, and all.

The checkpoint is hard-linked into the new folder, or copied where it can't be. No file of a checkpoint ever changes, so
that neither run depends on the other.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scldm.errors import InputError, read_json
from scldm.files import PARTIAL, put_in_place, remove, sync
from scldm.train import changes
from scldm.train.steps import BESIDE, candidates, point, pointed

CONFIG = BESIDE[0]


@dataclass(frozen=True)
class Branch:
    """Where a run branches off.

    run: the parent's folder
    checkpoint: its folder of that step
    best: its best checkpoint until then, which is the one to beat. None where it is gone
    config: the parent's, when it wrote the checkpoint
    """

    run: Path
    step: int
    checkpoint: Path
    best: Path | None
    config: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"


def begins(text: str, run_dir: Path) -> bool:
    """Whether a run begins as a branch: else it resumes, or is none. Raises: InputError for a folder of another run."""
    known = next((entry for entry in changes.read(run_dir) if "branched_from" in entry), None)
    place = f"{known['branched_from']}@{known['step']}" if known else ""
    has_begun = (run_dir / "checkpoints" / "latest").is_file()
    if not text:
        if known and not has_begun:
            raise InputError(f"{run_dir} was to branch from {place} and has not begun. Give branch_from={place}")
        return False
    run, step = _parsed(text)
    if known is None and (run_dir / CONFIG).is_file():
        raise InputError(f"branch_from={text}: {run_dir} holds a run that is no branch. Choose another run_dir")
    if known is None or not has_begun:
        return True
    if known["branched_from"] != str(run) or (step.isdecimal() and int(step) != known["step"]):
        raise InputError(f"branch_from={text}: {run_dir} is a branch from {place}. Choose another run_dir")
    return False  # `latest` may have moved since


def named(text: str) -> tuple[Path, Path]:
    """The run and the checkpoint that RUN@STEP says, by the names of folders alone.

    Raises: InputError where there is no such run or checkpoint, with the steps that there are.
    """
    run, step = _parsed(text)
    folder = run / "checkpoints"
    if not (run / CONFIG).is_file():
        raise InputError(f"branch_from={text}: {run} is not a run folder: it has no {CONFIG}")
    if step.isdecimal():
        there = {int(target.name.removeprefix("step-")): target for target in candidates(folder)}
        target, said = there.get(int(step)), f"There are {', '.join(map(str, sorted(there))) or 'none'}"
    else:
        target, said = pointed(folder / step), "Train it first"
    if target is None:
        raise InputError(f"branch_from={text}: the run has no checkpoint of step {step}. {said}")
    return run, target


def find(text: str) -> Branch:
    """The branch that RUN@STEP says. Every byte of the checkpoint is checked. Raises: as `named`, and Damaged."""
    from scldm.train.checkpoint import Checkpoint  # with torch, once there is something to read

    run, target = named(text)
    best = pointed(run / "checkpoints" / "best")
    best = best if best and best.name <= target.name else None
    for each in {target, best} - {None}:
        Checkpoint(each).check()
    return Branch(run, Checkpoint(target).step, target, best, read_json(target / CONFIG))


def begin(branch: Branch, run_dir: Path) -> None:
    """Put the checkpoint into the new run, which resumes from it. Cut short, it has not begun."""
    folder = run_dir / "checkpoints"
    for source in [branch.checkpoint, *([branch.best] if branch.best else [])]:
        _link(source, folder / source.name)
    if branch.best:
        point(folder / "best", branch.best)
    point(folder / "latest", branch.checkpoint)


def _parsed(text: str) -> tuple[Path, str]:
    run, _, step = text.rpartition("@")
    if not run or not (step.isdecimal() or step in ("latest", "best")):
        raise InputError(f"branch_from={text} must be RUN@STEP, with a step, latest or best, as runs/vae@15000")
    return Path(os.path.abspath(run)), step


def _link(source: Path, target: Path) -> None:
    part = target.with_suffix(PARTIAL)
    remove(part)
    part.mkdir(parents=True)
    try:
        for path in source.iterdir():
            try:
                os.link(path, part / path.name)
            except OSError:  # another disk, or another owner's file
                shutil.copyfile(path, part / path.name)
    except FileNotFoundError:
        raise InputError(f"{source} was removed by its own run meanwhile. Branch from another step") from None
    sync(part)
    put_in_place(part, target)
