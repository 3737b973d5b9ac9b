"""Cells into a block's sections and back (block.py), by numba. The kernels release the GIL.

CSR becomes NarrowCells in ../convert/narrow.py.
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def take_parts(values, starts, order, out):
    # unsigned positions and a plain loop, which becomes wide copies: ten times as fast as assigning slices
    at = np.uint64(0)
    for cell in order:
        start = np.uint64(starts[cell])
        n = np.uint64(starts[cell + 1]) - start
        for k in range(n):
            out[at + k] = values[start + k]
        at += n


@njit(nogil=True, cache=True)
def count_entries(nonzeros, small, n_far, far, n_entries, n_escapes):
    """How many entries and escapes each cell takes."""
    k, f = np.uint64(0), 0
    for cell in range(len(nonzeros)):
        n, escapes = np.uint64(nonzeros[cell]), np.uint64(0)
        for j in range(n):
            escapes += np.uint64((small[k + j] == 0) | (small[k + j] > 15))
        entries = np.int64(n)
        for _ in range(n_far[cell]):
            entries += (np.int64(far[f]) - 1) // 255
            f += 1
        k += n
        n_entries[cell], n_escapes[cell] = entries, escapes


@njit(nogil=True, cache=True)
def pack(nonzeros, narrow_steps, small, far, large, n_needed, steps, counts, packed, escaped, medium, totals):
    """Steps over 255 become several, counts over 15 go to the tables, and counts become half bytes. Fills in each
    cell's sum of counts. `counts` is memory for that. `escaped` and `medium` are one longer than their escapes."""
    k, e, f, g, m = np.uint64(0), np.uint64(0), 0, 0, np.uint64(0)
    one = np.uint64(1)
    for cell in range(len(nonzeros)):
        last, column, total = k + np.uint64(nonzeros[cell]), np.int64(-1), np.uint64(0)
        if n_needed[cell] % 2:
            steps[e], counts[e], e = 0, 0, e + one
        while k < last:
            step, count = np.int64(narrow_steps[k]), small[k]
            if step == 0:
                step = np.int64(far[f])
                f += 1
                while step > 255:
                    steps[e], counts[e] = 255, 0
                    e, column, step = e + one, column + 255, step - 255
            column += step
            total += np.uint64(count)
            if count == 0:
                total += large[g]
                g += 1
            # written always, kept where it is an escape: no branch to mispredict
            escaped[m], medium[m] = column, count
            m += np.uint64((count == 0) | (count > 15))
            steps[e], counts[e] = step, np.uint8(count if count < 16 else 0)
            e, k = e + one, k + one
        totals[cell] = total
    for pair in range(np.uint64(len(packed))):  # a loop of its own, which becomes wide instructions
        packed[pair] = counts[pair + pair] | np.uint8(counts[pair + pair + one] << np.uint8(4))


@njit(nogil=True, cache=True)
def widen(
    nonzeros, entries_of, escapes_of, large_of, totals, large, escaped, medium, steps, packed, n_genes, indptr, columns,
    counts,
):  # fmt: skip
    """The inverse of pack. False where the sections contradict each other. Nothing is read or written out of bounds."""
    k, e, m, g = 0, 0, 0, 0
    indptr[0] = 0
    for cell in range(len(nonzeros)):
        n, last = np.int64(entries_of[cell]), k + np.int64(nonzeros[cell])
        last_escape, last_large = m + np.int64(escapes_of[cell]), g + np.int64(large_of[cell])
        if n % 2 or e + n > len(steps) or e + n > 2 * len(packed) or last > len(columns):
            return False
        if last_escape > len(escaped) or last_large > len(large):
            return False
        column, total = np.int64(-1), np.uint64(0)
        for j in range(e, e + n):
            step, count = np.int64(steps[j]), np.int64((packed[j // 2] >> np.uint8(4 * (j % 2))) & 15)
            if step == 0 and (j > e or count):
                return False
            column += step
            if count == 0:
                if m == last_escape or np.int64(escaped[m]) != column:
                    continue
                count = np.int64(medium[m])
                m += 1
                if count == 0:
                    if g == last_large:
                        return False
                    count = np.int64(large[g])
                    g += 1
                if count < 16:
                    return False
            if k == last:
                return False
            columns[k], counts[k] = column, count
            total += np.uint64(count)
            k += 1
        if column >= n_genes or total != totals[cell] or k != last or m != last_escape or g != last_large:
            return False
        e += n
        indptr[cell + 1] = k
    whole = k == len(columns) and e == len(steps) and m == len(escaped) and g == len(large)
    return whole and (e // 2 + 7) // 8 * 8 == len(packed)
