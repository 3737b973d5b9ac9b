"""From blocks to the counts of a micro-batch: blocks stay compact in memory and each cell is decoded as it is gathered.

A slot holds one block's decompressed payload (a byte and a half a count) and tables of where each cell's part of each
section begins. The kernels read gene steps and counts straight from it, so that a cell that is met once is decoded
once, in registers, and no wider copy of a block is ever written. A kernel that meets a cell whose sections contradict
each other leaves it, having read and written nothing out of bounds, and the gather raises.

Reading order: Slab (memory), CellSlots (fill), what it gathers, the kernels (numba; they release the GIL).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from data_pipeline.block import HEADER, decompress, read_header, sections
from data_pipeline.gene_sets import WIDTH_STEP, GeneSets, below, nth_word
from data_pipeline.schema import CODECS, Manifest, column_dtype, vocab_tag
from scldm.errors import InputError


@dataclass(frozen=True)
class Csr:
    """The counts of some cells, as they go to a GPU.

    start: (B + 1,) int32, where each cell's begin
    gene_ids: vocabulary indices, uint16 up to 65,535 genes, else int32
    counts: uint8, 0 where the count is over 255
    large_at, large: where those stand, int32, and what they are, int32, or int64 in a set with a count over 2^31
    """

    start: np.ndarray
    gene_ids: np.ndarray
    counts: np.ndarray
    large_at: np.ndarray
    large: np.ndarray


class Slab:
    """Memory in pieces from a few large arrays, which NumPy asks the system to back by huge pages: in small pages, a
    cell in a random place costs as much to find as to read."""

    BYTES = 32 << 20

    def __init__(self) -> None:
        self.lock, self.free, self.largest = threading.Lock(), np.empty(0, np.uint8), 0

    def take(self, n_bytes: int) -> np.ndarray:
        """At least n_bytes, uint8, on a line of the cache; and as many as the largest piece before it."""
        with self.lock:
            self.largest = max(self.largest, -(-(n_bytes + n_bytes // 8) // 64) * 64)
            if len(self.free) < self.largest:
                self.free = np.empty(max(self.BYTES, self.largest) + 64, np.uint8)
                self.free = self.free[-self.free.ctypes.data % 64 :]
            piece, self.free = self.free[: self.largest], self.free[self.largest :]
            return piece


class CellSlots:
    """Memory for `n_slots` blocks of cells. Different slots may be filled from different threads at once.

    about: (n_slots, block_cells, 3 + C) int64, of which these are parts:
    identity: (n_slots, block_cells, 2), (source, row)
    total_counts: (n_slots, block_cells), over all genes
    labels: (n_slots, block_cells, C) label ids, conditions in the manifest's order
    """

    def __init__(self, manifest: Manifest, n_slots: int) -> None:
        self.n_genes, self.tag = manifest.genes.n_genes, vocab_tag(manifest.genes)
        self.names = manifest.conditions.names
        self.n_labels = [manifest.conditions.n_labels(name) for name in self.names]
        cells = manifest.block_cells
        self.n_slots, self.block_cells = n_slots, cells
        self.codec, self.scratch, self.slab = manifest.codec, threading.local(), Slab()
        self.payload = [np.empty(0, np.uint8)] * n_slots
        self.where = [""] * n_slots
        # per slot: addresses of steps, packed, medium, far, large; then where in each of them a cell begins
        self.place = np.zeros((n_slots, 5), np.int64)
        self.begin = np.zeros((n_slots, cells + 1, 5), np.int32)
        # side by side, since a cell in a random place costs as much to find as to read
        self.about = np.zeros((n_slots, cells, 3 + len(self.names)), np.int64)
        self.identity, self.total_counts, self.labels = self.about[..., :2], self.about[..., 2], self.about[..., 3:]
        self.n_cells = np.zeros(n_slots, np.int64)
        self.columns: dict[int, np.ndarray] = {}  # width of a gene set -> table from gene to its place in the set
        wide = manifest.statistics.largest_count >= 1 << 31
        self.count_dtype = np.dtype(np.int64 if wide else np.int32)
        self.id_dtype = (
            column_dtype(self.n_genes + 1) if column_dtype(self.n_genes + 1) == np.uint16 else np.dtype("i4")
        )

    def buffer(self, slot: int, n_bytes: int) -> np.ndarray:
        """Memory to read a block into: the slot's own if blocks are not compressed, else the thread's."""
        if self.codec == "none":
            return self._own(slot, n_bytes)
        if len(getattr(self.scratch, "buffer", ())) < n_bytes:
            self.scratch.buffer = np.empty(n_bytes + n_bytes // 8, np.uint8)
        return self.scratch.buffer[:n_bytes]

    def _own(self, slot: int, n_bytes: int) -> np.ndarray:
        if len(self.payload[slot]) < n_bytes:
            self.payload[slot] = self.slab.take(n_bytes)
        return self.payload[slot][:n_bytes]

    def fill(self, slot: int, data: np.ndarray, where: str) -> None:
        """Puts a block's bytes, uint8, into a slot.

        Raises: InputError for bytes that are no block of this set. What is wrong within a cell's part is found when the
        cell is gathered.
        """
        stored = data.data
        header = read_header(stored, where)
        if int(header["vocab_tag"]) != self.tag or int(header["n_genes"]) != self.n_genes:
            raise InputError(f"{where}: belongs to another gene vocabulary than the manifest's")
        n_cells, n_conditions = int(header["n_cells"]), int(header["n_conditions"])
        codec = CODECS[header["codec"]]
        if n_cells > self.block_cells or n_conditions != len(self.names) or codec != self.codec:
            raise InputError(
                f"{where}: {n_cells} cells, {n_conditions} conditions, codec {codec} do not fit the manifest"
            )
        stored = stored[HEADER.itemsize : HEADER.itemsize + int(header["stored_bytes"])]
        self.where[slot], self.n_cells[slot] = where, 0
        try:
            if codec == "none":
                own = self._own(slot, len(data))
                if data.ctypes.data != own.ctypes.data:
                    own[:] = data
                own = own[HEADER.itemsize : HEADER.itemsize + len(stored)]
            else:
                own = self._own(slot, int(header["payload_bytes"]))
                payload = decompress(stored, codec, own)
                if payload.ctypes.data != own.ctypes.data:  # lz4 makes memory of its own
                    own[:] = payload
            found = sections(own, header)
            for c, ids in enumerate(found.conditions):
                self.labels[slot, :n_cells, c] = ids
                if n_cells and ids.max() >= self.n_labels[c]:
                    raise ValueError(f"a label id of {self.names[c]!r} is beyond its {self.n_labels[c]} labels")
            lengths, parts = found[:4], (found.steps, found.packed, found.medium, found.far, found.large)
            if not _locate(*lengths, *parts, self.place[slot], self.begin[slot]):
                raise ValueError("its sections do not fit each other")
        except ValueError as error:
            raise InputError(f"{where}: damaged: {error}") from None
        self.identity[slot, :n_cells, 0], self.identity[slot, :n_cells, 1] = found.sources, found.rows
        self.total_counts[slot, :n_cells] = found.totals
        self.n_cells[slot] = n_cells

    # --- gather: `slots` and `rows` are (B,) int64

    def _table(self, width: int) -> np.ndarray:
        """From gene column to place in a set of this width: `width`, a place to throw away, for genes outside of it."""
        if width not in self.columns:
            self.columns[width] = np.full(self.n_genes, width, np.uint16 if width < 1 << 16 else np.uint32)
        return self.columns[width]

    def _run(self, kernel: Callable[..., int], slots: np.ndarray, *rest: Any) -> None:
        """Raises: InputError naming the block of a cell that the kernel refused."""
        refused = kernel(slots, *rest)
        if refused >= 0:
            raise InputError(f"{self.where[slots[refused]]}: damaged: its sections do not fit each other")

    def take(self, slots: np.ndarray, rows: np.ndarray, gene_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (B, S) of the genes (S,) or (B, S), and their sums (B,) int64. Index 0 is padding: its count is 0."""
        n, width = len(slots), gene_ids.shape[-1]
        flat = np.empty(n * width + 1, self.count_dtype)
        totals = np.empty(n, np.int64)
        kernel = _take_shared if gene_ids.ndim == 1 else _take_each
        self._run(kernel, slots, rows, self.place, self.begin, gene_ids, self._table(width), flat, totals)
        return flat[:-1].reshape(n, width), totals

    def take_of_the_cell(
        self, slots: np.ndarray, rows: np.ndarray, sets: GeneSets, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gene ids (B, S) int64, counts (B, S) and their sums (B,) for the policies that look at the cell."""
        width = sets.width
        n_expressed = self.begin[slots, rows + 1, 0] - self.begin[slots, rows, 0]
        if not width:
            longest = int(n_expressed.max(initial=1))
            width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, -(-self.n_genes // WIDTH_STEP) * WIDTH_STEP)
        ids, counts = np.zeros((len(slots), width), np.int64), np.zeros((len(slots), width), self.count_dtype)
        totals = np.empty(len(slots), np.int64)
        fill_up = sets.config.policy == "expressed_plus_zeros"
        of_genes = self.n_genes, fill_up
        self._run(_take_expressed, slots, rows, self.place, self.begin, *of_genes, words, ids, counts, totals)
        return ids, counts, totals

    def take_csr(self, slots: np.ndarray, rows: np.ndarray) -> Csr:
        """All counts of the cells."""
        first, last = self.begin[slots, rows], self.begin[slots, rows + 1]
        start = np.concatenate([[0], np.cumsum(last[:, 0] - first[:, 0])]).astype(np.int32)
        n_large = int((last[:, 4] - first[:, 4]).sum())
        ids, counts = np.empty(start[-1], self.id_dtype), np.empty(start[-1], np.uint8)
        large_at, large = np.empty(n_large, np.int32), np.empty(n_large, self.count_dtype)
        self._run(_take_csr, slots, rows, self.place, self.begin, self.n_genes, ids, counts, large_at, large)
        return Csr(start, ids, counts, large_at, large)


# --- kernels -------------------------------------------------------------------------------------------------------


@intrinsic
def _as_pointer(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _as_prefetch(typing_context, address):
    """Asks for the line of the cache at an address, which need not be one of ours."""

    def generate(context, builder, signature, arguments):
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        to_read, keep, data = number(0), number(3), number(1)
        builder.call(prefetch, [builder.inttoptr(arguments[0], cgutils.voidptr_t), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(address), generate


# names without a type, since the decorator hides that numba passes the typing context
_pointer: Any = _as_pointer
_prefetch: Any = _as_prefetch


@njit(nogil=True, cache=True)
def _locate(nonzeros, n_far, n_medium, n_large, steps, packed, medium, far, large, place, begin):
    """Where the sections lie, and where each cell begins in them; False where the lengths do not add up to theirs."""
    place[0], place[1], place[2] = steps.ctypes.data, packed.ctypes.data, medium.ctypes.data
    place[3], place[4] = far.ctypes.data, large.ctypes.data
    k, p, m, f, g = np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for cell in range(len(nonzeros)):
        begin[cell, 0], begin[cell, 1], begin[cell, 2], begin[cell, 3], begin[cell, 4] = k, p, m, f, g
        n = np.int64(nonzeros[cell])
        k, p, m = k + n, p + (n + 1) // 2, m + np.int64(n_medium[cell])
        f, g = f + np.int64(n_far[cell]), g + np.int64(n_large[cell])
    n = len(nonzeros)
    for cell in range(n, len(begin)):  # what comes after the last one is empty
        begin[cell, 0], begin[cell, 1], begin[cell, 2], begin[cell, 3], begin[cell, 4] = k, p, m, f, g
    whole = k == len(steps) and m == len(medium) and f == len(far) and g == len(large)
    return whole and (p + 7) // 8 * 8 == len(packed)


@njit(nogil=True, cache=True)
def _sum(values):
    total = np.int64(0)
    for j in range(np.uint64(len(values))):
        total += np.int64(values[j])
    return total


@njit(nogil=True, inline="always")
def _ask_for(place, begin, slots, rows, i):
    """Has cell i's steps and counts, and where those of the one after it lie, brought nearer while another one is
    decoded."""
    if i >= len(slots):
        return
    if i + 1 < len(slots):
        _prefetch(begin.ctypes.data + (slots[i + 1] * begin.shape[1] + rows[i + 1]) * begin.shape[2] * 4)
    slot, row = slots[i], rows[i]
    for k in range(2):
        at, end = place[slot, k] + begin[slot, row, k], place[slot, k] + begin[slot, row + 1, k]
        while at < end:
            _prefetch(at)
            at += 64


@njit(nogil=True, inline="always")
def _parts(place, begin, slot, row):
    """Steps, packed counts, medium, far and large of one cell."""
    k, p, m = begin[slot, row, 0], begin[slot, row, 1], begin[slot, row, 2]
    f, g = begin[slot, row, 3], begin[slot, row, 4]
    n, n_packed = begin[slot, row + 1, 0] - k, begin[slot, row + 1, 1] - p
    n_medium, n_far, n_large = begin[slot, row + 1, 2] - m, begin[slot, row + 1, 3] - f, begin[slot, row + 1, 4] - g
    steps = carray(_pointer(place[slot, 0] + k), (n,), np.uint8)
    packed = carray(_pointer(place[slot, 1] + p), (n_packed,), np.uint8)
    medium = carray(_pointer(place[slot, 2] + m), (n_medium,), np.uint8)
    far = carray(_pointer(place[slot, 3] + 4 * np.int64(f)), (n_far,), np.uint32)
    large = carray(_pointer(place[slot, 4] + 8 * np.int64(g)), (n_large,), np.uint64)
    return steps, packed, medium, far, large


@njit(nogil=True, inline="always")
def _reach(steps, far):
    """The gene column after the cell's last one, if every step that is 0 stands in `far`; over 2^60 for a step back."""
    # by 128 bytes, whose sum fits 16 bits, so that the compiler's vectors hold as many numbers as they can
    total = np.uint64(0)
    k, n, stretch = np.uint64(0), np.uint64(len(steps)), np.uint64(128)
    while k + stretch <= n:
        small = np.uint16(0)
        for j in range(stretch):
            small = np.uint16(small + np.uint16(steps[k + j]))
        total, k = total + np.uint64(small), k + stretch
    for j in range(k, n):
        total += np.uint64(steps[j])
    for j in range(np.uint64(len(far))):
        total += np.uint64(far[j])
        total |= np.uint64(far[j] == 0) << np.uint64(60)
    return total


@njit(nogil=True, inline="always")
def _escaped(medium, m, large, g):
    """The count of an escape, 0 where the tables have no more, and where they go on."""
    if m >= np.uint64(len(medium)):
        return np.uint64(0), m, g
    count = np.uint64(medium[m])
    m += np.uint64(1)
    if count == 0 and g < np.uint64(len(large)):
        count = large[g]
        g += np.uint64(1)
    return count, m, g


@njit(nogil=True, inline="always")
def _scatter(steps, packed, medium, far, large, n_genes, table, flat, base):
    """Decodes one cell and writes each count to its place in flat[base:]; False where the cell is not sound."""
    if _reach(steps, far) > np.uint64(n_genes):
        return False
    f, m, g = np.uint64(0), np.uint64(0), np.uint64(0)
    column = np.uint64(0)  # one more than the gene column, so that it never passes through -1
    n, one = np.uint64(len(steps)), np.uint64(1)
    for k in range(n >> one):
        pair = np.uint64(packed[k])
        for half in range(2):  # unrolled
            step, count = np.uint64(steps[k + k + np.uint64(half)]), pair & np.uint64(15)
            pair >>= np.uint64(4)
            if step == 0:
                if f == np.uint64(len(far)):
                    return False
                step = np.uint64(far[f])
                f += one
            column += step
            if count == 0:
                count, m, g = _escaped(medium, m, large, g)
                if count == 0:
                    return False
            flat[base + np.uint64(table[column - one])] = count
    if n & one:
        step, count = np.uint64(steps[n - one]), np.uint64(packed[n >> one]) & np.uint64(15)
        if step == 0:
            if f == np.uint64(len(far)):
                return False
            step = np.uint64(far[f])
            f += one
        column += step
        if count == 0:
            count, m, g = _escaped(medium, m, large, g)
            if count == 0:
                return False
        flat[base + np.uint64(table[column - one])] = count
    return f == np.uint64(len(far)) and m == np.uint64(len(medium)) and g == np.uint64(len(large))


@njit(nogil=True, cache=True)
def take_cells(slots, rows, about):
    """Of the cells in these slots and rows: label ids (C, B), identities (B, 2), total counts (B,) float32."""
    n, n_labels = len(slots), about.shape[2] - 3
    ids, who, totals = np.empty((n_labels, n), np.int64), np.empty((n, 2), np.int64), np.empty(n, np.float32)
    for i in range(n):  # all at once: one after the other, each would be waited for
        _prefetch(about.ctypes.data + (slots[i] * about.shape[1] + rows[i]) * about.shape[2] * 8)
    for i in range(n):
        slot, row = slots[i], rows[i]
        who[i, 0], who[i, 1], totals[i] = about[slot, row, 0], about[slot, row, 1], about[slot, row, 2]
        for c in range(n_labels):
            ids[c, i] = about[slot, row, 3 + c]
    return ids, who, totals


@njit(nogil=True, cache=True)
def _take_shared(slots, rows, place, begin, gene_ids, table, flat, totals):
    """The first cell that is not sound, or -1. flat is (B * S + 1,): a count outside of the set lands where the next
    cell begins, which is cleared after it."""
    width, refused = len(gene_ids), -1
    for j in range(width):
        table[np.int64(gene_ids[j]) - 1] = j
    flat[:width] = 0
    for i in range(len(slots)):
        _ask_for(place, begin, slots, rows, i + 1)
        base = i * width
        steps, packed, medium, far, large = _parts(place, begin, slots[i], rows[i])
        if not _scatter(steps, packed, medium, far, large, len(table), table, flat, np.uint64(base)):
            refused = i
            break
        totals[i] = _sum(flat[base : base + width])
        flat[base + width : min(base + 2 * width, len(flat))] = 0
    for j in range(width):
        table[np.int64(gene_ids[j]) - 1] = width
    return refused


@njit(nogil=True, cache=True)
def _take_each(slots, rows, place, begin, gene_ids, table, flat, totals):
    """_take_shared with a set per cell, in which 0 is padding."""
    width = gene_ids.shape[1]
    flat[:width] = 0
    for i in range(len(slots)):
        _ask_for(place, begin, slots, rows, i + 1)
        for j in range(width):
            if gene_ids[i, j]:
                table[np.int64(gene_ids[i, j]) - 1] = j
        base = i * width
        steps, packed, medium, far, large = _parts(place, begin, slots[i], rows[i])
        sound = _scatter(steps, packed, medium, far, large, len(table), table, flat, np.uint64(base))
        for j in range(width):
            if gene_ids[i, j]:
                table[np.int64(gene_ids[i, j]) - 1] = width
        if not sound:
            return i
        totals[i] = _sum(flat[base : base + width])
        flat[base + width : min(base + 2 * width, len(flat))] = 0
    return -1


@njit(nogil=True, cache=True)
def _take_expressed(slots, rows, place, begin, n_genes, fill_up, words, ids, out, totals):
    """A cell's expressed genes in ascending order; a uniform choice of them where they are too many; filled up with
    unexpressed ones if asked. `words` (B,) seeds the draws of each cell. Returns the first cell that is not sound, or
    -1."""
    width = ids.shape[1]
    others = np.empty(n_genes if fill_up else 0, np.int32)
    for i in range(len(slots)):
        steps, packed, medium, far, large = _parts(place, begin, slots[i], rows[i])
        if _reach(steps, far) > np.uint64(n_genes):
            return i
        f, m, g = 0, np.uint64(0), np.uint64(0)
        column, written, total = np.int64(0), 0, np.int64(0)
        n = len(steps)
        too_many = n > width
        n_others = 0
        for j in range(n):
            step, count = np.int64(steps[j]), np.uint64((packed[j // 2] >> np.uint8(4 * (j % 2))) & 15)
            if step == 0:
                if f == len(far):
                    return i
                step = np.int64(far[f])
                f += 1
            if count == 0:
                count, m, g = _escaped(medium, m, large, g)
                if count == 0:
                    return i
            if fill_up and not too_many:
                for gene in range(column + 1, column + step):
                    others[n_others] = gene
                    n_others += 1
            column += step
            if too_many:
                # selection sampling: keep with probability (still wanted) / (still to come); Knuth vol. 2, 3.4.2 S
                if written == width:
                    break
                if below(nth_word(words[i], j), n - j) >= width - written:
                    continue
            ids[i, written] = column
            out[i, written] = count
            written += 1
            total += np.int64(count)
        if not too_many and (f != len(far) or m != np.uint64(len(medium)) or g != np.uint64(len(large))):
            return i
        totals[i] = total
        if fill_up and not too_many:
            for gene in range(column + 1, n_genes + 1):
                others[n_others] = gene
                n_others += 1
            for j in range(min(width - written, n_others)):
                chosen = j + below(nth_word(words[i], j), n_others - j)
                ids[i, written + j] = others[chosen]
                others[chosen] = others[j]
    return -1


@njit(nogil=True, cache=True)
def _take_csr(slots, rows, place, begin, n_genes, ids, out, large_at, large_out):
    """Every gene and count of the cells, one after the other. Returns the first cell that is not sound, or -1."""
    k, one = np.uint64(0), np.uint64(1)
    g = np.uint64(0)
    for i in range(len(slots)):
        _ask_for(place, begin, slots, rows, i + 1)
        steps, packed, medium, far, large = _parts(place, begin, slots[i], rows[i])
        if _reach(steps, far) > np.uint64(n_genes):
            return i
        f, m, h, column = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
        for j in range(np.uint64(len(steps))):
            step = np.uint64(steps[j])
            if step == 0:
                if f == np.uint64(len(far)):
                    return i
                step = np.uint64(far[f])
                f += one
            column += step
            ids[k] = column
            count = (packed[j >> one] >> np.uint8((j & one) << np.uint64(2))) & np.uint8(15)
            if count == 0:
                if m == np.uint64(len(medium)):
                    return i
                count = medium[m]
                m += one
                if count == 0:
                    if h == np.uint64(len(large)):
                        return i
                    large_at[g], large_out[g] = k, np.int64(large[h])
                    g, h = g + one, h + one
            out[k] = count
            k += one
        if f != np.uint64(len(far)) or m != np.uint64(len(medium)) or h != np.uint64(len(large)):
            return i
    return -1
