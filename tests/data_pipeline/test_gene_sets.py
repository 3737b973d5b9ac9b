"""Gene sets: distributions, and what each policy may leave out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.format.block import HEADER, encode_block, read_header, sections
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import vocab_tag
from data_pipeline.stream.gather import CellSlots, Slab
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.gene_sets import GeneSets, _least_words
from data_pipeline.stream.philox import random_words
from scldm.batch import CompactCounts, narrow_ids
from scldm.errors import InputError
from scldm.vocab import GeneVocab
from tests.data_pipeline.small_sets import known_cells, narrow, write_set


def sets_of(config, *, n_genes=40, weights=None, largest=10, micro=8, purpose=4, seed=0):
    return GeneSets(
        config, "given", seed=seed, purpose=purpose, n_genes=n_genes, n_expressed_largest=largest, weights=weights,
        micro_batch=micro, loud=True,
    )  # fmt: skip


def draw_many(sets, steps):
    return np.concatenate([np.atleast_2d(sets.ids(0, step, np.arange(64))) for step in range(steps)])


def test_random_sets_are_uniform_without_replacement():
    ids = draw_many(sets_of(GeneSetConfig("random", 7)), 400)
    assert all(len(set(row)) == 7 for row in ids.tolist())
    assert (ids.min(), ids.max()) == (1, 40)  # 0 is padding
    n, share = len(ids), 7 / 40
    z = (np.bincount(ids.ravel(), minlength=41)[1:] - n * share) / np.sqrt(n * share * (1 - share))
    assert np.abs(z).max() < 4.5
    together = np.mean([(1 in row) and (2 in row) for row in ids.tolist()])
    assert abs(together - share * 6 / 39) < 5 * np.sqrt(share * 6 / 39 / n)
    first = np.bincount(ids[:, 0], minlength=41)[1:]  # no place in the set is special
    assert np.abs(first - n / 40).max() < 5 * np.sqrt(n / 40)


@pytest.mark.parametrize("config", [GeneSetConfig("random", 40), GeneSetConfig("random", 7, share=1.0)])
def test_a_draw_of_all_genes_is_all_of_them_and_shared(config: GeneSetConfig):
    sets = sets_of(config)
    assert sets.shared
    assert not config.is_per_cell(40)
    np.testing.assert_array_equal(sets.ids(0, 0, np.arange(3)), np.arange(1, 41))
    assert config.is_per_cell(41) == (config.share < 1)


def test_sets_belong_to_the_position_whatever_the_micro_batch():
    for group in (1, 16):
        config = GeneSetConfig("random", 7, gene_set_group=group)
        wide, narrow_ = sets_of(config, micro=16), sets_of(config, micro=4)
        for low in range(0, 64, 16):
            whole = wide.ids(2, 5, np.arange(low, low + 16))
            for k in range(0, 16, 4):
                part = narrow_.ids(2, 5, np.arange(low + k, low + k + 4))
                np.testing.assert_array_equal(part, whole if group > 1 else whole[k : k + 4])
    ids = [sets_of(GeneSetConfig("random", 7, 8)).ids(e, s, np.arange(p, p + 8)).tolist() for e in (0, 1)
           for s in (0, 1) for p in (0, 8)]  # fmt: skip
    assert len({tuple(i) for i in ids}) == 8
    assert sets_of(GeneSetConfig("random", 7), purpose=5).ids(0, 0, np.arange(8)).tolist() != (
        sets_of(GeneSetConfig("random", 7)).ids(0, 0, np.arange(8)).tolist()
    )


@pytest.mark.heavy
def test_weighted_sets_follow_the_weights():
    weights = np.concatenate([np.zeros(5), np.full(20, 1.0), np.full(15, 4.0)])
    ids = draw_many(sets_of(GeneSetConfig("weighted", 1), weights=weights), 200).ravel()
    shares = np.bincount(ids, minlength=41)[1:] / len(ids)
    assert shares[:5].sum() == 0
    assert shares[25:].sum() == pytest.approx(60 / 80, abs=0.02)
    ids = draw_many(sets_of(GeneSetConfig("weighted", 35), weights=weights), 2)
    assert all(row == list(range(6, 41)) for row in ids.tolist())
    with pytest.raises(InputError, match="only 35 genes"):
        sets_of(GeneSetConfig("weighted", 36), weights=weights)


def test_weighted_sets_are_the_first_arrivals_of_all_genes():
    """Those that are looked at at all are few: none that arrives early may be missing, at rates of any magnitude."""
    rates = np.random.default_rng(0).lognormal(0, 6, 5_000)
    rates[::7], rates[1::7] = 0, 1e-200
    sets = sets_of(GeneSetConfig("weighted", 50), n_genes=5_000, weights=rates)
    assert sets.soon < np.inf
    found = sets.ids(3, 2, np.arange(5, 25))
    words = random_words(0, 4, 3, 2, 20 * 5_000, skip=5 * 1_250).reshape(20, -1)
    with np.errstate(divide="ignore"):
        arrival = -np.log(((words >> np.uint64(11)) + 1) * 2.0**-53) / rates
    np.testing.assert_array_equal(found, np.sort(np.argsort(arrival, axis=1)[:, :50] + 1, axis=1))
    for later in (1e-9, 0.3):  # too few, or hardly too few, arrive before this: all are looked at
        sets.soon *= later
        sets.least = _least_words(rates, sets.soon)
        np.testing.assert_array_equal(sets.ids(3, 2, np.arange(5, 25)), found)
        sets.soon /= later


def test_weighted_sets_belong_to_position_step_and_epoch():
    sets = sets_of(GeneSetConfig("weighted", 7), weights=np.linspace(1, 2, 40))
    whole = sets.ids(2, 5, np.arange(64))
    np.testing.assert_array_equal(sets.ids(2, 5, np.arange(24, 27)), whole[24:27])
    assert len({tuple(row) for row in whole.tolist()}) == 64
    for epoch, step in ((3, 5), (2, 6)):
        assert not (sets.ids(epoch, step, np.arange(64)) == whole).all(1).any()


def test_sets_are_frozen():
    """The numbers of a run that is resumed: a change of them changes every run."""
    assert sets_of(GeneSetConfig("random", 4)).ids(1, 2, np.arange(3, 5)).tolist() == GOLDEN
    weighted = sets_of(GeneSetConfig("weighted", 4), weights=np.linspace(0, 1, 40))
    assert weighted.ids(1, 2, np.arange(3, 5)).tolist() == GOLDEN_WEIGHTED


GOLDEN = [[7, 14, 9, 35], [2, 18, 10, 24]]
GOLDEN_WEIGHTED = [[21, 24, 28, 40], [17, 19, 35, 37]]


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"n_genes": 2048},
            "a.n_genes=2048 has no effect with a.policy=all. It is read by random, expressed, expressed_p",
        ),
        ({"policy": "same", "n_genes": 9}, "a.n_genes=9 has no effect with a.policy=same"),
        ({"gene_set_group": 7}, "a.gene_set_group=7 .* read by random, weighted. Else leave it at 1"),
        ({"policy": "expressed", "gene_set_group": 7}, "a.gene_set_group=7 has no effect with a.policy=expressed. It"),
        (
            {"policy": "random", "n_genes": 9, "weight_by": "variability"},
            "a.weight_by=variability .* by weighted. Else",
        ),
        ({"policy": "weighted", "n_genes": 9, "overflow": "sample"}, "a.overflow=sample has no effect with a.policy=w"),
        ({"policy": "expressed", "overflow": "sample"}, "a.overflow=sample .* a.policy=expressed without n_genes"),
    ],
)
def test_a_setting_without_effect_is_refused_by_name(config, said):
    with pytest.raises(InputError, match=said):
        GeneSetConfig(**config).check("a")


def test_a_setting_with_an_effect_is_not():
    for config in (
        GeneSetConfig(),
        GeneSetConfig("same"),
        GeneSetConfig("random", 9, 7),
        GeneSetConfig("weighted", 9, 7, "variability"),
        GeneSetConfig("expressed"),
        GeneSetConfig("expressed", 9, overflow="sample"),
        GeneSetConfig("expressed_plus_zeros", 9, overflow="sample"),
    ):
        config.check("a")


# --- policies that look at the cell --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slots(tmp_path_factory):
    cells = known_cells(n_genes=40, expressed=0.3)
    shards = ShardSet(str(write_set(tmp_path_factory.mktemp("s") / "set", cells)))
    slots = CellSlots(shards.manifest, 1)
    slots.fill(0, shards.fetch(0), "block 0")
    shards.close()
    return slots, cells.counts[:256]


@pytest.mark.heavy
def test_compact_counts_have_the_dtype_of_the_set_in_every_batch(tmp_path):
    """Not that of a batch, which a compiled model would meet as two shapes."""
    cells = known_cells()
    for largest, dtype in ((2_000_000_000, torch.int32), (3_000_000_000, torch.int64)):
        cells.counts[4, 6] = largest
        shards = ShardSet(str(write_set(tmp_path / str(largest), cells)))
        slots = CellSlots(shards.manifest, 1)
        slots.fill(0, shards.fetch(0), "block 0")
        shards.close()
        for rows in (np.array([0]), np.array([3, 4])):
            csr = slots.take_csr(np.zeros_like(rows), rows)
            compact = CompactCounts.from_numpy(*csr, 701)
            assert compact.dense().dtype == dtype
            np.testing.assert_array_equal(compact.dense()[:, 1:].numpy(), cells.counts[rows])


@pytest.mark.parametrize("n_genes, dtype", [(65_535, np.uint16), (65_536, np.int32)])
def test_the_last_gene_of_a_large_vocabulary_is_sent_as_itself(tmp_path, n_genes, dtype):
    """Index 0 is padding, so that the last gene's is n_genes."""
    cells = known_cells(6, 2, n_genes, expressed=0.001)
    cells.counts[:, -1] = 9
    shards = ShardSet(str(write_set(tmp_path / "set", cells)))
    slots = CellSlots(shards.manifest, 1)
    slots.fill(0, shards.fetch(0), "block 0")
    shards.close()
    csr = slots.take_csr(np.zeros(6, np.int64), np.arange(6))
    assert csr[1].dtype == dtype
    assert csr[1][csr[0][1:] - 1].tolist() == [n_genes] * 6
    compact = CompactCounts.from_numpy(*csr, n_genes + 1)
    np.testing.assert_array_equal(compact.dense()[:, 1:].numpy(), cells.counts[:6])


@pytest.mark.parametrize("n_genes, width", [(65_534, 2), (65_535, 2), (65_536, 4)])
def test_gene_ids_take_two_bytes_as_long_as_the_last_gene_fits(manifest, n_genes, width):
    genes = GeneVocab(tuple(f"g{k}" for k in range(n_genes)), "symbol")
    last = np.array([0, 1, 32_768, n_genes])
    ids = narrow_ids(last.astype(CellSlots(replace(manifest, genes=genes), 1).id_dtype))
    assert ids.element_size() == width
    start = np.array([0, len(last) - 1], np.int32)
    none, counts = torch.empty(0, dtype=torch.int32), torch.tensor([1, 2, 3], dtype=torch.uint8)
    csr = CompactCounts(torch.from_numpy(start), ids[1:], counts, none, none, n_genes + 1)
    assert csr.dense()[0, last].tolist() == [0, 1, 2, 3]


def take(slots, sets, step=0):
    rows = np.arange(256)
    words = sets.words(0, step, np.arange(256))
    return slots.take_of_the_cell(np.zeros(256, np.int64), rows, sets, words)


def test_expressed_genes_are_never_lost_unsaid(slots, capsys):
    slots, counts = slots
    largest = int((counts > 0).sum(1).max())
    ids, values, totals = take(slots, sets_of(GeneSetConfig("expressed"), largest=largest))
    assert ids.shape[1] == 64  # the longest cell's, rounded up
    for k in range(256):
        expressed = np.flatnonzero(counts[k])
        assert ids[k, : len(expressed)].tolist() == (expressed + 1).tolist()
        assert not ids[k, len(expressed) :].any()
        assert not values[k, len(expressed) :].any()
    np.testing.assert_array_equal(totals, counts.sum(1))
    with pytest.raises(InputError, match=f"expresses {largest} genes"):
        sets_of(GeneSetConfig("expressed", largest - 1), largest=largest)
    assert not capsys.readouterr().err
    sets_of(GeneSetConfig("expressed", largest - 1, overflow="sample"), largest=largest)
    assert f"(up to {largest}) lose some" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_sample_of_too_many_expressed_genes_is_uniform(slots):
    slots, counts = slots
    sets = sets_of(GeneSetConfig("expressed", 5, overflow="sample"), largest=40)
    kept = np.zeros((256, 41))
    for step in range(200):
        ids, _, _ = take(slots, sets, step)
        assert all((row[row > 0] == np.unique(row[row > 0])).all() for row in ids)
        kept[np.arange(256)[:, None], ids] += 1
    n = (counts > 0).sum(1)
    assert not kept[:, 1:][counts == 0].any()
    many = n > 8
    expected = np.repeat((5 / n[many])[:, None], 40, 1)[counts[many] > 0]
    z = (kept[:, 1:][many][counts[many] > 0] / 200 - expected) / np.sqrt(expected * (1 - expected) / 200)
    assert abs(z.mean()) < 0.1
    assert 0.9 < z.std() < 1.1


def test_plus_zeros_adds_distinct_unexpressed_genes_uniformly(slots):
    slots, counts = slots
    sets = sets_of(GeneSetConfig("expressed_plus_zeros", 30), largest=30)
    added = np.zeros((256, 41))
    for step in range(200):
        ids, values, _ = take(slots, sets, step)
        assert ids.all()
        assert all(len(set(row)) == 30 for row in ids.tolist())
        np.testing.assert_array_equal(values, np.take_along_axis(counts, ids - 1, 1))
        assert ((values > 0).sum(1) == (counts > 0).sum(1)).all()
        added[np.arange(256)[:, None], ids] += 1
    zeros = counts == 0
    expected = np.repeat(((30 - (counts > 0).sum(1)) / zeros.sum(1))[:, None], 40, 1)[zeros]
    z = (added[:, 1:][zeros] / 200 - expected) / np.sqrt(expected * (1 - expected) / 200)
    assert abs(z.mean()) < 0.1
    assert 0.9 < z.std() < 1.1


def test_memory_comes_in_pieces_that_no_other_has():
    slab = Slab()
    pieces = [slab.take(n) for n in (1, 700, 3 << 20, 20 << 20, 100, 40 << 20, 5)]
    for number, (piece, asked) in enumerate(zip(pieces, (1, 700, 3 << 20, 20 << 20, 100, 40 << 20, 5))):
        assert len(piece) >= asked
        assert piece.ctypes.data % 64 == 0
        piece[[0, -1]] = number
    assert [p[0] for p in pieces] == [p[-1] for p in pieces] == list(range(7))
    spans = sorted((p.ctypes.data, p.ctypes.data + len(p)) for p in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert len(pieces[4]) >= 20 << 20  # blocks are of one size, more or less: the slot won't ask again


# --- blocks that lie -----------------------------------------------------------------------------------------------


def lying_block(cells, tag=0, lie=None):
    """A block without a codec whose sections contradict each other, under a header that is sound."""
    counts = cells.counts[:8]
    cell, column = np.nonzero(counts)
    made = narrow(np.concatenate([[0], np.cumsum((counts > 0).sum(1))]), column, counts[cell, column], 700)
    data = bytearray(
        encode_block(
            made, split=0, n_genes=700, vocab_tag=vocab_tag(cells.genes) + tag, sources=cells.identity[:8, 0],
            rows=cells.identity[:8, 1], conditions=[v[:8] for v in cells.labels.values()], codec="none",
        )
    )  # fmt: skip
    block = np.frombuffer(data, np.uint8)
    if lie:
        name, at, value = lie
        section = getattr(sections(block[HEADER.itemsize :], read_header(data)), name)
        section[at] = value(section[at].astype(np.int64)) if callable(value) else value
    return block


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    shards = ShardSet(str(write_set(tmp_path_factory.mktemp("l") / "set", known_cells(), "none")))
    shards.close()
    return shards.manifest


@pytest.mark.parametrize(
    "lie",
    [
        ("nonzeros", 3, 2**30),  # for which there would be no memory
        ("nonzeros", 3, 2**31),
        ("nonzeros", 0, 0),
        ("n_entries", 0, 2**31),
        ("n_entries", slice(0, 2), lambda n: n + np.array([2, -2])),  # of another cell
        ("n_entries", slice(0, 2), lambda n: n + np.array([1, -1])),
        ("n_escapes", 0, 9),
        ("n_escapes", slice(3, 5), lambda n: n + np.array([-1, 1])),
        ("n_large", slice(3, 5), [2, 0]),
        ("steps", slice(5, 40), 255),  # beyond the vocabulary
        ("steps", 7, 0),  # a gene twice
        ("packed", 3, 0),  # no count where none is escaped
        ("packed", slice(0, 1000), 0x11),
        ("medium", slice(0, None), 0),
        ("large", 0, 2**31),  # which the set's int32 would make negative
        ("medium", 0, 15),
        ("large", 0, 0),
        ("escaped", 0, 700),  # beyond the vocabulary
    ],
    ids=lambda lie: lie[0],
)
def test_no_block_makes_a_kernel_leave_its_memory(manifest, lie):
    """It is refused when it is put into a slot, or by whatever gathers the cell that lies."""
    cells, rows = known_cells(), np.arange(8)
    slots = CellSlots(manifest, 1)
    here = np.zeros_like(rows)
    expressed = sets_of(GeneSetConfig("expressed"), n_genes=700, largest=700)
    gathers = [
        lambda: slots.take(here, rows, np.arange(1, 701)),
        lambda: slots.take(here, rows, np.tile(np.arange(701), (8, 1))),
        lambda: slots.take_of_the_cell(here, rows, expressed, np.zeros(8, np.uint64)),
        lambda: slots.take_csr(here, rows),
    ]
    slots.fill(0, lying_block(cells), "sound")
    for gather in gathers:
        gather()
    with pytest.raises(InputError, match="another gene vocabulary"):  # of as many genes
        slots.fill(0, lying_block(cells, tag=1), "strange")

    def fill_and(gather):
        slots.fill(0, lying_block(cells, lie=lie), "the liar")
        gather()

    for gather in gathers:
        with pytest.raises(InputError, match="the liar: damaged"):
            fill_and(gather)
    slots.fill(0, lying_block(cells), "sound")  # no kernel left its table as it should not be
    np.testing.assert_array_equal(slots.take(here, rows, np.arange(1, 701))[0], cells.counts[:8])


def test_a_block_with_fewer_cells_than_the_one_before_it_leaves_none_of_those(manifest):
    cells = known_cells()
    slots = CellSlots(manifest, 1)
    slots.begin[:] = 1 << 30
    slots.fill(0, lying_block(cells), "of 8 cells")
    assert not slots.take(np.zeros(1, np.int64), np.array([8]), np.arange(1, 701))[0].any()
