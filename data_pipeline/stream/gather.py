"""From blocks to the counts of a micro-batch: blocks stay compact in memory and each cell is decoded as it is gathered.

A slot holds one block's decompressed payload (a byte and a half a count) and tables of where each cell's part of each
section begins. The kernels read gene steps and counts straight from it. So a cell is decoded in registers, and no wider
copy of a block is ever written. Whatever a block holds, no kernel leaves its memory. A cell whose sections contradict
each other is mostly refused by the kernel that meets it. decode_block refuses all of them, and `scldm shards verify`
calls it. The CRC-32 says that a block is as it was written.

Reading order: Slab (memory), CellSlots (fill), what it gathers. The kernels are in gather_kernels.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipeline.format.block import HEADER, decompress, read_header, sections
from data_pipeline.format.schema import CODECS, Manifest, column_dtype, vocab_tag
from data_pipeline.stream.gather_kernels import locate, put_cells, take_csr, take_each, take_expressed, take_shared
from data_pipeline.stream.gene_sets import WIDTH_STEP, GeneSets
from scldm.errors import InputError


class Slab:
    """Memory in pieces from a few large arrays, which NumPy asks the system to back by huge pages. In small pages, a
    cell in a random place costs as much to find as to read."""

    BYTES = 32 << 20

    def __init__(self) -> None:
        self.lock, self.free, self.largest = threading.Lock(), np.empty(0, np.uint8), 0

    def take(self, n_bytes: int) -> np.ndarray:
        """At least n_bytes, uint8, on a line of the cache, and at least as many as the largest piece before."""
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
        # per slot: addresses of steps, packed, escaped, medium, large. Then where a cell's entries, escapes, large
        # counts and expressed genes begin
        self.place = np.zeros((n_slots, 5), np.int64)
        self.begin = np.zeros((n_slots, cells + 1, 4), np.int32)
        self.escaped = np.empty(0, column_dtype(self.n_genes))
        # side by side, since a cell in a random place costs as much to find as to read
        self.about = np.zeros((n_slots, cells, 3 + len(self.names)), np.int64)
        self.identity, self.total_counts, self.labels = self.about[..., :2], self.about[..., 2], self.about[..., 3:]
        self.n_cells = np.zeros(n_slots, np.int64)
        self.columns: dict[int, np.ndarray] = {}  # width of a gene set -> table from gene to its place in the set
        self.largest_count = manifest.statistics.largest_count
        self.count_dtype = np.dtype(np.int64 if self.largest_count >= 1 << 31 else np.int32)
        narrow = column_dtype(self.n_genes + 1)
        self.id_dtype = narrow if narrow == np.uint16 else np.dtype("i4")

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
            raise InputError(f"{where}: {n_cells} cells, {n_conditions} conditions, codec {codec} do not fit the set")
        stored = stored[HEADER.itemsize : HEADER.itemsize + int(header["stored_bytes"])]
        self.where[slot], self.n_cells[slot] = where, 0
        try:
            if codec == "none":
                own = self._own(slot, len(data))
                if not np.may_share_memory(data, own):
                    own[:] = data
                own = own[HEADER.itemsize : HEADER.itemsize + len(stored)]
            else:
                own = self._own(slot, int(header["payload_bytes"]))
                payload = decompress(stored, codec, own)
                if codec == "lz4":  # which makes memory of its own
                    own[:] = payload
            found = sections(own, header)
            for c, ids in enumerate(found.conditions):
                self.labels[slot, :n_cells, c] = ids
                if n_cells and ids.max() >= self.n_labels[c]:
                    raise ValueError(f"a label id of {self.names[c]!r} is beyond its {self.n_labels[c]} labels")
            if (largest := int(found.large.max(initial=0))) > self.largest_count:  # might not fit count_dtype
                raise ValueError(f"a count of {largest}, the manifest's largest is {self.largest_count}")
            parts = found.large, found.escaped, found.medium, found.steps, found.packed
            if not locate(*found[:4], *parts, self.place[slot], self.begin[slot]):
                raise ValueError("its sections do not fit each other")
        except ValueError as error:
            raise InputError(f"{where}: damaged: {error}") from None
        put_cells(found.sources, found.rows, found.totals, self.about[slot])
        self.n_cells[slot] = n_cells

    # --- gather: `slots` and `rows` are (B,) int64

    def _table(self, width: int) -> np.ndarray:
        """From vocabulary index to place in a set of this width: `width`, a place to throw away, for genes outside of
        it and for padding."""
        if width not in self.columns:
            self.columns[width] = np.full(self.n_genes + 1, width, np.uint16 if width < 1 << 16 else np.uint32)
        return self.columns[width]

    def _run(self, kernel: Callable[..., int], slots: np.ndarray, rows: np.ndarray, *rest: Any) -> None:
        """Raises: InputError naming the block of a cell that the kernel refused."""
        refused = kernel(slots, rows, self.place, self.begin, self.escaped, *rest)
        if refused >= 0:
            raise InputError(f"{self.where[slots[refused]]}: damaged: its sections do not fit each other")

    def take(self, slots: np.ndarray, rows: np.ndarray, gene_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (B, S) of the genes (S,) or (B, S), and their sums (B,) int64. Index 0, padding, may stand
        in sets (B, S), where its count is 0."""
        n, width = len(slots), gene_ids.shape[-1]
        flat = np.empty(n * width + 1, self.count_dtype)
        totals = np.empty(n, np.int64)
        kernel = take_shared if gene_ids.ndim == 1 else take_each
        self._run(kernel, slots, rows, gene_ids, self._table(width), flat, totals)
        return flat[:-1].reshape(n, width), totals

    def take_of_the_cell(
        self, slots: np.ndarray, rows: np.ndarray, sets: GeneSets, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gene ids (B, S) int64, counts (B, S) and their sums (B,) for the policies that look at the cell."""
        width = sets.width
        n_expressed = self.begin[slots, rows + 1, 3] - self.begin[slots, rows, 3]
        if not width:
            width = -(-int(n_expressed.max(initial=1)) // WIDTH_STEP) * WIDTH_STEP
        ids, counts = np.zeros((len(slots), width), np.int64), np.zeros((len(slots), width), self.count_dtype)
        totals = np.empty(len(slots), np.int64)
        fill_up = sets.config.policy == "expressed_plus_zeros"
        of_genes = self.n_genes, fill_up
        self._run(take_expressed, slots, rows, *of_genes, words, ids, counts, totals)
        return ids, counts, totals

    def take_csr(self, slots: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """All counts of the cells, as `CompactCounts.from_numpy` takes them."""
        first, last = self.begin[slots, rows], self.begin[slots, rows + 1]
        start = np.concatenate([[0], np.cumsum(last[:, 0] - first[:, 0])]).astype(np.int32)
        n_large = int((last[:, 2] - first[:, 2]).sum())
        ids, counts = np.empty(start[-1], self.id_dtype), np.empty(start[-1], np.uint8)
        large_at, large = np.empty(n_large, np.int32), np.empty(n_large, self.count_dtype)
        self._run(take_csr, slots, rows, self.n_genes, ids, counts, large_at, large)
        return start, ids, counts, large_at, large
