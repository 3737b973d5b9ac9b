"""Files that are whole or not there, whatever goes down while they are written; and nested mappings as dotted keys.

Reading order: written_aside, left_aside, remove_marked, folder_aside, write_json, sync_folder, outlived, flat.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # ends the name of what was never finished
ASIDE = re.compile(rf"\..+\.[0-9a-f]{{12}}{re.escape(PARTIAL)}")


@contextmanager
def written_aside(path: Path, replaces: bool = True) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name only when it is durable and the block ends without an error.

    replaces: else a file that has this name by then is left, and this one dropped
    """
    # a name that nobody else writes to: tasks on several hosts may have the same process id
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down may leave a name without its bytes
        if replaces:
            os.replace(part, path)
        else:
            _link(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # of two at once, one
    except OSError:  # there is one, or the file system has no links
        if not path.exists():
            os.replace(part, path)


def left_aside(folder: Path) -> list[Path]:
    """Files that a killed `written_aside` left in a folder; others that end alike are somebody's."""
    return [path for path in folder.iterdir() if ASIDE.fullmatch(path.name) and not path.is_dir()]


def remove_marked(folder: Path, mark: str) -> None:
    """Remove a folder of ours, as far as it can be: one with this file in it, which goes last. Others stay."""
    if not (folder / mark).is_file():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != mark:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends without an error, in place of one that has it.

    Its own name beside the path is nobody else's, and nothing but what this made, or replaced, is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    part, old = beside.with_name(f"{beside.name}{PARTIAL}"), beside.with_name(f"{beside.name}.old")
    part.mkdir()
    try:
        yield part
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(part, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    with written_aside(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as what they name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such call for folders
            raise
    finally:
        os.close(descriptor)


_told: set[Path] = set()


@contextmanager
def outlived(path: Path) -> Iterator[None]:
    """What is written here is worth no run: of a disk that refuses it, the first failure of a file is one line."""
    try:
        yield
    except OSError as error:
        if path not in _told:
            _told.add(path)
            print(f"scldm: writing {path} failed ({error}); the run goes on without it", file=sys.stderr, flush=True)


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping; an empty one is a value."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
