"""The stream against cells whose every count is known: exact, the same for every world size, resumable, and loud about
faults. Runs over sets of many small blocks, so that windows, lanes and their borders all occur."""

import errno
import gc
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.gene_sets import GeneSetConfig
from data_pipeline.loader import CellLoader, LoaderConfig, shard_batches
from data_pipeline.read_shards import ShardSet
from scldm.errors import InputError
from tests.data_pipeline.small_sets import known_cells, write_set

RANDOM = GeneSetConfig("random", 50, gene_set_group=4)
SAME = GeneSetConfig("same")


@pytest.fixture(scope="module")
def cells():
    return known_cells()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cells):
    """53 training blocks of 8 cells: more than 8 lanes of 2 hold, so that the order is that of a large set."""
    return str(write_set(tmp_path_factory.mktemp("shards") / "set", cells, block_cells=8))


@pytest.fixture(scope="module")
def sets(tmp_path_factory, cells):
    """Two blocks of 256 and 164 training cells, one folder a codec."""
    root = tmp_path_factory.mktemp("codecs")
    return {codec: str(write_set(root / codec, cells, codec)) for codec in ("none", "lz4", "zstd")}


def config(folder, **changes):
    return replace(LoaderConfig(folder, seed=1, lanes=8, given=RANDOM), **changes)


def open_loader(folder, *, rank=0, world=1, global_batch=96, micro=4, split="train", **changes):
    return CellLoader(
        config(folder, **changes), split, rank=rank, world_size=world, global_batch=global_batch, micro_batch=micro
    )


def check(cells, batch):
    """The rows of a batch's cells in the known set; asserts that all it says about them is so."""
    rows = batch.cell_ids_B2[:, 1].numpy() // 1_000_003
    rows = np.argsort(cells.identity[:, 1])[rows]  # identity's rows are a permutation of 0, 1_000_003, ...
    np.testing.assert_array_equal(cells.identity[rows], batch.cell_ids_B2.numpy())
    counts = cells.counts[rows]
    padded = np.concatenate([np.zeros((len(rows), 1), np.int64), counts], axis=1)
    for part in (batch.given, batch.asked):
        ids = part.gene_ids.numpy()
        expected = padded[:, ids] if ids.ndim == 1 else np.take_along_axis(padded, ids, 1)
        np.testing.assert_array_equal(part.counts_BS.numpy(), expected)
        for row in np.atleast_2d(ids):
            assert len(np.unique(row[row > 0])) == (row > 0).sum()
    np.testing.assert_array_equal(batch.library_size_B.numpy(), expected.sum(1).astype(np.float32))
    np.testing.assert_array_equal(batch.library_size_all_B.numpy(), counts.sum(1).astype(np.float32))
    for name, labels in cells.labels.items():
        np.testing.assert_array_equal(batch.conditions[name].numpy(), labels[rows])
    return rows


def flat(batch):
    """Every number of a batch, to compare two of them."""
    return [
        t.tolist()
        for t in (
            batch.cell_ids_B2, batch.given.gene_ids, batch.given.counts_BS, batch.asked.gene_ids, batch.asked.counts_BS,
            batch.library_size_B, batch.weight_B, batch.positions_B, batch.conditions["type"],
        )
    ] + [batch.n_cells]  # fmt: skip


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec, form", [("none", "dense"), ("lz4", "dense"), ("zstd", "compact")])
@pytest.mark.parametrize(
    "given_set, asked_set",
    [
        (GeneSetConfig("all"), SAME),
        (GeneSetConfig("random", 64), SAME),
        (RANDOM, GeneSetConfig("random", 128, gene_set_group=48)),
        (GeneSetConfig("expressed"), GeneSetConfig("all")),
        (GeneSetConfig("expressed_plus_zeros", 300), GeneSetConfig("weighted", 100)),
        (GeneSetConfig("expressed", 30, overflow="sample"), SAME),
    ],
    ids=lambda c: c.policy,
)
def test_batches_hold_the_known_counts_of_every_cell_once(sets, cells, codec, form, given_set, asked_set):
    folder = sets[codec]
    with open_loader(folder, given=given_set, asked=asked_set, form=form) as loader:
        seen = []
        for _ in range(loader.steps_per_epoch):
            for batch in next(loader):
                dense = batch.to("cpu")
                rows = check(cells, dense)
                seen += rows[dense.weight_B.numpy() > 0].tolist()
                assert dense.n_cells in (96, 420 % 96)
        assert sorted(seen) == list(range(420))
        in_order = [r for batches in loader.one_pass() for b in batches for r in check(cells, b.to("cpu"))]
        assert in_order[:420] == list(range(420))


def test_encoding_meets_the_cells_of_a_shard_in_set_order(folder, cells):
    shards = ShardSet(folder)
    rows = [
        r
        for shard in range(len(shards.manifest.shards))
        for batch in shard_batches(shards, shard, micro_batch=5, given=GeneSetConfig("expressed"))
        for r in check(cells, batch)
    ]
    assert rows == list(range(490))
    shards.close()


# --- order ---------------------------------------------------------------------------------------------------------


def by_cell(micro_batches):
    """The rows of `flat` that belong to one cell, for every cell of some micro-batches."""
    cells = []
    for batch in micro_batches:
        n = len(batch)
        sides = []
        for part in (batch.given, batch.asked):
            ids = part.gene_ids if part.gene_ids.ndim == 2 else part.gene_ids.expand(n, -1)
            sides.append([[(i, c) for i, c in zip(*row) if i] for row in zip(ids.tolist(), part.counts_BS.tolist())])
        rest = (batch.cell_ids_B2, batch.library_size_B, batch.weight_B, batch.positions_B, batch.conditions["type"])
        cells += list(zip(*sides, *(t.tolist() for t in rest), [batch.n_cells] * n))
    return cells


@pytest.mark.parametrize("world, micro", [(2, 4), (3, 1), (4, 3), (8, 4), (24, 1), (64, 3)])
@pytest.mark.parametrize("policy", ["random", "weighted"])
def test_every_world_size_gives_every_cell_the_same_position_and_gene_sets(folder, world, micro, policy):
    """With a set for each cell: a position must draw alike in a micro-batch of any size."""
    changes = {
        "given": GeneSetConfig(policy, 20),
        "asked": GeneSetConfig("expressed_plus_zeros", 150),
        "global_batch": 192,
        "prefetch": 0,
    }
    with open_loader(folder, micro=192, **changes) as whole:
        loaders = [open_loader(folder, rank=r, world=world, micro=micro, **changes) for r in range(world)]
        for _ in range(whole.steps_per_epoch + 1):
            got = [b for loader in loaders for b in next(loader)]
            assert {len(b) for b in got} == {micro}
            assert by_cell(got) == by_cell(next(whole))
        for loader in loaders:
            loader.close()


def test_a_shared_gene_set_is_its_groups_whatever_the_micro_batch(folder):
    given_set = GeneSetConfig("random", 20, gene_set_group=12)
    with open_loader(folder, micro=12, given=given_set) as whole:
        others = [open_loader(folder, micro=m, given=given_set, rank=r, world=2) for m in (1, 3, 4) for r in (0, 1)]
        for _ in range(whole.steps_per_epoch + 1):
            expected = by_cell(next(whole))
            got = [b for other in others for b in next(other)]
            assert by_cell(got) == expected * 3
        for other in others:
            other.close()


def test_the_sides_draw_apart_and_every_epoch_anew_but_a_pass_in_order_never(folder):
    def sets(batches, side):
        return [row for b in batches for row in getattr(b, side).gene_ids.tolist()]

    drawn = GeneSetConfig("random", 20)
    with open_loader(folder, given=drawn, asked=drawn) as loader:
        epochs = [[b for _ in range(loader.steps_per_epoch) for b in next(loader)] for _ in range(2)]
        assert not any(a == b for a, b in zip(sets(epochs[0], "given"), sets(epochs[0], "asked")))
        assert not any(a == b for a, b in zip(sets(epochs[0], "given"), sets(epochs[1], "given")))
        first = by_cell(b for batches in loader.one_pass() for b in batches)
        next(loader)
        assert by_cell(b for batches in loader.one_pass() for b in batches) == first


@settings(max_examples=15, deadline=None)
@given(
    stop=st.integers(0, 14),
    more=st.integers(1, 6),
    threads=st.integers(1, 3),
    prefetch=st.integers(0, 2),
    ahead=st.integers(0, 9),
    small=st.booleans(),
    world=st.sampled_from([1, 2, 3, 8]),
)
def test_a_resumed_stream_goes_on_bit_for_bit(folder, stop, more, threads, prefetch, ahead, small, world):
    lanes = 64 if small else 8  # shuffled by the cell, or by the window
    with open_loader(folder, lanes=lanes) as loader:
        for _ in range(stop):
            next(loader)
        state = loader.state()
        expected = [[flat(b) for b in next(loader)] for _ in range(more)]
    assert all(isinstance(v, int | str) for v in state.values())
    others = [
        open_loader(folder, rank=r, world=world, lanes=lanes, read_threads=threads, prefetch=prefetch, read_ahead=ahead)
        for r in range(world)
    ]
    for other in others:
        other.load_state(state)
    for step in expected:
        assert [flat(b) for other in others for b in next(other)] == step
    for other in others:
        other.close()


def test_another_stream_of_the_same_loader_does_not_disturb_its_place(folder):
    with open_loader(folder) as loader, open_loader(folder) as undisturbed:
        for k in range(4):
            assert [flat(b) for b in next(loader)] == [flat(b) for b in next(undisturbed)]
            if k == 1:
                assert sum(len(b) for batches in loader.one_pass() for b in batches) == 480
            if k == 2:
                next(loader.one_pass())  # left in the middle


@pytest.mark.parametrize(
    "name, changes, batch",
    [
        ("seed", {"seed": 2}, 96),
        ("lanes", {"lanes": 4}, 96),
        ("global_batch", {}, 48),
        ("given", {"given": GeneSetConfig("random", 51, 4)}, 96),
        ("select", {"select": {"type": ["a"]}}, 96),
        ("balance", {"balance": ["type"]}, 96),
    ],
)
def test_a_state_of_another_stream_is_refused_by_name(folder, name, changes, batch):
    with open_loader(folder) as loader:
        state = loader.state()
    with open_loader(folder, global_batch=batch, **changes) as other, pytest.raises(InputError, match=f"{name} is"):
        other.load_state(state)


def test_a_balanced_and_selected_stream_is_resumed_however_its_conditions_are_ordered(folder):
    donors = [f"d{k}" for k in range(250)]
    one = {"balance": ["type", "donor"], "select": {"type": ["a", "b"], "donor": donors}}
    other = {"balance": ["donor", "type"], "select": {"donor": donors[::-1], "type": ["b", "a"]}}
    with open_loader(folder, global_batch=24, **one) as loader:
        n = loader.steps_per_epoch
        for _ in range(n - 2):
            next(loader)
        state = loader.state()
        expected = [[flat(b) for b in next(loader)] for _ in range(n)]  # on into the next epoch
    with open_loader(folder, global_batch=24, **other) as loader:
        loader.load_state(state)
        assert [[flat(b) for b in next(loader)] for _ in range(n)] == expected


def test_a_state_of_another_data_set_is_refused(folder, tmp_path):
    with open_loader(folder) as loader:
        state = loader.state()
    other = str(write_set(tmp_path / "other", known_cells(seed=1)))
    with open_loader(other) as loader, pytest.raises(InputError, match="data is"):
        loader.load_state(state)


@pytest.mark.parametrize("name", ["step", "seed", "balance", "given"])
def test_a_state_of_other_keys_is_refused_by_their_names(folder, name):
    with open_loader(folder) as loader:
        state = loader.state()
        value = state.pop(name)
        with pytest.raises(InputError, match=f"resumed: the checkpoint's state lacks {name}"):
            loader.load_state(state)
        with pytest.raises(InputError, match="resumed: the checkpoint's state has colour, which is unknown"):
            loader.load_state({**state, name: value, "colour": 1})


# --- choice of cells -----------------------------------------------------------------------------------------------


def test_select_meets_exactly_the_chosen_cells_and_reads_no_other_block(folder, cells, monkeypatch):
    fetched, fetch = set(), ShardSet.fetch
    monkeypatch.setattr(ShardSet, "fetch", lambda self, b, into=None: (fetched.add(b), fetch(self, b, into))[1])
    chosen = {"type": ["b", "c"], "donor": [f"d{k}" for k in range(0, 300, 2)]}
    with open_loader(folder, select=chosen) as loader:
        seen = [
            r
            for _ in range(loader.steps_per_epoch)
            for b in next(loader)
            for r, w in zip(check(cells, b), b.weight_B.tolist())
            if w
        ]
    train = np.arange(420)
    keep = np.isin(cells.labels["type"][train], [1, 2]) & (cells.labels["donor"][train] % 2 == 0)
    assert sorted(seen) == train[keep].tolist()
    assert fetched == set((train[keep] // 8).tolist())
    assert len(fetched) < 53


def test_balance_draws_conditions_equally_often(folder, cells):
    with open_loader(folder, balance=["type"], balance_max_repeats=50) as loader:
        batches = [b for _ in range(loader.steps_per_epoch) for b in next(loader)]
        types = np.concatenate([b.conditions["type"].numpy()[b.weight_B.numpy() > 0] for b in batches])
        for batch in batches:
            check(cells, batch)
    assert np.bincount(types).tolist() == [140, 140, 140]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"select": {"type": ["z"]}}, "no label 'z'"),
        ({"select": {"tissue": ["a"]}}, "condition 'tissue' is unknown"),
        ({"balance": ["tissue"]}, "condition 'tissue' is unknown"),
        ({"given": GeneSetConfig("random", 701)}, "given.n_genes=701 must lie in 1 ... 700"),
        ({"given": GeneSetConfig("random", 5, gene_set_group=6)}, "nearest: 4 or 8"),
        ({"given": GeneSetConfig("expressed", 20)}, "overflow=sample"),
        ({"given": SAME}, "given.policy=same"),
        ({"lanes": 0}, "lanes=0"),
        ({"split": "test"}, "split 'test' is not in the shard set; it has train, validation"),
    ],
)
def test_what_the_set_cannot_serve_is_refused(folder, changes, text):
    with pytest.raises(InputError, match=text):
        open_loader(folder, **changes)


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_flipped_bit_is_raised_by_the_first_batch_that_needs_its_block(tmp_path, cells, prefetch):
    folder = write_set(tmp_path / "set", cells, block_cells=8)
    with open_loader(str(folder)) as loader:
        bad, first = 30, None
        for step in range(loader.steps_per_epoch):
            ids = torch.cat([b.cell_ids_B2 for b in next(loader)]).tolist()
            if any(cells.identity[bad * 8 + k].tolist() in ids for k in range(8)):
                first = step
                break
        record = loader.cells.blocks[bad]
        shard = loader.manifest.shards[record["shard"]].path
    assert first
    with open(folder / shard, "r+b") as file:
        file.seek(int(record["offset"]) + 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with open_loader(str(folder), prefetch=prefetch, read_ahead=3) as loader:
        for _ in range(first):
            next(loader)
        for _ in range(2):  # and again by whoever tries again
            with pytest.raises(InputError, match=f"{shard}, block {bad}.*CRC-32"):
                next(loader)


def test_a_block_of_other_cells_than_the_indexs_is_refused(folder):
    with open_loader(folder, prefetch=0) as loader:
        loader.cells.blocks["n_cells"][:52] = 9  # 8 in the blocks
        with pytest.raises(InputError, match="train-0000.*: 8 cells, the index says 9"):
            next(loader)


def test_a_shard_that_changes_while_it_is_read_is_noticed(tmp_path, cells):
    folder = write_set(tmp_path / "set", cells, "none")
    with open_loader(str(folder), prefetch=0, read_ahead=0) as loader:
        next(loader)
        loader.feed.close()  # drops the blocks held in memory
        shard = folder / loader.manifest.shards[0].path
        data, stat = bytearray(shard.read_bytes()), shard.stat()
        data[5000] ^= 1
        with open(shard, "r+b") as file:
            file.write(data)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk does
        loader.seek(0)
        with pytest.raises(InputError, match="damaged or was changed"):
            next(loader)


def test_a_local_read_that_fails_names_the_block(folder, monkeypatch):
    shards = ShardSet(folder)

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(InputError, match="shards/train-000001.tar, block 4: can't be read: Input/output error"):
        shards.fetch(4)
    shards.close()


def test_missing_and_truncated_shards_are_named(tmp_path, cells):
    folder = write_set(tmp_path / "set", cells, block_cells=8)
    shard = folder / "shards" / "train-000004.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with open_loader(str(folder)) as loader, pytest.raises(InputError, match="train-000004.tar.*cut short"):
        list(loader.one_pass())
    shard.unlink()
    with pytest.raises(InputError, match="1 of 21 shards are missing, the first is shards/train-000004.tar"):
        open_loader(str(folder))


def open_files():
    return len(os.listdir("/proc/self/fd"))


def threads():
    return {t.name for t in threading.enumerate() if t.name.startswith("scldm")}


def test_nothing_is_left_behind_by_a_consumer_that_stops_or_dies(folder):
    gc.collect()
    before = open_files()
    with open_loader(folder) as loader:
        next(loader)
    assert not threads()
    assert open_files() == before

    loader = open_loader(folder)
    next(loader)
    del loader  # never closed
    gc.collect()
    assert not threads()
    assert open_files() == before

    def dies():
        for _ in open_loader(folder):
            raise KeyError

    with pytest.raises(KeyError):
        dies()
    gc.collect()
    assert not threads()
    assert open_files() == before


def test_a_read_under_way_at_the_end_leaves_no_file_open(folder, monkeypatch):
    before = open_files()
    started, go, fetch = threading.Event(), threading.Event(), ShardSet.fetch

    def slow(self, block, into=None):
        started.set()
        assert go.wait(10)
        return fetch(self, block, into)

    monkeypatch.setattr(ShardSet, "fetch", slow)
    loader = open_loader(folder)
    loader.feed.start(loader.feed.plans_from(0), 1)
    assert started.wait(10)
    timer = threading.Timer(0.3, go.set)
    timer.start()
    loader.close()
    timer.join()
    assert not threads()
    assert open_files() == before


def test_a_closed_loader_begins_nothing(folder):
    loader = open_loader(folder)
    next(loader)
    loader.close()
    for begin in (lambda: next(loader), lambda: next(loader.one_pass())):
        with pytest.raises(AssertionError, match="closed"):
            begin()
    assert not threads()


def test_a_loader_that_is_refused_leaves_nothing_open(folder):
    before = open_files()
    with pytest.raises(InputError):
        open_loader(folder, given=SAME)
    assert open_files() == before


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """400 blocks of 32 cells of few genes, of which a selection uses a few cells each."""
    cells = known_cells(n_train=12_800, n_validation=8, n_genes=40)
    return str(write_set(tmp_path_factory.mktemp("thin") / "set", cells, "none", block_cells=32))


@pytest.mark.parametrize(
    "changes", [{}, {"select": {"donor": [f"d{k}" for k in range(10)]}}, {"balance": ["type", "donor"]}]
)
def test_reading_ahead_reads_no_block_more_often(thin, monkeypatch, changes):
    """Blocks read ahead must not push out those that are needed before them; some are read before an epoch's end."""
    fetches: list[int] = []
    fetch = ShardSet.fetch

    def counted(self, block, into=None):
        fetches.append(block)
        return fetch(self, block, into)

    monkeypatch.setattr(ShardSet, "fetch", counted)
    n_fetches = {}
    for read_ahead in (0, 8):
        fetches.clear()
        few = GeneSetConfig("random", 8, gene_set_group=32)
        with open_loader(
            thin, global_batch=32, micro=32, given=few, read_ahead=read_ahead, prefetch=0, **changes
        ) as loader:
            for _ in range(min(loader.steps_per_epoch, 60)):
                next(loader)
            slots = loader.feed.n_slots
        n_fetches[read_ahead] = len(fetches)
    assert n_fetches[8] <= n_fetches[0] + slots, n_fetches
