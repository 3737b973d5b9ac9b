"""Cells out of slots (gather.py), by numba; the kernels release the GIL.

`slots` and `rows` (B,) are cells; `place` and `begin` say where their parts lie. A kernel that meets a cell whose
sections contradict each other leaves it, having read and written nothing out of bounds, and returns its position in the
batch, else -1.

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

from data_pipeline.gene_sets import below, nth_word


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
def locate(nonzeros, n_far, n_medium, n_large, steps, packed, medium, far, large, place, begin):
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
def take_shared(slots, rows, place, begin, gene_ids, table, flat, totals):
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
def take_each(slots, rows, place, begin, gene_ids, table, flat, totals):
    """take_shared with a set per cell, in which 0 is padding."""
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
def take_expressed(slots, rows, place, begin, n_genes, fill_up, words, ids, out, totals):
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
def take_csr(slots, rows, place, begin, n_genes, ids, out, large_at, large_out):
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
                    if h == np.uint64(len(large)) or large[h] == 0:
                        return i
                    large_at[g], large_out[g] = k, np.int64(large[h])
                    g, h = g + one, h + one
            out[k] = count
            k += one
        if f != np.uint64(len(far)) or m != np.uint64(len(medium)) or h != np.uint64(len(large)):
            return i
    return -1
