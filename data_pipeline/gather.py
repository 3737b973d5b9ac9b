"""From blocks to the counts of a micro-batch: blocks stay compact in memory and each cell is decoded as it is gathered.

A slot holds one block's decompressed payload (2 bytes a count) and tables of where each cell's counts, large gene steps
and large counts begin. The kernels read gene steps and counts straight from it, so that a cell that is met once is
decoded once, in registers, and no wider copy of a block is ever written.

Reading order: CellSlots (fill), what it gathers, the kernels (numba; they release the GIL).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from data_pipeline.block import ALIGN, HEADER, decompress, read_header
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


class CellSlots:
    """Memory for `n_slots` blocks of cells. Different slots may be filled from different threads at once.

    labels: (n_slots, block_cells, C) int64 label ids, conditions in the manifest's order
    identity: (n_slots, block_cells, 2) int64, (source, row)
    total_counts: (n_slots, block_cells) int64, over all genes
    """

    def __init__(self, manifest: Manifest, n_slots: int) -> None:
        self.n_genes, self.tag = manifest.genes.n_genes, vocab_tag(manifest.genes)
        self.names = manifest.conditions.names
        self.n_labels = [manifest.conditions.n_labels(name) for name in self.names]
        cells = manifest.block_cells
        self.n_slots, self.block_cells = n_slots, cells
        self.codec, self.scratch = manifest.codec, threading.local()
        self.payload = [np.empty(0, np.uint8)] * n_slots
        # per slot: address of the payload; offsets within it of gene steps, counts, large steps, large counts
        self.place = np.zeros((n_slots, 5), np.int64)
        self.begin = np.zeros((n_slots, cells + 1, 3), np.int32)  # of a cell in counts, large steps, large counts
        self.labels = np.zeros((n_slots, cells, len(self.names)), np.int64)
        self.identity = np.zeros((n_slots, cells, 2), np.int64)
        self.total_counts = np.zeros((n_slots, cells), np.int64)
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
            self.payload[slot] = np.empty(n_bytes + n_bytes // 8 + ALIGN, np.uint8)
        return self.payload[slot][:n_bytes]

    def fill(self, slot: int, data: np.ndarray, where: str) -> None:
        """Puts a block's bytes, uint8, into a slot.

        Raises: InputError for bytes that are no sound block of this set.
        """
        stored = data.data
        header = read_header(stored, where)
        if int(header["vocab_tag"]) != self.tag or int(header["n_genes"]) != self.n_genes:
            raise InputError(f"{where}: belongs to another gene vocabulary than the manifest's")
        n_cells, n_nonzeros = int(header["n_cells"]), int(header["n_nonzeros"])
        n_conditions, codec = int(header["n_conditions"]), CODECS[header["codec"]]
        if n_cells > self.block_cells or n_conditions != len(self.names) or codec != self.codec:
            raise InputError(
                f"{where}: {n_cells} cells, {n_conditions} conditions, codec {codec} do not fit the manifest"
            )
        stored = stored[HEADER.itemsize : HEADER.itemsize + int(header["stored_bytes"])]
        at = 0

        def section(dtype: str, n: int) -> np.ndarray:
            nonlocal at
            values = np.frombuffer(own, dtype, count=n, offset=at) if n else np.empty(0, dtype)
            at += values.nbytes + -values.nbytes % ALIGN
            return values

        try:
            if codec == "none":
                own = self._own(slot, len(data))
                if data.ctypes.data != own.ctypes.data:
                    own[:] = data
                own = own[HEADER.itemsize :]
            else:
                own = self._own(slot, int(header["payload_bytes"]))
                payload = decompress(stored, codec, own)
                if payload.ctypes.data != own.ctypes.data:  # lz4 makes memory of its own
                    own[:] = payload
            nonzeros, sources, rows = section("<u4", n_cells), section("<u2", n_cells), section("<i8", n_cells)
            widths = section("<u1", n_conditions)
            if any(width not in (1, 2, 4) for width in widths.tolist()):
                raise ValueError(f"condition widths {widths.tolist()}")
            for c, width in enumerate(widths):
                self.labels[slot, :n_cells, c] = section(f"<u{width}", n_cells)
                if n_cells and self.labels[slot, :n_cells, c].max() >= self.n_labels[c]:
                    raise ValueError(f"a label id of {self.names[c]!r} is beyond its {self.n_labels[c]} labels")
            far_at, n_far = at, int(header["n_far_genes"])
            far = section("<u4", n_far)
            large_at, n_large = at, int(header["n_large_counts"])
            large = section("<u8", n_large)
            steps_at = at
            steps = section("<u1", n_nonzeros)
            counts_at = at
            counts = section("<u1", n_nonzeros)
            begin, total = self.begin[slot], self.total_counts[slot]
            if not _measure(nonzeros, steps, counts, far, large, self.n_genes, begin, total):
                raise ValueError("its sections do not fit each other")
        except ValueError as error:
            raise InputError(f"{where}: damaged: {error}") from None
        self.identity[slot, :n_cells, 0], self.identity[slot, :n_cells, 1] = sources, rows
        self.n_cells[slot] = n_cells
        self.place[slot] = own.ctypes.data, steps_at, counts_at, far_at, large_at

    # --- gather: `slots` and `rows` are (B,) int64

    def _table(self, width: int) -> np.ndarray:
        """From gene column to place in a set of this width: `width`, a place to throw away, for genes outside of it."""
        if width not in self.columns:
            self.columns[width] = np.full(self.n_genes, width, np.uint16 if width < 1 << 16 else np.uint32)
        return self.columns[width]

    def take(self, slots: np.ndarray, rows: np.ndarray, gene_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (B, S) of the genes (S,) or (B, S), and their sums (B,) int64. Index 0 is padding: its count is 0."""
        n, width = len(slots), gene_ids.shape[-1]
        flat = np.empty(n * width + 1, self.count_dtype)
        totals = np.empty(n, np.int64)
        kernel = _take_shared if gene_ids.ndim == 1 else _take_each
        kernel(slots, rows, self.place, self.begin, gene_ids, self._table(width), flat, totals)
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
        _take_expressed(slots, rows, self.place, self.begin, self.n_genes, fill_up, words, ids, counts, totals)
        return ids, counts, totals

    def take_csr(self, slots: np.ndarray, rows: np.ndarray) -> Csr:
        """All counts of the cells."""
        first, last = self.begin[slots, rows], self.begin[slots, rows + 1]
        start = np.concatenate([[0], np.cumsum(last[:, 0] - first[:, 0])]).astype(np.int32)
        n_large = int((last[:, 2] - first[:, 2]).sum())
        ids, counts = np.empty(start[-1], self.id_dtype), np.empty(start[-1], np.uint8)
        large_at, large = np.empty(n_large, np.int32), np.empty(n_large, self.count_dtype)
        _take_csr(slots, rows, self.place, self.begin, ids, counts, large_at, large)
        return Csr(start, ids, counts, large_at, large)


# --- kernels -------------------------------------------------------------------------------------------------------


@intrinsic
def _as_pointer(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


# a name without a type, since the decorator hides that numba passes the typing context
_pointer: Any = _as_pointer


@njit(nogil=True, cache=True)
def _zeros_and_sum(values):
    """How many bytes are 0, and the sum of all. By 128, whose sums fit 8 and 16 bits, so that the compiler's vectors
    hold as many numbers as they can."""
    zeros, total = np.uint64(0), np.uint64(0)
    k, n, step = np.uint64(0), np.uint64(len(values)), np.uint64(128)
    while k + step <= n:
        few, small = np.uint8(0), np.uint16(0)
        for j in range(step):
            few = np.uint8(few + np.uint8(values[k + j] == 0))
            small = np.uint16(small + np.uint16(values[k + j]))
        zeros, total, k = zeros + np.uint64(few), total + np.uint64(small), k + step
    for j in range(k, n):
        zeros += np.uint64(values[j] == 0)
        total += np.uint64(values[j])
    return np.int64(zeros), np.int64(total)


@njit(nogil=True, cache=True)
def _sum(values):
    total = np.int64(0)
    for j in range(np.uint64(len(values))):
        total += np.int64(values[j])
    return total


@njit(nogil=True, cache=True)
def _measure(nonzeros, steps, counts, far, large, n_genes, begin, total):
    """Where each cell begins in counts, far and large, and its total counts; False where a kernel that trusted these
    sections would read or write out of bounds."""
    k, f, g = 0, 0, 0
    for cell in range(len(nonzeros)):
        begin[cell, 0], begin[cell, 1], begin[cell, 2] = k, f, g
        end = k + np.int64(nonzeros[cell])
        if end > len(steps):
            return False
        n_far, reach = _zeros_and_sum(steps[k:end])
        n_large, summed = _zeros_and_sum(counts[k:end])
        if f + n_far > len(far) or g + n_large > len(large):
            return False
        column, all_counts = reach, summed
        for j in range(f, f + n_far):
            if far[j] == 0:
                return False
            column += np.int64(far[j])
        for j in range(g, g + n_large):
            all_counts += np.int64(large[j])
        if column > n_genes:
            return False
        total[cell] = all_counts
        k, f, g = end, f + n_far, g + n_large
    n = len(nonzeros)
    begin[n, 0], begin[n, 1], begin[n, 2] = k, f, g
    return k == len(steps) and f == len(far) and g == len(large)


@njit(nogil=True, inline="always")
def _sections(place, begin, slot, row):
    """Steps, counts, far and large of one cell."""
    k, f, g = begin[slot, row, 0], begin[slot, row, 1], begin[slot, row, 2]
    n = begin[slot, row + 1, 0] - k
    n_far, n_large = begin[slot, row + 1, 1] - f, begin[slot, row + 1, 2] - g
    base = place[slot, 0]
    steps = carray(_pointer(base + place[slot, 1] + k), (n,), np.uint8)
    counts = carray(_pointer(base + place[slot, 2] + k), (n,), np.uint8)
    far = carray(_pointer(base + place[slot, 3] + 4 * np.int64(f)), (n_far,), np.uint32)
    large = carray(_pointer(base + place[slot, 4] + 8 * np.int64(g)), (n_large,), np.uint64)
    return steps, counts, far, large


@njit(nogil=True, inline="always")
def _scatter(steps, counts, far, large, table, flat, base):
    """Decodes one cell and writes each count to its place in flat[base:]."""
    f, g = np.uint64(0), np.uint64(0)
    column = np.uint64(0)  # one more than the gene column, so that it never passes through -1
    for j in range(np.uint64(len(steps))):
        step, count = np.uint64(steps[j]), np.uint64(counts[j])
        if step == 0:
            step = np.uint64(far[f])
            f += np.uint64(1)
        column += step
        if count == 0:
            count = large[g]
            g += np.uint64(1)
        flat[base + np.uint64(table[column - np.uint64(1)])] = count


@njit(nogil=True, cache=True)
def _take_shared(slots, rows, place, begin, gene_ids, table, flat, totals):
    """flat is (B * S + 1,): a count outside of the set lands where the next cell begins, which is cleared after it."""
    width = len(gene_ids)
    for j in range(width):
        table[np.int64(gene_ids[j]) - 1] = j
    flat[:width] = 0
    for i in range(len(slots)):
        base = i * width
        steps, counts, far, large = _sections(place, begin, slots[i], rows[i])
        _scatter(steps, counts, far, large, table, flat, np.uint64(base))
        totals[i] = _sum(flat[base : base + width])
        flat[base + width : min(base + 2 * width, len(flat))] = 0
    for j in range(width):
        table[np.int64(gene_ids[j]) - 1] = width


@njit(nogil=True, cache=True)
def _take_each(slots, rows, place, begin, gene_ids, table, flat, totals):
    """_take_shared with a set per cell, in which 0 is padding."""
    width = gene_ids.shape[1]
    flat[:width] = 0
    for i in range(len(slots)):
        for j in range(width):
            if gene_ids[i, j]:
                table[np.int64(gene_ids[i, j]) - 1] = j
        base = i * width
        steps, counts, far, large = _sections(place, begin, slots[i], rows[i])
        _scatter(steps, counts, far, large, table, flat, np.uint64(base))
        totals[i] = _sum(flat[base : base + width])
        flat[base + width : min(base + 2 * width, len(flat))] = 0
        for j in range(width):
            if gene_ids[i, j]:
                table[np.int64(gene_ids[i, j]) - 1] = width


@njit(nogil=True, cache=True)
def _take_expressed(slots, rows, place, begin, n_genes, fill_up, words, ids, out, totals):
    """A cell's expressed genes in ascending order; a uniform choice of them where they are too many; filled up with
    unexpressed ones if asked. `words` (B,) seeds the draws of each cell."""
    width = ids.shape[1]
    others = np.empty(n_genes if fill_up else 0, np.int32)
    for i in range(len(slots)):
        steps, counts, far, large = _sections(place, begin, slots[i], rows[i])
        f, g, column, written, total = 0, 0, np.int64(0), 0, np.int64(0)
        n = len(steps)
        too_many = n > width
        n_others = 0
        for j in range(n):
            step, count = np.int64(steps[j]), np.int64(counts[j])
            if step == 0:
                step = np.int64(far[f])
                f += 1
            if count == 0:
                count = np.int64(large[g])
                g += 1
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
            total += count
        totals[i] = total
        if fill_up and not too_many:
            for gene in range(column + 1, n_genes + 1):
                others[n_others] = gene
                n_others += 1
            for j in range(min(width - written, n_others)):
                chosen = j + below(nth_word(words[i], j), n_others - j)
                ids[i, written + j] = others[chosen]
                others[chosen] = others[j]


@njit(nogil=True, cache=True)
def _take_csr(slots, rows, place, begin, ids, out, large_at, large_out):
    """Every gene and count of the cells, one after the other."""
    k, g = np.uint64(0), 0
    for i in range(len(slots)):
        steps, counts, far, large = _sections(place, begin, slots[i], rows[i])
        f, h, column = np.uint64(0), 0, np.uint64(0)
        for j in range(np.uint64(len(steps))):
            step = np.uint64(steps[j])
            if step == 0:
                step = np.uint64(far[f])
                f += np.uint64(1)
            column += step
            ids[k] = column
            out[k] = counts[j]
            if counts[j] == 0:
                large_at[g] = k
                large_out[g] = np.int64(large[h])
                g += 1
                h += 1
            k += np.uint64(1)
