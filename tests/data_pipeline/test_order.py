"""The order's guarantees: every cell once, the same batches for every world size, any position looked up alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.stream.order import Balance, EpochOrder, Order, Units, rank_slice, reads_of_a_block
from data_pipeline.stream.philox import random_words
from scldm.errors import InputError

WORLDS = (1, 2, 3, 4, 8, 24, 64)


def blocks_of(n_cells, block_cells=8, first_block=3):
    """A split of n cells whose blocks are numbered from 3, as one that follows another split."""
    sizes = np.full(-(-n_cells // block_cells), block_cells)
    if n_cells % block_cells:
        sizes[-1] = n_cells % block_cells
    return Units.whole(np.arange(first_block, first_block + len(sizes)), sizes)


def identity(block, row, block_cells=8, first_block=3):
    return (block - first_block) * block_cells + row


@pytest.mark.heavy
@settings(max_examples=150, deadline=None)
@given(
    n_cells=st.integers(1, 900),
    lanes=st.integers(1, 40),
    per_rank=st.integers(1, 3),
    world=st.sampled_from(WORLDS),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 5),
    window=st.integers(1, 4),
)
def test_every_cell_of_an_epoch_stands_at_exactly_one_position_over_all_ranks(
    n_cells, lanes, per_rank, world, seed, epoch, window
):
    global_batch = world * per_rank
    seen = []
    for rank in range(world):
        order = EpochOrder(blocks_of(n_cells), seed, epoch, lanes, global_batch, window)
        low, high = rank_slice(rank, world, global_batch, per_rank)
        cells = identity(*order.plan(0, order.steps, low, high))
        position = np.arange(order.steps)[:, None] * global_batch + np.arange(low, high)
        assert ((cells >= 0) & (cells < n_cells)).all()  # copies that fill the last batch are real cells too
        seen.append(cells[position < n_cells])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(n_cells))


@pytest.mark.heavy
@settings(max_examples=60, deadline=None)
@given(n_cells=st.integers(1, 3000), lanes=st.integers(1, 64), seed=st.integers(0, 99), window=st.integers(1, 3))
def test_world_size_and_chunking_do_not_change_a_global_batch(n_cells, lanes, seed, window):
    global_batch = 192  # divisible by every world size here
    whole = EpochOrder(blocks_of(n_cells), seed, 1, lanes, global_batch, window)
    expected = identity(*whole.plan(0, whole.steps, 0, global_batch))
    for world in WORLDS:
        for rank in {0, world // 2, world - 1}:
            low, high = rank_slice(rank, world, global_batch, 3 if world == 64 else 1)
            order = EpochOrder(blocks_of(n_cells), seed, 1, lanes, global_batch, window)
            step = order.steps // 2  # looked up alone, in the middle: what a resume does
            cells = identity(*order.plan(step, 1, low, high))
            np.testing.assert_array_equal(cells[0], expected[step, low:high])


def test_epochs_and_seeds_differ_and_the_fixed_pass_keeps_the_stored_order():
    plans = [
        identity(*EpochOrder(blocks_of(5000), seed, epoch, 16, 100, 2).plan(0, 50, 0, 100))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (plans[a] == plans[b]).mean() < 0.01
    fixed = EpochOrder(blocks_of(250), 0, 0, 16, 100, 0)
    np.testing.assert_array_equal(identity(*fixed.plan(0, 2, 0, 100)).ravel(), np.arange(200))
    assert (identity(*fixed.plan(2, 1, 0, 100))[0, :50] == np.arange(200, 250)).all()


def test_each_rank_meets_the_whole_data_set_over_the_epochs():
    cells = [
        identity(*EpochOrder(blocks_of(4096), 7, epoch, 32, 128, 2).plan(0, 32, 0, 32)).ravel() for epoch in range(24)
    ]
    share = len(np.unique(np.concatenate(cells))) / 4096
    assert share > 0.99  # 1 - (3/4)^24 = 0.999; a rank with fixed blocks stays at 0.25


def test_positions_are_uniform_over_cells_of_a_small_and_of_a_large_set():
    """The place of a cell in the epoch must not depend on where it is stored."""
    for n_cells, epochs in ((40, 400), (1200, 400)):
        first_half = np.zeros(n_cells)
        for epoch in range(epochs):
            order = EpochOrder(blocks_of(n_cells), 1, epoch, 4, 20, 2)
            first_half[identity(*order.plan(0, order.steps // 2, 0, 20)).ravel()] += 1
        z = (first_half / epochs - 0.5) / np.sqrt(0.25 / epochs)
        assert np.abs(z).max() < 5
        assert z.std() < 1.3


def test_small_sets_are_shuffled_by_the_cell_not_by_the_block():
    """Two blocks for 32 lanes: neighbours in storage share a batch as often as any other pair does."""
    together = 0
    for epoch in range(300):
        cells = identity(*EpochOrder(blocks_of(420, 256), 0, epoch, 32, 60, 2).plan(0, 7, 0, 60), 256)
        batch_of = np.empty(420, int)
        batch_of[cells] = np.arange(7)[:, None]
        together += (batch_of[:-1] == batch_of[1:]).mean()
    assert abs(together / 300 - 59 / 419) < 0.005


def test_a_lane_reads_few_blocks_at_a_time():
    order = EpochOrder(blocks_of(100_000), 0, 0, 10, 100, 2)
    block, _ = order.plan(200, 20, 0, 100)
    assert len(np.unique(block)) <= 10 * (20 * 10 // 16 + 2) * 2  # windows of 16 cells, 200 cells a lane


@settings(max_examples=100, deadline=None)
@given(
    n_cells=st.integers(200, 3000),
    lanes=st.integers(1, 12),
    window=st.integers(1, 3),
    per_lane=st.integers(1, 40),
    kept=st.floats(0.02, 1),
    seed=st.integers(0, 99),
)
def test_no_step_touches_more_blocks_than_two_windows_a_lane_and_what_its_cells_hold_whole(
    n_cells, lanes, window, per_lane, kept, seed
):
    """The bound of a stream's memory."""
    units = blocks_of(n_cells).where(np.random.default_rng(seed).random(n_cells) < kept)
    global_batch = lanes * per_lane
    most = 2 * lanes * window + units.most_units(global_batch)
    order = EpochOrder(units, seed, 0, lanes, global_batch, window)
    if not units.n_cells or len(units) <= lanes * window:
        return  # nothing to draw from, or a small set, of which every block is held
    block, _ = order.plan(0, order.steps, 0, global_batch)
    assert max(len(np.unique(b)) for b in block) <= most


def test_selected_cells_alone_are_met_each_once():
    rng = np.random.default_rng(0)
    keep = rng.random(1000) < 0.05
    keep[:40] = False  # blocks that lose every cell
    units = blocks_of(1000).where(keep)
    order = EpochOrder(units, 3, 0, 4, 10, 1)
    cells = identity(*order.plan(0, order.steps, 0, 10)).ravel()[: keep.sum()]
    np.testing.assert_array_equal(np.sort(cells), np.flatnonzero(keep))


def test_balance_gives_every_group_its_quota_and_caps_repeats():
    group = np.repeat([0, 1, 3], [900, 95, 5])
    rng = np.random.default_rng(0)
    rng.shuffle(group)
    balance = Balance(blocks_of(1000), group, max_repeats=10, seed=5)
    assert balance.n_cells == 333 + 333 + 50
    met = np.zeros(1000, int)
    for epoch in range(6):
        units = balance.units(epoch)
        assert units.n_cells == balance.n_cells
        order = EpochOrder(units, 5, epoch, 4, 10, 1)
        cells = identity(*order.plan(0, order.steps, 0, 10)).ravel()[: units.n_cells]
        times = np.bincount(cells, minlength=1000)
        assert [times[group == g].sum() for g in (0, 1, 3)] == [333, 333, 50]
        for g in (0, 1, 3):
            assert np.ptp(times[group == g]) <= 1
        met += times
    assert np.ptp(met[group == 0]) <= 1  # 6 x 333 draws of 900 cells: the extra one goes round


def test_draws_are_philox_words_by_key_and_counter():
    """The stream is specified by these numbers: a change of them changes every run that is resumed."""
    assert random_words(1, 2, 3, 4, 2).tolist() == PHILOX
    assert random_words(1, 2, 4, 3, 2).tolist() != PHILOX


@pytest.mark.parametrize("skip, index, epoch", [(0, 0, 0), (7, 2**64 - 1, 3), (2**64 - 7, 2**40, 2**63 - 1)])
def test_words_are_numpys(skip, index, epoch):
    philox = np.random.Philox(
        key=np.array([2**63 - 1, 4], np.uint64), counter=np.array([skip, index, epoch, 0], np.uint64)
    )
    words = random_words(2**63 - 1, 4, epoch, index, 23, skip)
    np.testing.assert_array_equal(words, philox.random_raw(23))


PHILOX = [15304873005091984411, 7790104309783628986]


def test_order_is_frozen():
    order = EpochOrder(blocks_of(100), 1, 2, 4, 10, 1)
    assert identity(*order.plan(0, 1, 0, 10))[0].tolist() == GOLDEN


GOLDEN = [9, 12, 70, 67, 65, 94, 95, 75, 78, 74]


@pytest.mark.parametrize(
    "world, micro, batch, named",
    [(7, 1, 128, "world size 4 or 8"), (2, 32, 60, "micro_batch 30"), (4, 32, 130, "global_batch 128 or 256")],
)
def test_a_world_size_that_the_batch_cannot_serve_is_refused_with_the_nearest(world, micro, batch, named):
    with pytest.raises(InputError, match=f"{world} ranks.*{named}"):
        rank_slice(0, world, batch, micro)


@pytest.mark.parametrize("lanes, world", [(32, 1), (32, 8), (32, 64), (8, 24), (32, 24), (6, 12), (96, 48), (7, 2)])
def test_how_often_a_block_is_read_is_known(lanes, world):
    """Of the order itself: the ranks whose plans of an epoch name each block."""
    order = EpochOrder(blocks_of(800 * 64, 64), 1, 0, lanes, 192, 2)
    share = 192 // world
    plans = [order.plan(0, order.steps - 1, r * share, (r + 1) * share)[0] for r in range(world)]
    found = sum(len(np.unique(blocks)) for blocks in plans) / len(np.unique(np.concatenate(plans, axis=1)))
    reads = reads_of_a_block(lanes, world, 192)
    assert 0.98 * reads <= found <= 1.01 * reads * (1 + lanes / 800)  # a block where two lanes meet is of both


def test_as_many_lanes_as_ranks_read_every_block_once():
    assert reads_of_a_block(32, 1_024, 8_192) == 32
    assert reads_of_a_block(1_024, 1_024, 8_192) == reads_of_a_block(1_024, 256, 8_192) == 1


def test_an_order_without_cells_is_refused():
    with pytest.raises(InputError, match="no cell"):
        Order(blocks_of(5).where(np.zeros(5, bool)), 0, 32, 8, 1)
