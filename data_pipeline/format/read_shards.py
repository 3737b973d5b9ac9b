"""Reads a shard set: its manifest and index, and any block by one positioned read, checked against its CRC-32.

Local folders are read in place. When a remote set (any fsspec URL) is opened, its index is copied to a cache folder.
Blocks are kept there up to a limit for each set, and nothing is ever removed. The index alone says which blocks may be
kept: the first ones that fit. Each has its place in one sparse file. So the ranks of a node share the cache without
talking: a block whose CRC-32 fits is there, and any other is fetched. An epoch reads every block once in random order,
so no rule that evicts would hit more often.

Reading order: ShardSet, open files, the cache of a remote set.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from isal.isal_zlib import crc32  # zlib's, ten times as fast

from data_pipeline.format import schema
from data_pipeline.format.schema import Manifest
from data_pipeline.stores import denies, refused
from scldm.errors import InputError
from scldm.files import sha256_of, write_bytes
from scldm.given_json import hash_of

OPEN_FILES = 128
ATTEMPTS = 5
CHANGED = "its CRC-32 is not that of the index: the shard is damaged or was changed"
BACK_OFF_S = 0.5  # then 1, 2 and 4 s
Read = TypeVar("Read")


class ShardSet:
    """A finished shard set, open for reading from any number of threads.

    url: folder, or fsspec URL
    cache_folder: where a remote set's index and blocks are kept, in a folder named by the set's hash. The
        processes of a node share it, and nobody removes it
    cache_bytes: at most so many bytes of this set's blocks

    hash: of everything that determines the cells and their order
    blocks: one record of schema.BLOCK_INDEX per block

    Raises: InputError where there is no whole set, or one that this version can't read.
    """

    def __init__(self, url: str, *, cache_folder: str = "", cache_bytes: int = 0) -> None:
        self.url, self.cache_folder = url.rstrip("/"), cache_folder
        self.closing = threading.Event()
        fs, root = fsspec.core.url_to_fs(self.url)
        self.fs, self.root = fs, str(root).rstrip("/")
        self.local = isinstance(fs, LocalFileSystem)
        text = self._tried(f"{self.url}/{schema.MANIFEST}", lambda: schema.manifest_text(self.url))
        self.manifest = schema.parsed_manifest(self.url, text)
        self.hash = manifest_hash(self.manifest)
        self.files = _OpenFiles(OPEN_FILES)
        self.cache: _BlockCache | None = None
        if not self.local:
            if not cache_folder:
                raise InputError(f"{url}: a remote set needs cache_folder, a local folder for its index and blocks")
            self.cache_root = Path(cache_folder).expanduser() / self.hash[:16]
            with _cache_explained(cache_folder):
                self.cache_root.mkdir(parents=True, exist_ok=True)
        self.index = {entry.path: entry for entry in self.manifest.index}
        self.columns: dict[str, np.ndarray] = {}  # those that were checked
        self.blocks = np.array(self._load(schema.BLOCK_INDEX_PATH))  # in memory: it is looked up for every cell
        self._check_index()
        if self.manifest.kind == "latents" and self.local and self.manifest.shards:
            shard = self.manifest.shards[0]  # latents of this shape are there, before a loader makes room for many
            with self.files.open(f"{self.root}/{shard.path}", expected_bytes=shard.bytes):
                pass
        if not self.local and cache_bytes:
            path = self.cache_root / "blocks.bin"
            with _cache_explained(cache_folder):
                self.cache = _BlockCache(self.files, path, self.blocks["length"], cache_bytes)

    def _check_index(self) -> None:
        """The block index fits the manifest, and every shard is there by name. Sizes are checked when one is opened."""
        m = self.manifest
        for wrong in schema.misfits_of_index(m, self.blocks):
            raise InputError(f"{self.url}/{schema.BLOCK_INDEX_PATH}: {wrong}")
        if "http" in self.fs.protocol:
            return  # a web server lists no folder: a shard that is missing is named when it is read
        folder = f"{self.root}/shards"
        try:
            paths = self._tried(f"{self.url}/shards", lambda: self.fs.ls(folder, detail=False)) if m.shards else []
            there = {str(p).rstrip("/").split("/")[-1] for p in paths}
        except FileNotFoundError:
            there = set()
        missing = [s.path for s in m.shards if s.path.split("/")[-1] not in there]
        if missing:
            told = f"{len(missing)} of {len(m.shards)} shards are missing, the first is {missing[0]}"
            raise InputError(f"{self.url}: {told}")

    def cell_column(self, name: str) -> np.ndarray:
        """One value per cell in set order, memory-mapped: source, row, total_counts, n_expressed, condition.NAME.

        Raises: InputError where the file is missing or not that of the manifest, at its first use.
        """
        return self._column(schema.cell_column_path(name))

    def gene_column(self, name: str) -> np.ndarray:
        """One value per gene, in vocabulary order."""
        return self._column(schema.gene_column_path(name))

    def where(self, block: int) -> str:
        """The name of a block for a message: its shard and number."""
        return f"{self.url}/{self._shard(block).path}, block {block}"

    def fetch(self, block: int, into: np.ndarray | None = None) -> np.ndarray:
        """The bytes of a block, uint8, checked against the index (0.4 to 0.9 us a cell). They lie in `into`, which has
        their length, where that saves a copy.

        Raises: InputError for a shard that is missing, cut short, changed, corrupt or not to be read. Busy where a
        remote read fails five times.
        """
        if not self.local:
            return np.frombuffer(self._fetch_remote(block), np.uint8)
        record, shard = self.blocks[block], self._shard(block)
        try:
            with self.files.open(f"{self.root}/{shard.path}", expected_bytes=shard.bytes) as fd:
                # within the file, whose size is known by now
                data = np.empty(int(record["length"]), np.uint8) if into is None else into
                assert len(data) == record["length"]
                n_read = _read_into(data.data, fd, int(record["offset"]))
        except FileNotFoundError:
            raise InputError(f"{self.root}/{shard.path}: the shard is missing") from None
        except OSError as error:
            raise InputError(f"{self.where(block)}: can't be read: {error.strerror}") from None
        if n_read != len(data) or crc32(data.data) != record["crc32"]:
            raise InputError(f"{self.where(block)}: {CHANGED}")
        return data

    def close(self) -> None:
        """Releases every file, one that is being read as soon as it is. A read that waits to try again gives up."""
        self.closing.set()
        self.columns.clear()
        self.files.close()

    # --- within

    def _shard(self, block: int) -> schema.ShardEntry:
        return self.manifest.shards[int(self.blocks["shard"][block])]

    def _fetch_remote(self, block: int) -> bytes:
        record = self.blocks[block]
        crc = int(record["crc32"])
        if self.cache and (data := self.cache.get(block)) is not None and crc32(data) == crc:
            return data
        start, length = int(record["offset"]), int(record["length"])
        path, name = self._shard(block).path, self.where(block)

        def fault(data: bytes) -> str:
            wrong = len(data) != length or crc32(data) != crc
            return CHANGED if wrong else ""

        data = self._fetched(path, name, fault, start, start + length)
        if self.cache:
            self.cache.put(block, data)
        return data

    def _fetched(
        self, path: str, name: str, fault: Callable[[bytes], str], start: int | None = None, end: int | None = None
    ) -> bytes:
        """Bytes of a file of a remote set."""
        try:
            return self._tried(name, lambda: self.fs.cat_file(f"{self.root}/{path}", start=start, end=end), fault)
        except FileNotFoundError:
            raise InputError(f"{self.url}/{path}: is missing") from None

    def _tried(self, name: str, read: Callable[[], Read], fault: Callable[[Read], str] = lambda _: "") -> Read:
        """What `read` returns. Of a remote set it is tried five times, with growing pauses, until it has no `fault`.

        Raises: InputError for the last fault, Busy where reading itself failed last. At once, what no other try mends:
        FileNotFoundError and InputError of `read`, InputError where the store refuses access.
        """
        if self.local:
            return read()
        problem: Exception = InputError(f"{name}: was closed")
        for attempt in range(ATTEMPTS):
            if attempt and self.closing.wait(BACK_OFF_S * 2 ** (attempt - 1)):
                break
            try:
                data = read()
            except (FileNotFoundError, InputError):
                raise
            except Exception as error:  # every network library has a family of its own
                if denies(error):
                    raise refused(name, error) from error
                problem = error
                continue
            if not (text := fault(data)):
                return data
            problem = InputError(f"{name}: {text}")
        if isinstance(problem, InputError):
            raise problem
        raise refused(name, problem, how=f"reading failed {ATTEMPTS} times, at last: ") from problem

    def _column(self, path: str) -> np.ndarray:
        if path not in self.columns:
            self.columns[path] = self._load(path)
        return self.columns[path]

    def _load(self, path: str) -> np.ndarray:
        """An index file, memory-mapped and checked. That of a remote set comes from the cache folder."""
        entry = self.index.get(path)
        if entry is None:
            raise InputError(f"{self.url}: the set has no {path}")
        local = Path(self.root if self.local else self.cache_root) / path
        with nullcontext() if self.local else _cache_explained(self.cache_folder):
            fault = _index_fault(local, entry)
        if fault and not self.local:  # not there yet, or damaged since
            data = self._fetched(path, f"{self.url}/{path}", lambda data: _index_fault(io.BytesIO(data), entry))
            with _cache_explained(self.cache_folder):
                local.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(local, data)
                fault = _index_fault(local, entry)
        if fault:
            raise InputError(f"{self.url}/{path}: {fault}")
        values, kind = _map(local), schema.index_kinds(self.manifest)[path]
        if (values.dtype, values.shape) != kind:
            raise InputError(f"{self.url}/{path}: {values.dtype} {values.shape}, must be {kind[0]} {kind[1]}")
        return values


def _index_fault(file: Path | IO[bytes], entry: schema.FileEntry) -> str:
    """What is wrong with an index file, or nothing."""
    try:
        n_bytes, sha256 = sha256_of(file)
    except FileNotFoundError:
        return "is missing"
    if n_bytes != entry.bytes:
        return f"{n_bytes} bytes, the manifest says {entry.bytes}"
    return "" if sha256 == entry.sha256 else "its SHA-256 is not that of the manifest: damaged or changed"


def _map(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped (an empty array can't be). Raises: InputError for a file that is none."""
    try:
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(1 << 16))
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("not of version 1.0")
        shape, _, _ = np.lib.format.read_array_header_1_0(head)
        return np.load(path, mmap_mode="r" if np.prod(shape) else None)
    except (ValueError, OverflowError) as error:  # of objects, whose reading would run code, too
        raise InputError(f"{path}: not a .npy file as the format has it: {error}") from None


def manifest_hash(manifest: Manifest) -> str:
    """SHA-256 over all that a manifest says, hence (it holds the shards' SHA-256) over the whole set."""
    return hash_of(manifest.to_json())


# --- open files ----------------------------------------------------------------------------------------------------


def _read_into(into: memoryview, fd: int, offset: int) -> int:
    """Bytes read, fewer only at the file's end: a network or FUSE file system may answer with less than was asked."""
    n_read = 0
    while n_read < len(into) and (n := os.preadv(fd, [into[n_read:]], offset + n_read)):
        n_read += n
    return n_read


class _OpenFiles:
    """Files kept open between uses, at most `limit` of them (and those in use).

    Owns every descriptor of a set: nothing else closes one, and none is closed while it is used. Once closed, it keeps
    no file open beyond its use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        self.held: OrderedDict[str, list[int]] = OrderedDict()  # path -> [file descriptor, users]

    @contextmanager
    def open(self, path: str, flags: int = os.O_RDONLY, *, expected_bytes: int | None = None) -> Iterator[int]:
        """The file's descriptor. It stays open at least as long as the context."""
        with self.lock:
            entry = self.held.get(path)
            if entry is None:
                fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
                size = os.fstat(fd).st_size
                if expected_bytes not in (None, size):
                    os.close(fd)
                    raise InputError(f"{path}: {size} bytes, the manifest says {expected_bytes}: cut short or changed")
                self._shrink(self.limit - 1)
                entry = self.held[path] = [fd, 0]
            self.held.move_to_end(path)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self.lock:
                entry[1] -= 1
                if len(self.held) > self.limit:
                    self._shrink(self.limit)

    def close(self) -> None:
        with self.lock:
            self.limit = 0
            self._shrink(0)

    def _shrink(self, limit: int) -> None:
        for path in [p for p, (_, users) in self.held.items() if not users]:
            if len(self.held) <= limit:
                break
            os.close(self.held.pop(path)[0])


# --- the cache of a remote set -------------------------------------------------------------------------------------


@contextmanager
def _cache_explained(folder: str) -> Iterator[None]:
    """Raises: InputError for what the system refuses within: work on the cache alone, no read of the set itself."""
    try:
        yield
    except OSError as error:
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise InputError(f"cache_folder={folder}: {why}. Give a local folder that can be written, with room") from None


class _BlockCache:
    """The first blocks of a set that fit the limit, each at its own place in one sparse file. Readers check the CRC."""

    def __init__(self, files: _OpenFiles, path: Path, lengths: np.ndarray, limit: int) -> None:
        self.end = np.cumsum(lengths, dtype=np.int64)
        self.start = self.end - lengths.astype(np.int64)
        self.files, self.path, self.limit, self.full = files, path, limit, False
        with self._file():
            pass  # a folder that can't be written is named now

    def _file(self) -> AbstractContextManager[int]:
        return self.files.open(str(self.path), os.O_RDWR | os.O_CREAT)

    def get(self, block: int) -> bytes | None:
        if self.end[block] > self.limit:
            return None
        with self._file() as fd:
            return os.pread(fd, int(self.end[block] - self.start[block]), int(self.start[block]))

    def put(self, block: int, data: bytes) -> None:
        if self.full or self.end[block] > self.limit:
            return
        try:
            with self._file() as fd:
                os.pwrite(fd, data, int(self.start[block]))
        except OSError as error:  # a full disk costs speed, not the run
            self.full = True
            print(f"{self.path}: {error.strerror}. Nothing more is cached", file=sys.stderr)
