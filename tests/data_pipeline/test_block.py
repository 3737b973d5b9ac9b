"""Blocks: exact for any cells, refused where damaged."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.format.block import (
    HEADER,
    BlockBuffers,
    decode_block,
    decompress,
    encode_block,
    read_header,
    sections,
)
from data_pipeline.format.schema import CODECS, column_dtype, count_dtype
from scldm.errors import InputError
from tests.data_pipeline.small_sets import narrow

N_GENES = 70_000


def encode(cells: list[dict[int, int]], codec="zstd") -> bytes:
    columns = [c for cell in cells for c in sorted(cell)]
    counts = [cell[c] for cell in cells for c in sorted(cell)]
    given = {
        "split": 2,
        "n_genes": N_GENES,
        "vocab_tag": 7,
        "sources": np.arange(len(cells), dtype=np.uint16),
        "rows": 2**40 + np.arange(len(cells), dtype=np.int64),
        "conditions": [np.full(len(cells), 3, np.uint8), np.arange(len(cells), dtype=np.uint16)],
        "codec": codec,
    }
    indptr = np.cumsum([0, *map(len, cells)])
    return encode_block(narrow(indptr, np.array(columns, np.int64), np.array(counts, np.int64), N_GENES), **given)


count = st.one_of(
    st.integers(1, 3),
    st.integers(14, 17),
    st.integers(250, 260),
    st.integers(2**16 - 2, 2**16 + 2),
    st.integers(2**31, 2**50),
)
column = st.one_of(st.integers(0, 20), st.integers(250, 260), st.integers(0, N_GENES - 1))


@pytest.mark.heavy
@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(column, count, max_size=20), min_size=1, max_size=6), st.sampled_from(CODECS))
def test_roundtrip_is_exact(cells, codec):
    """Steps and counts on both sides of the byte, first column 0, empty cells, counts past 32 bits."""
    block = decode_block(encode(cells, codec))
    ends = block.indptr
    read = [dict(zip(block.columns[a:b], block.counts[a:b], strict=True)) for a, b in itertools.pairwise(ends)]
    assert read == cells
    assert block.split == 2
    assert block.n_genes == N_GENES
    assert block.rows.tolist() == [2**40 + i for i in range(len(cells))]
    assert [c.tolist() for c in block.conditions] == [[3] * len(cells), list(range(len(cells)))]


def test_the_bytes_are_frozen():
    """Those of the README's specification: a change of them is another format version."""
    cells = [{0: 1, 5: 15, 300: 16, 301: 255, 69_999: 256}, {}, {c: 1 + c % 300 for c in range(0, 3000, 7)}]
    data = encode(cells, "none")
    assert hashlib.sha256(data).hexdigest() == FROZEN


FROZEN = "58e3329313468e273bc353fd7341b1496f9408bffea2cce4ee9fef85af778166"


@pytest.mark.parametrize("lie", ["nonzeros", "n_entries", "n_escapes", "n_large", "totals"])
def test_a_cell_whose_table_lies_is_refused(lie):
    data = bytearray(encode([{0: 300, 400: 20}, {1: 70_000, 2: 2}], "none"))
    values = getattr(sections(np.frombuffer(data, np.uint8)[HEADER.itemsize :], read_header(data)), lie)
    values[:] = values[::-1].copy() + 1 - np.arange(2, dtype=values.dtype)
    with pytest.raises(InputError, match="sections do not fit"):
        decode_block(data)


@pytest.mark.parametrize(
    ("section", "at", "value"),
    [
        ("steps", 3, 0),  # a gene twice
        ("large", 0, 0),  # an expressed gene without a count
        ("medium", 0, 15),  # no escape is needed
        ("escaped", 0, 699),  # of a gene that has none
        ("packed", 1, 0x10),  # a count less
    ],
)
def test_a_cell_that_contradicts_itself_is_refused(section, at, value):
    """Though its total may be that of the counts that are there."""
    data = bytearray(encode([{300: 2, 700: 20, 701: 400}], "none"))
    found = sections(np.frombuffer(data, np.uint8)[HEADER.itemsize :], read_header(data))
    assert found.steps.tolist() == [0, 255, 46, 255, 145, 1]
    assert found.packed[:3].tolist() == [0x00, 0x02, 0x00]
    assert (found.escaped.tolist(), found.medium.tolist(), found.large.tolist()) == ([700, 701], [20, 0], [400])
    decode_block(data)
    was = int(getattr(found, section)[at])
    getattr(found, section)[at] = value
    if section in ("large", "medium"):
        found.totals[0] = int(found.totals[0]) + value - was
    with pytest.raises(InputError, match="sections do not fit"):
        decode_block(data)


def test_what_fills_up_a_cell_takes_no_part_in_it():
    """An odd number of entries, with and without long steps, from the first column and beyond it."""
    cells = [{0: 1}, {0: 16}, {255: 1}, {254: 1}, {69_999: 1}, {0: 1, 255: 1, 511: 1}, {}]
    block = decode_block(encode(cells))
    assert [dict(zip(block.columns[a:b], block.counts[a:b])) for a, b in itertools.pairwise(block.indptr)] == cells


def test_buffers_are_reused_from_a_large_block_to_a_small_one():
    buffers = BlockBuffers("<u4", "<i4")
    large = decode_block(encode([dict.fromkeys(range(5000), 1)]), buffers)
    memory = large.columns.__array_interface__["data"][0]
    small = decode_block(encode([{9: 300}, {}]), buffers)
    assert small.columns.__array_interface__["data"][0] == memory
    assert (small.columns.tolist(), small.counts.tolist(), small.indptr.tolist()) == ([9], [300], [0, 1, 1])


def test_buffers_that_are_too_narrow_are_refused():
    with pytest.raises(InputError, match="70000 genes and a count of 70000 do not fit"):
        decode_block(encode([{1: 70_000}]), BlockBuffers("<u4", "<u2"))
    with pytest.raises(InputError, match="do not fit uint16"):
        decode_block(encode([{1: 1}]), BlockBuffers("<u2", "<i4"))
    assert (column_dtype(1 << 16), column_dtype((1 << 16) + 1)) == (np.uint16, np.uint32)
    assert [count_dtype(n) for n in (65_535, 65_536, 2**31)] == [np.uint16, np.int32, np.int64]


def test_a_size_that_no_block_has_is_refused_by_lz4():
    stored = memoryview(encode([{5: 1}], "lz4"))[HEADER.itemsize :]
    with pytest.raises(ValueError, match="lz4"):
        decompress(stored, "lz4", np.broadcast_to(np.uint8(0), 1 << 31))


@pytest.mark.parametrize("codec", CODECS)
def test_damage_is_an_error_and_never_a_crash(codec):
    """A flipped byte or a truncation gives an InputError or decodes within bounds (the CRC catches the rest)."""
    data = encode([{c: 1 + c % 300 for c in range(0, 3000, 7)}, {69_999: 5}], codec)
    rng = np.random.default_rng(0)
    refused = 0
    for at in [*range(HEADER.itemsize), *rng.integers(HEADER.itemsize, len(data), 100)]:
        if HEADER.fields["payload_bytes"][1] <= at < HEADER.fields["vocab_tag"][1]:
            continue  # a wrong size alone may ask for gigabytes
        broken = bytearray(data)
        broken[at] ^= 0x55
        try:
            block = decode_block(bytes(broken), vocab_tag=7)
            assert block.indptr[-1] == len(block.columns)
        except InputError:
            refused += 1
    assert refused > 40
    with pytest.raises(InputError, match="its header says"):
        decode_block(data[:-1])
    narrower = np.frombuffer(bytearray(data), HEADER, count=1)
    narrower["n_genes"] = 69_999  # one less than the last cell's gene needs
    with pytest.raises(InputError, match="sections do not fit"):
        decode_block(narrower.tobytes() + data[HEADER.itemsize :])
    with pytest.raises(InputError, match="another gene vocabulary"):
        decode_block(data, vocab_tag=8)
    shorter = np.frombuffer(bytearray(data), HEADER, count=1)
    shorter["n_nonzeros"] -= 1
    with pytest.raises(InputError, match="damaged"):
        decode_block(shorter.tobytes() + data[HEADER.itemsize :])
