"""HDF5 files to write, on a disk that may become full, by a user who may press Ctrl-C."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py


@contextmanager
def hdf5_made(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file, and what tells whether all that was written reached the disk. It is to be called now and then,
    as what did not is kept in memory. HDF5 itself holds some megabytes that it has not written yet.

    HDF5 can't give up a file that it can't write. It tries again, prints tracebacks, and has crashed the process
    (2.0, on a full disk). So it never hears of that, nor of a signal, whose handler would raise within its write.

    Raises: OSError of the disk, here or by the call. So does what handlers of signals raise.
    """
    with open(path, "w+b", buffering=0) as opened, signals_later() as answer:
        kept = _Kept(opened)

        def check() -> None:
            kept.check()
            answer()

        file = h5py.File(kept, "w")
        try:
            yield file, check
        finally:
            file.close()
        kept.check()


@contextmanager
def signals_later() -> Iterator[Callable[[], None]]:
    """Within, signals wait for a call, or for the end, where they have handlers in Python. Those run in the main thread
    alone, so that other threads have none to wait for."""
    came, handlers = list[tuple[int, Any]](), dict[int, Callable[[int, Any], Any]]()

    def answer() -> None:
        with ExitStack() as each:  # of several, one that raises keeps no other from being answered
            while came:
                number, frame = came.pop()
                each.callback(handlers[number], number, frame)

    with ExitStack() as restored:
        restored.callback(answer)
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    restored.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, frame: came.append((number, frame)))
        yield answer


class _Kept(io.RawIOBase):
    """A file of which the disk keeps what it can, until the first error. The rest is kept in memory."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.at = file, 0
        self.error: OSError | None = None
        self.rest: list[tuple[int, bytes]] = []  # where it belongs, in the order in which it came

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def write(self, data: Any, /) -> int:
        whole, written = memoryview(data).cast("B"), 0
        if self.error is None:
            try:
                self.file.seek(self.at)
                while written < len(whole):
                    written += self.file.write(whole[written:])
            except OSError as error:
                self.error = error
        if written < len(whole):
            self.rest.append((self.at + written, bytes(whole[written:])))
        self.at += len(whole)
        return len(whole)

    def readinto(self, buffer: Any, /) -> int:
        into = memoryview(buffer).cast("B")
        self.file.seek(self.at)
        n = self.file.readinto(into)
        for start, data in self.rest:
            low, high = max(start, self.at), min(start + len(data), self.at + len(into))
            if low < high:
                into[low - self.at : high - self.at] = data[low - start : high - start]
                n = max(n, high - self.at)
        self.at += n
        return n

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            offset += max([self.file.seek(0, io.SEEK_END), *(start + len(data) for start, data in self.rest)])
        self.at = offset + (self.at if whence == io.SEEK_CUR else 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None, /) -> int:
        end = self.at if size is None else size
        self.rest = [(start, data[: end - start]) for start, data in self.rest if start < end]
        if self.error is None:
            try:
                self.file.truncate(end)
            except OSError as error:
                self.error = error
        return end
