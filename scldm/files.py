"""Local files: whole or not there, whatever goes down while they are written. Locks, hashes, what a disk refuses as a
sentence, and nested mappings as dotted keys. What is at a URL is data_pipeline/stores.py.

Reading order: check_writable, check_new, written_aside, made_aside, put_in_place, left_aside, remove_left,
remove_marked, write_bytes, write_json, write_page, sync, sha256_of, of_bytes, locked, no_space, space_explained,
disk_explained, outlived, flat.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scldm.errors import InputError, path_must_be

PARTIAL = ".partial"  # ends the name of what was never finished
PAGE = b"<!doctype html"  # begins every page that we write
ASIDE = re.compile(rf"\.(.+)\.[0-9a-f]{{12}}{re.escape(PARTIAL)}")  # no name that anybody else would give

# --- before anything is computed ------------------------------------------------------------------------------------


def check_writable(key: str, value: str, is_file: bool = False) -> None:
    """Raises: InputError where a file, or what is in a folder, can't be written. It is tried: a system may permit root
    what it then refuses, as in /proc.

    key, value: that name it. It need not exist
    """
    check_path(key, value)
    path = Path(value).absolute()
    if path.is_symlink() and not is_file and not path.exists():  # no folder can be made there
        raise InputError(f"{key}={value} is a link to {os.readlink(path)}, which is not there. Name another")
    folder = next(at for at in [path, *path.parents][is_file:] if os.path.exists(at))
    try:
        with tempfile.TemporaryFile(dir=folder):  # without a name: nobody who lists the folder sees it
            pass
    except OSError as error:
        raise InputError(no_space(error, f"{key}={value}") or f"{key}={value}: {folder} can't be written to") from None


def check_page(key: str, value: str) -> None:
    """Raises: InputError where an HTML page can't be written, or would replace what is no page.

    key, value: that name it
    """
    path = Path(value)
    if path.is_dir():
        raise InputError(f"{key}={value} is a folder. Name the file to write, such as {key}={path / 'page.html'}")
    check_writable(key, value, is_file=True)
    if path.exists():
        with path.open("rb") as file:
            begins = file.read(len(PAGE))
        if begins and begins.lower() != PAGE:
            raise InputError(f"{key}={value} exists and is no HTML page, which would be lost. Name another file")


def check_path(key: str, value: str) -> None:
    """Raises: InputError for a text that no file system takes as a path, by what key it was given."""
    if right := path_must_be(value):
        raise InputError(f"{key}={reprlib.repr(value)} must be {right}")


def check_evaluation(key: str, value: str, has_page: bool = True) -> None:
    """Raises: InputError for a folder in which an evaluation can't be written, or would replace what none has made.

    has_page: a page with figures is written beside evaluation.json
    """
    check_writable(key, value)
    folder = Path(value)
    page = [folder / "report.html", *sorted(folder.glob("figures/*.png"))] if has_page else []
    there = [path for path in (folder / "evaluation.json", *page) if path.exists()]
    if not there:
        return
    try:
        made = json.loads((folder / "evaluation.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        made = None
    # an evaluation of an autoencoder or an embedding has no page, so that one beside it is of something else
    known = {"made_with", "pooled"} if there[-1] in page else {"made_with"}
    if not isinstance(made, dict) or not known <= made.keys():
        raise InputError(
            f"{key}={value}: {there[-1]} is there, and evaluation.json of what made it is not. It might be lost. Name "
            "another folder"
        )


def check_new(out: str) -> None:
    """Raises: InputError where a SOMA collection is to be written to what is there."""
    if os.path.exists(out):
        raise InputError(f"out={out}: exists. A SOMA collection is written to a new folder")


# --- whole or not there --------------------------------------------------------------------------------------------


@contextmanager
def written_aside(path: Path, replaces: bool = True) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name only when it is durable and the block ends without an error.

    replaces: else a file that has this name by then is left, and this one dropped
    """
    part = _unique(path)
    try:
        with part.open("wb") as file:
            _hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down may leave a name without its bytes
        if replaces:
            put_in_place(part, path)
        else:
            _link(part, path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def made_aside(path: Path, replaces: bool = True, at: Path | None = None) -> Iterator[Path]:
    """A path where a library writes a file or a folder, which gets its name as in `written_aside`. Its files get the
    mode that any new file has there: some libraries keep theirs from colleagues.

    replaces: what has the name. Then one process writes at a time, and removes what a killed one left. Else any number
        may, and a folder that has this name by then is left
    at: where it is made, on the same disk. What lies there is removed. Else beside its name, under one of its own
    """
    part = at or _unique(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    if replaces:
        remove_left(path.parent, path.name)
    try:
        yield part
        _open_to_others(part)
        sync(part)
        if replaces:
            put_in_place(part, path)
        else:
            _put_first(part, path)
    finally:
        remove(part)


def put_in_place(part: Path, path: Path) -> None:
    """Give what is durable its name, durably. Of a folder that has it, there is a moment without either.

    Raises: OSError for a file whose name a folder has: nobody wants that folder gone.
    """
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
        sync_folder(path.parent)
        return
    name = f"{path.name}.before"
    before = _unique(path.with_name(name))
    os.replace(path, before)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(before, path)
        raise
    sync_folder(path.parent)
    for left in left_aside(path.parent, name):
        shutil.rmtree(left, ignore_errors=True)  # the next one removes what is left


def left_aside(folder: Path, name: str | None = None) -> list[Path]:
    """What killed processes left in a folder while they wrote `name`, or anything. Names of nobody else look so."""
    found = ((path, ASIDE.fullmatch(path.name)) for path in folder.iterdir())
    return [path for path, match in found if match and name in (None, match[1])]


def remove_left(folder: Path, name: str | None = None) -> None:
    """Remove what `left_aside` finds, but for files that a living process writes (`written_aside`)."""
    for path in left_aside(folder, name) if folder.is_dir() else ():
        if not _is_held(path):
            remove(path)


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


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all."""
    with written_aside(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """The same of JSON."""
    write_bytes(path, json.dumps(value, indent=1).encode())


def write_page(path: Path, content: bytes) -> None:
    """Write a page or a figure whole or not at all. What a killed process left of it goes, that of a living one stays.

    Raises: InputError where there is no such folder, or the disk refuses it.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: {path.parent} is no folder. Make it, or name another file")
    with disk_explained(str(path)):
        remove_left(path.parent, path.name)
        write_bytes(path, content)


def remove(path: Path) -> None:
    """A file or folder, which need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file durable, or a folder with all that is in it."""
    if path.is_dir():
        for inside in path.iterdir():
            sync(inside)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


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


def _unique(path: Path) -> Path:
    """A name beside a path that nobody else writes to: tasks on several hosts may have the same process id."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")


def _hold(file: IO[bytes]) -> None:
    """Show others, for as long as it is open, that a file is being written."""
    with suppress(ImportError, OSError):  # Windows, and file systems without locks
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _link(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # of two at once, one
    except OSError:  # there is one, or the file system has no links
        if not path.exists():
            os.replace(part, path)


def _put_first(part: Path, path: Path) -> None:
    try:
        os.replace(part, path)
    except OSError:  # another was faster: a folder that holds something can't be replaced
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def _open_to_others(part: Path) -> None:
    """Give a file, or all in a folder, the mode of a new one: only the system knows it, as umask or rules of a disk."""
    new = _unique(part)
    new.touch()
    mode = new.stat().st_mode & 0o777
    new.unlink()
    for file in [part] if part.is_file() else [of for of in part.rglob("*") if of.is_file()]:
        file.chmod(mode)


# --- hashed, locked, refused ---------------------------------------------------------------------------------------


def sha256_of(file: Path | IO[bytes], piece: int = 1 << 20, start: int = 0, most: float = math.inf) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, or of `most` of its bytes from `start` on. Of an open one, from where it stands."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            opened.seek(start)
            return sha256_of(opened, piece, most=most)
    digest, n = hashlib.sha256(), 0
    while data := file.read(int(min(piece, most - n))):
        digest.update(data)
        n += len(data)
    return n, digest.hexdigest()


def of_bytes(n: float) -> str:
    """`2.5 GB`, `340 kB`: three digits in the unit that shows them."""
    unit = next((k for k in (4, 3, 2, 1) if n >= 999.5 * 1000 ** (k - 1)), 0)
    number = n / 1000**unit
    return f"{number:,.0f} {' kMGT'[unit].strip()}B" if number >= 99.95 else f"{number:.3g} {' kMGT'[unit].strip()}B"


@contextmanager
def locked(path: Path, refusal: str, *, shared: bool = False) -> Iterator[None]:
    """Within, no other process holds this lock, or none but those that share it. It ends with the process.

    Raises: InputError(refusal) where another holds it.
    """
    import fcntl  # which Windows lacks, where a model can be loaded

    with path.open("w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError:  # a file system without locks
            pass
        yield


# of a path that can't be read or written as things stand. Any other error of the system is no matter of the user's
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def no_space(error: BaseException, place: str) -> str:
    """What to say of a disk that is full. Empty for other errors."""
    chain: BaseException | None = error
    while chain is not None:  # torch's writer has an error of its own about that of the file
        safetensors = type(chain).__name__ == "SafetensorError" and "os error 28" in str(chain)  # it has no number
        number = errno.ENOSPC if safetensors else getattr(chain, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{place}: no space left ({os.strerror(number)}). Make room, then run the same command again"
        chain = chain.__cause__ or chain.__context__
    return ""


@contextmanager
def space_explained(place: str) -> Iterator[None]:
    """Raises: InputError where something inside failed for want of space."""
    try:
        yield
    except Exception as error:
        if told := no_space(error, place):
            raise InputError(told) from None
        raise


@contextmanager
def disk_explained(folder: str) -> Iterator[None]:
    """Raises: InputError where something inside failed for want of space, or because a path can't be used."""
    with space_explained(folder):
        try:
            yield
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            raise InputError(f"{error.filename or folder}: {error.strerror}") from None


_told: set[Path] = set()


@contextmanager
def outlived(path: Path) -> Iterator[None]:
    """What is written here is worth no run: of a disk that refuses it, the first failure of a file is one line."""
    try:
        yield
    except OSError as error:
        if path not in _told:
            _told.add(path)
            print(f"scldm: writing {path} failed ({error}). The run goes on without it", file=sys.stderr, flush=True)


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping. An empty one is a value."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
