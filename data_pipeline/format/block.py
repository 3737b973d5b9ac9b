"""A block: up to 256 cells of one split as bytes, and back. The layout is specified in README.md.

A cell costs a byte and a half per expressed gene before the codec: the step from the gene before, and its count. What
is rare (counts over 15, steps over 255) is stored so that a reader needs no branch for it. A larger count stands in a
table with its gene. A longer step is several steps, to genes whose count is 0.

Reading order: header, codec, NarrowCells, encode_block, sections, BlockBuffers, decode_block. The kernels are in
block_kernels.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lz4.block
import numpy as np
import zstandard

from data_pipeline.format.block_kernels import count_entries, pack, take_parts, widen
from data_pipeline.format.schema import CODECS, Codec, column_dtype
from scldm.errors import InputError

MAGIC = b"SCLDMBLK"
BLOCK_VERSION = 3
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u2"),
        ("codec", "<u1"),
        ("split", "<u1"),
        ("n_cells", "<u2"),
        ("n_conditions", "<u2"),
        ("n_genes", "<u4"),
        ("n_nonzeros", "<u4"),
        ("n_entries", "<u4"),
        ("n_escapes", "<u4"),
        ("n_large_counts", "<u4"),
        ("reserved", "<u4"),
        ("payload_bytes", "<u4"),
        ("stored_bytes", "<u4"),
        ("vocab_tag", "<u8"),
        ("largest_count", "<u8"),
    ]
)
assert HEADER.itemsize == 64
U1, U2, U4, U8, I8 = map(np.dtype, ("<u1", "<u2", "<u4", "<u8", "<i8"))
ALIGN = 8  # every section starts at a multiple of it, so that a view of any dtype is aligned


@dataclass(frozen=True)
class Block:
    """Decoded cells in CSR. Arrays may be views of the buffers that were passed to decode_block.

    split: number of the split
    n_genes: width of the matrix
    indptr: (n_cells + 1,) int64
    columns: (n_nonzeros,) gene columns (vocabulary index minus 1), ascending within a cell
    counts: (n_nonzeros,) counts, all at least 1
    sources, rows: (n_cells,) uint16 and int64, a cell's identity
    conditions: one (n_cells,) array of label ids per condition, in the vocabulary's order
    """

    split: int
    n_genes: int
    indptr: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    sources: np.ndarray
    rows: np.ndarray
    conditions: tuple[np.ndarray, ...]

    @property
    def n_cells(self) -> int:
        return len(self.sources)


# --- codec ---------------------------------------------------------------------------------------------------------

_per_thread = threading.local()  # a zstd context must not be shared between threads, and is dear to make anew


def compress(payload: bytes | memoryview, codec: Codec, level: int) -> bytes:
    """none: the bytes as they are. lz4: one raw LZ4 block. zstd: one frame with its content size and no checksum."""
    if codec == "none":
        return bytes(payload)
    if codec == "lz4":
        return lz4.block.compress(payload, store_size=False)
    key = f"compress{level}"
    if not hasattr(_per_thread, key):
        # What repeats here does so by chance. Looking for fewer and longer repeats packs better and is read faster, at
        # every level. At level 1, 1,571 -> 1,561 B a cell, decoded in 1.79 -> 1.68 us, encoded in 3.9 -> 2.9.
        few = zstandard.ZstdCompressionParameters.from_level(level, hash_log=8, min_match=7)
        setattr(_per_thread, key, zstandard.ZstdCompressor(compression_params=few))
    return getattr(_per_thread, key).compress(payload)


def decompress(stored: memoryview, codec: Codec, out: np.ndarray) -> np.ndarray:
    """The payload, uint8, of the length of `out`. It lies in `out`, but for lz4 and none, which need no copy.

    Raises: ValueError for bytes that do not decompress to exactly that length.
    """
    if codec == "none":
        payload = np.frombuffer(stored, np.uint8)
    elif codec == "lz4":
        try:
            payload = np.frombuffer(lz4.block.decompress(stored, uncompressed_size=len(out)), np.uint8)
        except (lz4.block.LZ4BlockError, OverflowError) as error:
            raise ValueError(f"lz4: {error}") from None
    else:
        if not hasattr(_per_thread, "decompress"):
            _per_thread.decompress = zstandard.ZstdDecompressor()
        view, done = out.data, 0
        try:
            with _per_thread.decompress.stream_reader(stored) as reader:
                while done < len(out) and (n := reader.readinto(view[done:])):
                    done += n
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd: {error}") from None
        payload = out[:done]
    if len(payload) != len(out):
        raise ValueError(f"payload has {len(payload)} bytes where its header says {len(out)}")
    return payload


# --- encode --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NarrowCells:
    """Cells as bytes, before their counts are packed: every cell's part is independent of the cells beside it.

    nonzeros, n_far, n_large: (n_cells,) uint32, what belongs to each cell in the four arrays below
    steps, small: (n_nonzeros,) uint8, gene steps and counts. 0 where the value stands in `far` or `large`
    far, large: uint32 and uint64, the steps and counts over 255, in order
    """

    nonzeros: np.ndarray
    n_far: np.ndarray
    n_large: np.ndarray
    steps: np.ndarray
    small: np.ndarray
    far: np.ndarray
    large: np.ndarray

    def __len__(self) -> int:
        return len(self.nonzeros)

    def take(self, order: np.ndarray) -> NarrowCells:
        """The cells at these positions, in this order."""
        parts = []
        owned = (
            (self.steps, self.nonzeros),
            (self.small, self.nonzeros),
            (self.far, self.n_far),
            (self.large, self.n_large),
        )
        for values, lengths in owned:
            out = np.empty(int(lengths[order].sum(dtype=np.int64)), values.dtype)
            starts = np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(lengths, out=starts[1:])
            take_parts(values, starts, order, out)
            parts.append(out)
        return NarrowCells(self.nonzeros[order], self.n_far[order], self.n_large[order], *parts)


def encode_block(
    cells: NarrowCells,
    *,
    split: int,
    n_genes: int,
    vocab_tag: int,
    sources: np.ndarray,
    rows: np.ndarray,
    conditions: Sequence[np.ndarray],
    codec: Codec,
    level: int = 1,
) -> bytes:
    """The bytes of a block. `conditions` have their stored dtype."""
    assert len(cells) == len(sources) == len(rows)
    widths = np.array([c.dtype.itemsize for c in conditions], np.uint8)
    n_needed, n_escapes = np.empty(len(cells), np.uint32), np.empty(len(cells), np.uint32)
    count_entries(cells.nonzeros, cells.small, cells.n_far, cells.far, n_needed, n_escapes)
    n_entries = n_needed + n_needed % 2
    steps, totals = np.empty(n_entries.sum(dtype=np.int64), np.uint8), np.empty(len(cells), np.uint64)
    counts, packed = np.empty(len(steps), np.uint8), np.empty(len(steps) // 2, np.uint8)
    escaped = np.empty(n_escapes.sum(dtype=np.int64) + 1, column_dtype(n_genes))
    medium = np.empty(len(escaped), np.uint8)
    given = cells.nonzeros, cells.steps, cells.small, cells.far, cells.large
    pack(*given, n_needed, steps, counts, packed, escaped, medium, totals)
    table = [cells.nonzeros.astype("<u4"), n_entries, n_escapes, cells.n_large.astype("<u4"), totals]
    identity = [sources.astype("<u2"), rows.astype("<i8"), widths, *conditions]
    payload = b"".join(map(_padded, [*table, *identity, cells.large, escaped[:-1], medium[:-1], steps, packed]))
    stored = compress(payload, codec, level)
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["codec"] = MAGIC, BLOCK_VERSION, CODECS.index(codec)
    header["split"], header["n_cells"], header["n_conditions"] = split, len(cells), len(conditions)
    header["n_genes"], header["n_nonzeros"] = n_genes, len(cells.steps)
    header["n_entries"], header["n_escapes"] = len(steps), len(medium) - 1
    header["n_large_counts"] = len(cells.large)
    header["payload_bytes"], header["stored_bytes"] = len(payload), len(stored)
    header["vocab_tag"] = vocab_tag
    header["largest_count"] = cells.large.max() if len(cells.large) else cells.small.max(initial=0)
    return header.tobytes() + stored


def _padded(section: np.ndarray) -> bytes:
    return section.tobytes() + bytes(-section.nbytes % ALIGN)


# --- decode --------------------------------------------------------------------------------------------------------


class Sections(NamedTuple):
    """Views of a payload's sections, in the order in which they are stored. README.md says what each is."""

    nonzeros: np.ndarray
    n_entries: np.ndarray
    n_escapes: np.ndarray
    n_large: np.ndarray
    totals: np.ndarray
    sources: np.ndarray
    rows: np.ndarray
    conditions: tuple[np.ndarray, ...]
    large: np.ndarray
    escaped: np.ndarray
    medium: np.ndarray
    steps: np.ndarray
    packed: np.ndarray


def sections(payload: np.ndarray, header: np.void) -> Sections:
    """The sections of a payload (uint8), whose header this is. They may contradict each other.

    Raises: ValueError for a payload too short for what the header says, or with strange label ids.
    """
    at = 0

    def section(dtype: np.dtype, n: int) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(payload, dtype, n, at) if n else np.empty(0, dtype)
        at += -(-n * dtype.itemsize // ALIGN) * ALIGN
        return values

    n = int(header["n_cells"])
    nonzeros, n_entries, n_escapes, n_large = (section(U4, n) for _ in range(4))
    totals, sources, rows = section(U8, n), section(U2, n), section(I8, n)
    widths = section(U1, int(header["n_conditions"])).tolist()
    if not set(widths) <= {1, 2, 4}:
        raise ValueError(f"condition widths {widths}")
    conditions = tuple(section({1: U1, 2: U2, 4: U4}[width], n) for width in widths)
    large = section(U8, int(header["n_large_counts"]))
    escaped = section(column_dtype(int(header["n_genes"])), int(header["n_escapes"]))
    medium, steps = section(U1, int(header["n_escapes"])), section(U1, int(header["n_entries"]))
    packed = payload[at:]
    per_cell = nonzeros, n_entries, n_escapes, n_large, totals, sources, rows, conditions
    return Sections(*per_cell, large, escaped, medium, steps, packed)


class BlockBuffers:
    """Memory that one thread reuses from block to block: fresh pages cost more than decoding. Grows, never shrinks.

    column_dtype, count_dtype: what decode_block writes. schema.column_dtype and schema.count_dtype give the narrowest
    """

    def __init__(self, column_dtype: np.dtype | str, count_dtype: np.dtype | str) -> None:
        self.payload = np.empty(0, np.uint8)
        self.indptr = np.empty(0, np.int64)
        self.columns = np.empty(0, column_dtype)
        self.counts = np.empty(0, count_dtype)

    def take(self, name: str, n: int) -> np.ndarray:
        """The first n elements of a buffer."""
        if len(getattr(self, name)) < n:
            setattr(self, name, np.empty(n + n // 4, getattr(self, name).dtype))
        return getattr(self, name)[:n]


def read_header(data: bytes | bytearray | memoryview, where: str = "block") -> np.void:
    """The header of a block's bytes, as a record of HEADER.

    Raises: InputError for bytes that are no block, of an unknown version, or shorter than the header says.
    """
    if len(data) < HEADER.itemsize:
        raise InputError(f"{where}: {len(data)} bytes are too few for a block")
    header = np.frombuffer(data, HEADER, count=1)[0]
    if header["magic"] != MAGIC:
        raise InputError(f"{where}: not a block (it begins with {bytes(data[:8])!r})")
    if header["version"] != BLOCK_VERSION or header["codec"] >= len(CODECS):
        raise InputError(f"{where}: block version {header['version']}, codec {header['codec']} are unknown")
    if len(data) < HEADER.itemsize + int(header["stored_bytes"]):
        raise InputError(f"{where}: {len(data)} bytes, its header says {HEADER.itemsize + int(header['stored_bytes'])}")
    return header


def decode_block(
    data: bytes | bytearray | memoryview,
    buffers: BlockBuffers | None = None,
    *,
    vocab_tag: int | None = None,
    where: str = "block",
) -> Block:
    """The cells of a block's bytes. With buffers, the arrays are views of them or of `data`: valid until the next call
    with the same buffers.

    vocab_tag: refuse a block of another gene vocabulary
    Raises: InputError for bytes that are no sound block.
    """
    header = read_header(data, where)
    if vocab_tag is not None and int(header["vocab_tag"]) != vocab_tag:
        raise InputError(f"{where}: belongs to another gene vocabulary than the manifest's")
    n_genes, largest = int(header["n_genes"]), int(header["largest_count"])
    if buffers is None:
        buffers = BlockBuffers(column_dtype(n_genes), "<i4" if largest < 1 << 31 else "<i8")
    if n_genes - 1 > np.iinfo(buffers.columns.dtype).max or largest > np.iinfo(buffers.counts.dtype).max:
        dtypes = f"{buffers.columns.dtype}, {buffers.counts.dtype}"
        raise InputError(f"{where}: {n_genes} genes and a count of {largest} do not fit {dtypes}")
    start = HEADER.itemsize
    stored = memoryview(data)[start : start + int(header["stored_bytes"])]
    try:
        payload = decompress(stored, CODECS[header["codec"]], buffers.take("payload", int(header["payload_bytes"])))
        found = sections(payload, header)
        indptr = buffers.take("indptr", len(found.nonzeros) + 1)
        n_nonzeros = int(header["n_nonzeros"])
        columns, counts = buffers.take("columns", n_nonzeros), buffers.take("counts", n_nonzeros)
        per_cell = found.nonzeros, found.n_entries, found.n_escapes, found.n_large, found.totals
        tables = found.large, found.escaped, found.medium
        if not widen(*per_cell, *tables, found.steps, found.packed, n_genes, indptr, columns, counts):
            raise ValueError("its sections do not fit each other")
    except ValueError as error:
        raise InputError(f"{where}: damaged: {error}") from None
    return Block(int(header["split"]), n_genes, indptr, columns, counts, found.sources, found.rows, found.conditions)
