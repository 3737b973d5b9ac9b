"""Locks, names beside a path, hashes; what a disk or a URL refuses as a sentence. Whole files are in scldm.files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from scldm.errors import InputError


def aside(path: Path) -> Path:
    """A name beside a path that nobody else writes to: tasks on several hosts may have the same process id."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


@contextmanager
def locked(path: Path, refusal: str, *, shared: bool = False) -> Iterator[None]:
    """Within, no other process holds this lock, or none but those that share it; it ends with the process.

    Raises: InputError(refusal) where another holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError:  # a file system without locks
            pass
        yield


# of a path that can't be read or written as things stand; any other error of the system is no matter of the user's
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextmanager
def disk_explained(folder: str) -> Iterator[None]:
    """Raises: InputError where something inside failed for want of space, or because a path can't be used."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{folder}: no space left ({error.strerror}); make room, then run the same command again"
            ) from None
        if error.errno in REFUSED:
            raise InputError(f"{error.filename or folder}: {error.strerror}") from None
        raise


@contextmanager
def store_explained(url: str) -> Iterator[None]:
    """Raises: InputError for what an object store answers; of a local disk, disk_explained tells."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:  # every store's client has a family of errors of its own
        why = " ".join(str(error).split()) or repr(error)
        raise InputError(f"{url}: {type(error).__name__}: {why}") from error


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path there.

    Raises: InputError for a protocol that is unknown, or whose package is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: {error}") from None


def sha256_of(file: IO[bytes], piece: int = 1 << 20) -> tuple[int, str]:
    """Bytes and SHA-256 of a file from where it stands."""
    digest, n = hashlib.sha256(), 0
    while data := file.read(piece):
        digest.update(data)
        n += len(data)
    return n, digest.hexdigest()


def of_bytes(n: float) -> str:
    """`2.5 GB`, `340 kB`: three digits in the unit that shows them."""
    unit = next((k for k in (4, 3, 2, 1) if n >= 999.5 * 1000 ** (k - 1)), 0)
    number = n / 1000**unit
    return f"{number:,.0f} {' kMGT'[unit].strip()}B" if number >= 99.95 else f"{number:.3g} {' kMGT'[unit].strip()}B"


def parse_bytes(text: str, key: str) -> int:
    """`2GiB`, `500 MB`, `1000000` as bytes. Raises: InputError for anything else."""
    units = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    units |= {u + "ib": n for u, n in units.items() if len(u) == 1 and u != "b"}
    units |= {u + "b": 1000**k for k, u in enumerate("kmgt", 1)}
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise InputError(f"{key}={text!r} is no amount of memory; write 2GiB or 500MB") from None
