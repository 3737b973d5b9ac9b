"""What is at a path or URL that fsspec opens, and why a store refuses it. Local files are in scldm/files.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from scldm.errors import Busy, InputError


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path there.

    Raises: InputError for a protocol that is unknown, or whose package is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: {error}") from None


def local_folder(url: str) -> Path | None:
    """The folder, where a path or URL is one of this machine's file system."""
    fs, path = file_system(url)
    return Path(path) if "file" in _protocols(fs) else None


def check_bucket(url: str) -> None:
    """Raises: InputError where the bucket of a URL is not there: some clients make one, of a mistyped name too."""
    fs, path = file_system(url)
    bucket = path.split("/")[0]
    with store_explained(url):
        if {"s3", "gs", "abfs"} & set(_protocols(fs)) and not fs.exists(bucket):
            raise InputError(f"{url}: there is no bucket {bucket!r} that may be listed. Make it, or give another")


def _protocols(fs: Any) -> tuple[str, ...]:
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """A file at a path or URL, open for reading. Raises: FileNotFoundError, and as store_explained."""
    with store_explained(url), fsspec.open(url, "rb") as file:
        yield file  # pyright: ignore[reportReturnType]


@contextmanager
def store_explained(url: str) -> Iterator[None]:
    """Raises: InputError for what an object store answers, Busy where another start may succeed. Of missing files the
    caller tells, of a local disk disk_explained."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:
        local = local_folder(url) is not None
        if local and isinstance(error, OSError):
            raise
        raise refused(url, error, InputError if local else Busy) from error


def denies(error: Exception) -> bool:
    """Whether it is for want of a right, which no other try mends. Each client names its errors for itself."""
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def refused(what: str, error: Exception, kind: type[InputError] = Busy, how: str = "") -> InputError:
    """What a user reads of a store's error."""
    why = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if denies(error):
        return InputError(f"{what}: the store refuses access ({why}). Check its credentials, and what they allow")
    return kind(f"{what}: {how}{why}")
