"""What is at a path or URL that fsspec opens, and why a store refuses it. Local files are in scldm/files.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from scldm.errors import InputError


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path there.

    Raises: InputError for a protocol that is unknown, or whose package is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: {error}") from None


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
