"""Cells out of slots (gather.py), by numba. The kernels release the GIL.

`slots` and `rows` (B,) are cells. `place` and `begin` say where their parts lie. `escaped` is an empty array of the
dtype of escaped columns. Nothing is read or written out of bounds, whatever they hold. A kernel returns the position in
the batch of the first cell that it sees to contradict itself, else -1.

Reading order: pointers, locate (a block's sections), what a cell is decoded by, take_cells (what is said about cells),
and the take_* of counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from data_pipeline.stream.gene_sets import below, nth_word


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
def locate(nonzeros, n_entries, n_escapes, n_large, large, escaped, medium, steps, packed, place, begin):
    """Where the sections lie, and where each cell begins in them. False where they do not fit each other."""
    place[0], place[1], place[2] = steps.ctypes.data, packed.ctypes.data, escaped.ctypes.data
    place[3], place[4] = medium.ctypes.data, large.ctypes.data
    e, m, g, k, fit = np.int64(0), np.int64(0), np.int64(0), np.int64(0), True
    for cell in range(len(nonzeros)):
        begin[cell, 0], begin[cell, 1], begin[cell, 2], begin[cell, 3] = e, m, g, k
        e, m = e + np.int64(n_entries[cell]), m + np.int64(n_escapes[cell])
        g, k = g + np.int64(n_large[cell]), k + np.int64(nonzeros[cell])
        fit &= (n_entries[cell] % 2 == 0) & (nonzeros[cell] <= n_entries[cell])
    for cell in range(len(nonzeros), len(begin)):  # what comes after the last one is empty
        begin[cell, 0], begin[cell, 1], begin[cell, 2], begin[cell, 3] = e, m, g, k
    whole = e == len(steps) and m == len(escaped) and g == len(large)
    return fit and whole and (e // 2 + 7) // 8 * 8 == len(packed)


@njit(nogil=True, cache=True)
def _sum(values):
    total = np.int64(0)
    for j in range(np.uint64(len(values))):
        total += np.int64(values[j])
    return total


@njit(nogil=True, inline="always")
def _ask_for(place, begin, escaped, slots, rows, i):
    """Has cell i's steps and counts, and where those of the one after it lie, brought nearer while another one is
    decoded."""
    if i >= len(slots):
        return
    if i + 1 < len(slots):
        _prefetch(begin.ctypes.data + (slots[i + 1] * begin.shape[1] + rows[i + 1]) * begin.shape[2] * 4)
    slot, row = slots[i], rows[i]
    first, last = np.int64(begin[slot, row, 0]), np.int64(begin[slot, row + 1, 0])
    for k in range(2):
        at, end = place[slot, k] + (first >> k), place[slot, k] + (last >> k)
        while at < end:
            _prefetch(at)
            at += 64
    _prefetch(place[slot, 2] + np.int64(begin[slot, row, 1]) * escaped.itemsize)
    _prefetch(place[slot, 3] + np.int64(begin[slot, row, 1]))


@njit(nogil=True, inline="always")
def _parts(place, begin, escaped, slot, row):
    """How many genes one cell expresses, its steps, packed counts, escaped columns, medium and large counts."""
    e, m, g = np.int64(begin[slot, row, 0]), np.int64(begin[slot, row, 1]), np.int64(begin[slot, row, 2])
    n, n_escapes = begin[slot, row + 1, 0] - e, begin[slot, row + 1, 1] - m
    n_large, n_expressed = begin[slot, row + 1, 2] - g, np.int64(begin[slot, row + 1, 3] - begin[slot, row, 3])
    steps = carray(_pointer(place[slot, 0] + e), (n,), np.uint8)
    packed = carray(_pointer(place[slot, 1] + (e >> 1)), (n >> 1,), np.uint8)
    columns = carray(_pointer(place[slot, 2] + m * escaped.itemsize), (n_escapes,), escaped.dtype)
    medium = carray(_pointer(place[slot, 3] + m), (n_escapes,), np.uint8)
    large = carray(_pointer(place[slot, 4] + 8 * g), (n_large,), np.uint64)
    return n_expressed, steps, packed, columns, medium, large


@njit(nogil=True, inline="always")
def _sound(n_expressed, steps, packed, n_escapes, n_genes):
    """Whether a cell's genes ascend and end within the vocabulary, and as many have a count as should."""
    # by stretches, whose sums fit narrow numbers, so that the compiler's vectors hold as many as they can
    last, same, uncounted = np.uint64(0), np.uint64(0), np.uint64(0)
    k, n, stretch = np.uint64(0), np.uint64(len(packed)), np.uint64(64)
    while k + stretch <= n:
        small, none, zeros = np.uint16(0), np.uint8(0), np.uint8(0)
        for j in range(stretch):  # narrow at every step: a sum of two bytes would be of eight
            zeros = np.uint8(zeros + np.uint8((packed[k + j] & np.uint8(15)) == 0))
            zeros = np.uint8(zeros + np.uint8(packed[k + j] < np.uint8(16)))
        for j in range(k + k, k + k + stretch + stretch):
            small = np.uint16(small + np.uint16(steps[j]))
            none = np.uint8(none + np.uint8(steps[j] == np.uint8(0)))
        last, same, uncounted = last + np.uint64(small), same + np.uint64(none), uncounted + np.uint64(zeros)
        k += stretch
    for j in range(k, n):
        uncounted += np.uint64((packed[j] & 15) == 0) + np.uint64(packed[j] < 16)
    for j in range(k + k, np.uint64(len(steps))):
        last += np.uint64(steps[j])
        same += np.uint64(steps[j] == 0)
    if same > 1 or (same == 1 and (steps[0] != 0 or packed[0] & 15)):
        return False
    return last <= np.uint64(n_genes) and np.int64(uncounted) == len(steps) - n_expressed + n_escapes


@njit(nogil=True, inline="always")
def _scatter(n_expressed, steps, packed, escaped, medium, large, table, flat, base):
    """Decodes one cell and writes each count to its place in flat[base:]. False where the cell is not sound."""
    if not _sound(n_expressed, steps, packed, len(escaped), len(table) - 1):
        return False
    gene, four, one = np.uint64(0), np.uint64(4), np.uint64(1)
    for k in range(np.uint64(len(packed))):
        pair = np.uint64(packed[k])
        gene += np.uint64(steps[k + k])
        flat[base + np.uint64(table[gene])] = pair & np.uint64(15)
        gene += np.uint64(steps[k + k + one])
        flat[base + np.uint64(table[gene])] = pair >> four
    g = np.uint64(0)
    for m in range(np.uint64(len(escaped))):
        gene, count = np.uint64(escaped[m]) + one, np.uint64(medium[m])
        if count == 0:
            if g == np.uint64(len(large)):
                return False
            count = large[g]
            g += one
        if count < 16 or gene >= np.uint64(len(table)):
            return False
        flat[base + np.uint64(table[gene])] = count
    return g == np.uint64(len(large))


@njit(nogil=True, cache=True)
def put_cells(sources, rows, totals, about):
    """What take_cells gives back, but for labels."""
    for cell in range(len(sources)):
        about[cell, 0], about[cell, 1], about[cell, 2] = sources[cell], rows[cell], totals[cell]


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
def take_shared(slots, rows, place, begin, escaped, gene_ids, table, flat, totals):
    """The first cell that is not sound, or -1. flat is (B * S + 1,). A count outside of the set lands where the next
    cell begins, and that place is cleared after it."""
    width, refused = len(gene_ids), -1
    for j in range(width):
        table[gene_ids[j]] = j
    flat[:width] = 0
    for i in range(len(slots)):
        _ask_for(place, begin, escaped, slots, rows, i + 1)
        base = i * width
        n, steps, packed, columns, medium, large = _parts(place, begin, escaped, slots[i], rows[i])
        if not _scatter(n, steps, packed, columns, medium, large, table, flat, np.uint64(base)):
            refused = i
            break
        totals[i] = _sum(flat[base : base + width])
        flat[base + width : min(base + 2 * width, len(flat))] = 0
    for j in range(width):
        table[gene_ids[j]] = width
    return refused


@njit(nogil=True, cache=True)
def take_each(slots, rows, place, begin, escaped, gene_ids, table, flat, totals):
    """take_shared with a set per cell, in which 0 is padding."""
    width = gene_ids.shape[1]
    flat[:width] = 0
    for i in range(len(slots)):
        _ask_for(place, begin, escaped, slots, rows, i + 1)
        for j in range(width):
            if gene_ids[i, j]:
                table[gene_ids[i, j]] = j
        base = i * width
        n, steps, packed, columns, medium, large = _parts(place, begin, escaped, slots[i], rows[i])
        sound = _scatter(n, steps, packed, columns, medium, large, table, flat, np.uint64(base))
        for j in range(width):
            table[gene_ids[i, j]] = width
        if not sound:
            return i
        totals[i] = _sum(flat[base : base + width])
        flat[base + width : min(base + 2 * width, len(flat))] = 0
    return -1


@njit(nogil=True)
def _fill_up(ids, n, n_genes, word, others):
    """Writes a uniform choice of a cell's unexpressed genes behind its n expressed ones, which ascend. `word` seeds the
    draws, and `others` (n_genes,) is room for all unexpressed genes."""
    gene, n_others = np.int64(0), 0
    for j in range(n + 1):
        end = ids[j] if j < n else n_genes + 1
        for other in range(gene + 1, end):
            others[n_others] = other
            n_others += 1
        gene = end
    for j in range(min(len(ids) - n, n_others)):
        chosen = j + below(nth_word(word, j), n_others - j)
        ids[n + j] = others[chosen]
        others[chosen] = others[j]


@njit(nogil=True, cache=True)
def take_expressed(slots, rows, place, begin, escaped, n_genes, fill_up, words, ids, out, totals):
    """A cell's expressed genes in ascending order. Where they are too many, a uniform choice of them. Filled up with
    unexpressed ones if asked. `words` (B,) seeds the draws of each cell. Returns the first cell that is not sound, or
    -1."""
    width = ids.shape[1]
    others = np.empty(n_genes if fill_up else 0, np.int32)
    for i in range(len(slots)):
        n, steps, packed, columns, medium, large = _parts(place, begin, escaped, slots[i], rows[i])
        if not _sound(n, steps, packed, len(columns), n_genes):
            return i
        gene, total = np.int64(0), np.int64(0)
        m, g, seen, written = 0, 0, 0, 0
        too_many = n > width
        for j in range(len(steps)):
            gene += np.int64(steps[j])
            count = np.uint64((packed[j // 2] >> np.uint8(4 * (j % 2))) & 15)
            if count == 0:
                if m == len(columns) or np.int64(columns[m]) + 1 != gene:
                    continue
                count = np.uint64(medium[m])
                m += 1
                if count == 0:
                    if g == len(large):
                        return i
                    count = large[g]
                    g += 1
                if count < 16:
                    return i
            if seen == n:
                return i
            seen += 1
            if too_many:
                # selection sampling: keep with probability (still wanted) / (still to come). Knuth vol. 2, 3.4.2 S
                if written == width:
                    continue
                if below(nth_word(words[i], seen - 1), n - seen + 1) >= width - written:
                    continue
            ids[i, written] = gene
            out[i, written] = count
            written += 1
            total += np.int64(count)
        if seen != n or m != len(columns) or g != len(large):
            return i
        totals[i] = total
        if fill_up and not too_many:
            _fill_up(ids[i], n, n_genes, words[i], others)
    return -1


@njit(nogil=True, cache=True)
def take_csr(slots, rows, place, begin, escaped, n_genes, ids, out, large_at, large_out):
    """Every entry of the cells, one after the other. Returns the first cell that is not sound, or -1."""
    k, g, one, stretch = np.uint64(0), np.uint64(0), np.uint64(1), np.uint64(32)
    for i in range(len(slots)):
        _ask_for(place, begin, escaped, slots, rows, i + 1)
        n, steps, packed, columns, medium, large = _parts(place, begin, escaped, slots[i], rows[i])
        if not _sound(n, steps, packed, len(columns), n_genes):
            return i
        gene, last, h = np.uint64(0), k + np.uint64(len(steps)), np.uint64(0)
        for j in range(np.uint64(len(packed))):
            at = k + j + j
            gene += np.uint64(steps[j + j])
            ids[at] = gene
            gene += np.uint64(steps[j + j + one])
            ids[at + one] = gene
            out[at], out[at + one] = packed[j] & 15, packed[j] >> 4
        for m in range(np.uint64(len(columns))):
            gene = np.uint64(columns[m]) + one
            while k + stretch < last and np.uint64(ids[k + stretch]) <= gene:
                k += stretch
            at = k
            for j in range(k, min(k + stretch, last)):  # all of them: no branch to mispredict
                at += np.uint64(np.uint64(ids[j]) < gene)
            if at == last or np.uint64(ids[at]) != gene or out[at] != 0:
                return i
            count = medium[m]
            if count == 0:
                if h == np.uint64(len(large)) or large[h] < 16:
                    return i
                large_at[g], large_out[g] = at, np.int64(large[h])
                g, h = g + one, h + one
            elif count < 16:
                return i
            out[at] = count
        if h != np.uint64(len(large)):
            return i
        k = last
    return -1
