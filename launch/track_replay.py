"""`scldm track replay FOLDER...`: what MLflow lacks of runs, sent from their folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import compose, with_folders
from scldm.errors import InputError
from scldm.train.mlflow_run import cause_of
from scldm.train.sending import followed_in, replay
from scldm.train.tracked import is_followed, read_note

PURPOSE = """Send to MLflow what it lacks of runs: rows, artifacts, the final state. A server that was away gets all.
Safe to repeat, also from cron. A run that its own process still follows is left to that process. A run whose process
was killed gets the state KILLED. Exit code 1 where something could not be sent.
A password comes from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in the URI in MLFLOW_TRACKING_URI. Only
the server in MLFLOW_TRACKING_URI gets one."""
EXAMPLE = """
scldm track replay runs/vae runs/ldm
scldm track replay runs/pipeline
"""


@dataclass(frozen=True)
class TrackReplayConfig:
    """What to send.

    folders: run folders, or folders that hold some, as a pipeline's. They are given as the first words
    outside: send files too that a run names and that lie in none of these folders, as tracking.attach may name some
    """

    folders: tuple[str, ...]
    outside: bool = False


CONFIG = TrackReplayConfig
USAGE = "scldm track replay FOLDER..."


def read(words: Sequence[str]) -> TrackReplayConfig:
    """Words without `=` are folders."""
    return compose(TrackReplayConfig, with_folders(TrackReplayConfig, "folders", words))


def main(config: TrackReplayConfig) -> None:
    """Send, a line for each run. Raises: SystemExit(1) for a folder without a run, and where a server did not take it
    all."""
    runs, failed = list[Path](), False
    for folder in config.folders:
        try:
            runs += runs_in(Path(folder))
        except InputError as error:  # the others are sent
            print(error, file=sys.stderr, flush=True)
            failed = True
    roots = None if config.outside else [Path(folder) for folder in config.folders]
    for run in dict.fromkeys(runs):
        try:
            print(replay(run, roots), flush=True)
        except InputError as error:  # as of an experiment that is deleted
            print(error, file=sys.stderr, flush=True)
            failed |= not is_followed(run)
        except Exception as error:
            uri = (read_note(run) or {}).get("uri", "")
            print(f"{run}: MLflow at {uri} failed: {cause_of(error, uri)}", file=sys.stderr, flush=True)
            failed = True
    if failed:
        raise SystemExit(1)


def runs_in(folder: Path) -> list[Path]:
    """Raises: InputError for a folder without any."""
    if not (found := followed_in(folder)):
        raise InputError(f"{folder}: no run there is followed in MLflow: there is no tracked.json in it or below")
    return found
