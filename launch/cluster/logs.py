"""`scldm logs RUN`: the one log of a submitted run, over all its starts, as it grows."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.cluster.notes import ENDED, find_notes, state_of, with_run
from launch.config import compose
from scldm.checked import Checked, checked

PURPOSE = """Follow the log of a run that was submitted, over all its starts, until its job ends. In a
pipeline's folder, follow those of its jobs, one after another."""
EXAMPLE = """
scldm logs runs/vae
scldm logs runs/vae follow=false
scldm logs runs/vae rank=12
"""
LOOK_EVERY_S = 0.5
ASK_SLURM_EVERY_S = 10.0


@dataclass(frozen=True)
class LogsConfig(Checked):
    """What to follow.

    run: run folder, pipeline folder, or what a submitted verb makes. Given as the first word
    follow: go on until the job has ended. Without it, print what there is
    rank: print the lines of this rank alone
    """

    run: str
    follow: bool = True
    rank: int | None = checked(None, at_least=0)


CONFIG = LogsConfig
USAGE = "scldm logs RUN [follow=false] [rank=K]"


def read(words: Sequence[str]) -> LogsConfig:
    """The first word is the folder."""
    return compose(LogsConfig, with_run(words))


def main(config: LogsConfig) -> None:
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for notes in find_notes(Path(config.run)):
            show(notes, config.follow, config.rank)


def show(notes: Path, follow: bool, rank: int | None = None) -> None:
    """Print the log of a job, as it grows until the job has ended. srun begins each line with its rank."""
    files: dict[Path, IO[str]] = {}
    begun: dict[Path, str] = {}
    asked = -ASK_SLURM_EVERY_S
    while True:
        ended = not follow
        if follow and time.monotonic() - asked > ASK_SLURM_EVERY_S:
            asked, ended = time.monotonic(), state_of(notes).state in ENDED
        for path in sorted(notes.glob("log*.txt")):
            if path not in files:
                files[path] = path.open(errors="replace")
            text = files[path].read()
            if rank is not None:
                *lines, begun[path] = (begun.get(path, "") + text + "\n" * ended).split("\n")
                mine = (re.match(rf" *{rank}: ?(.*)", line) for line in lines)
                text = "".join(f"{match[1]}\n" for match in mine if match)
            sys.stdout.write(text)
        sys.stdout.flush()
        if ended:
            for file in files.values():
                file.close()
            return
        time.sleep(LOOK_EVERY_S)
