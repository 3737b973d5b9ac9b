"""What a user or a scheduler is meant to read: InputError, Stopped, the exit codes, and JSON files read with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# exit codes besides 0 (done) and 1 (a failure: with its traceback, or Diverged)
REFUSED = 2  # an InputError: nothing that another start would change
REQUEUE = 85  # stopped by a signal and saved: start the same command again
STOPPED = 86  # stopped by the file `stop` and saved: somebody wanted that
LOST = 87  # a rank is gone or hangs, or a store fails: another start, on other nodes perhaps, may succeed


class InputError(ValueError):
    """What was given can't be used: the message is one line that names the thing, the value and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """

    exit_code = REFUSED


class Busy(InputError):
    """What was given can't be used as yet: the same command, started again, may succeed."""

    exit_code = LOST


class Diverged(InputError):
    """A training whose numbers are no longer finite: a failure of the run, as exit code 1 says, and told in a line."""

    exit_code = 1


class Stopped(SystemExit):
    """The run did what it was asked from outside: it stopped at an agreed step, and its checkpoint is durable.

    exit_code: REQUEUE or STOPPED
    reason: who asked
    """

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(exit_code)
        self.exit_code, self.reason = exit_code, reason


def path_must_be(text: str) -> str:
    """What a text must be to name a file or folder. Empty where it is."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        path = b"\0"
    if b"\0" not in path and len(path) <= 2000 and all(len(name) <= 255 for name in path.split(b"/")):
        return ""
    return "a path of at most 2,000 bytes, with names of at most 255, and without NUL"


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: InputError for a file that is missing or no JSON."""
    try:
        return json_of(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None


def read_text(path: Path) -> str:
    """A text file that somebody gave, with a byte order mark or without. Raises: InputError where it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}). Save it in that encoding") from None


def json_of(text: bytes, path: Path | str) -> Any:
    """What a JSON file holds, or another place, that was read. Raises: InputError where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError. Or lists in lists in lists
        raise InputError(f"{path} is damaged: not JSON ({error})") from None
