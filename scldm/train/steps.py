"""The folder of a run's checkpoints: its steps, and which of them `latest` and `best` name. It knows no tensor, so that
who only looks waits for no package.
"""

from __future__ import annotations

import re
from pathlib import Path

from scldm.errors import InputError
from scldm.files import PARTIAL, left_aside, put_in_place, write_bytes
from scldm.files import remove as remove_path

STATE = "state.json"
BROKEN = ".broken"  # ends the name of what was damaged and is kept
# of the run folder, copied into every checkpoint, which can so be used without it
BESIDE = ("config.json", "genes.json", "conditions.json", "library_sizes.json", "missing.json", "latents.json")
STEP = re.compile(r"step-\d{8,}")
UNFINISHED = re.compile(rf"{STEP.pattern}{re.escape(PARTIAL)}")


def candidates(folder: Path) -> list[Path]:
    """The checkpoint that `latest` names, and those of earlier steps, last first."""
    latest = pointed(folder / "latest")
    steps = steps_in(folder)[::-1]
    if latest is None:
        return steps
    return [latest, *(target for target in steps if target.name < latest.name)]


def steps_in(folder: Path) -> list[Path]:
    """All checkpoints, the first step first. Those after `latest` are of a run that went on from before them."""
    return sorted(path for path in folder.glob("step-*") if STEP.fullmatch(path.name))


def unfinished(folder: Path) -> list[Path]:
    """What a save or a removal that was cut short left."""
    if not folder.is_dir():
        return []
    return [path for path in folder.glob("step-*") if UNFINISHED.fullmatch(path.name)] + left_aside(folder)


def point(pointer: Path, target: Path) -> None:
    """Let `latest` or `best` name another checkpoint, at once or not at all."""
    write_bytes(pointer, target.name.encode())


def pointed(pointer: Path) -> Path | None:
    """The checkpoint that `latest` or `best` names. None where there is none yet.

    Raises: InputError for a file that holds anything else.
    """
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        name = file.read(100).decode(errors="replace").strip()
    if not STEP.fullmatch(name):
        raise InputError(f"{pointer} is damaged: it holds {name!r}, must be a checkpoint's name, such as step-00001500")
    return pointer.parent / name


def retain(folder: Path, keep: int, keep_every: int = 0) -> list[OSError]:
    """Remove all but the last `keep` checkpoints up to `latest`, those of every `keep_every`-th step, and those that
    `latest` and `best` name. It also removes what an earlier removal left. Returns what could not be removed, as why.

    No checkpoint is under way meanwhile. Those after `latest` are left: no resume would use them, so they do not count.
    """
    latest, failures = pointed(folder / "latest"), list[OSError]()
    usable = [target for target in steps_in(folder) if latest is None or target.name <= latest.name]
    for old in [*unfinished(folder), *usable[:-keep]]:
        kept = old in (latest, pointed(folder / "best"))
        if keep_every and old in usable:
            kept = kept or int(old.name.removeprefix("step-")) % keep_every == 0
        if not kept:
            try:
                remove(old)
            except OSError as error:  # as a network's file system may. It is tried again at the next save
                failures.append(error)
    return failures


def remove(target: Path) -> None:
    """Take a checkpoint away at once: cut short, this leaves nothing that looks like one."""
    aside = target.with_suffix(PARTIAL)
    if target != aside:
        rename(target, aside)
    remove_path(aside)


def rename(source: Path, target: Path) -> None:
    if source.exists():
        put_in_place(source, target)
