"""Blocks are read ahead into no more memory than the steps need, none more often than without, whatever interrupts."""

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.feed import LOADER
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.data_pipeline.streams import flat, interrupt, open_loader


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """400 blocks of 32 cells of few genes, of which a selection uses a few cells each."""
    cells = known_cells(n_train=12_800, n_validation=8, n_genes=40)
    return str(write_set(tmp_path_factory.mktemp("thin") / "set", cells, "none", block_cells=32))


@pytest.mark.heavy
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


@pytest.mark.parametrize(
    "changes, most",
    [
        ({}, 48),  # 16 blocks in the windows, half as many again, 8 steps ahead of them and 16 to come
        ({"select": {"donor": [f"d{k}" for k in range(240)]}}, 64),
        ({"select": {"donor": [f"d{k}" for k in range(10)]}}, 256),
        ({"balance": ["type", "donor"]}, 256),
    ],
)
def test_memory_is_that_of_the_blocks_that_steps_touch_not_of_their_cells(thin, changes, most):
    """A global batch of 256 cells, of 8 lanes; of the whole set no step touches more than 40 blocks."""
    given_set = GeneSetConfig("random", 8, gene_set_group=256)
    sizes = {"global_batch": 256, "micro": 256, "read_ahead": 8}
    with open_loader(thin, given=given_set, prefetch=0, **sizes, **changes) as loader:
        for _ in range(loader.steps_per_epoch):
            next(loader)
        blocks = loader.feed.blocks
        assert blocks
        assert sum(len(payload) > 0 for payload in blocks.slots.payload) == loader.feed.n_slots <= most


SMALL = {"given": GeneSetConfig("random", 8, gene_set_group=32), "global_batch": 32, "micro": 32}


@pytest.mark.parametrize("place, method", [(Future, "exception"), (ThreadPoolExecutor, "submit")])
@pytest.mark.parametrize("nth, late", [(1, False), (5, False), (3, True)])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_interrupt_while_a_block_is_waited_for_leaves_the_stream_whole(
    thin, monkeypatch, place, method, nth, late, prefetch
):
    with open_loader(thin, **SMALL, prefetch=0) as undisturbed, open_loader(thin, **SMALL, prefetch=prefetch) as loader:
        for _ in range(3):
            assert [flat(b) for b in next(loader)] == [flat(b) for b in next(undisturbed)]
        expected = [[flat(b) for b in next(undisturbed)] for _ in range(40)]
        interrupt(monkeypatch, place, method, nth, late)
        got, n_interrupts = [], 0
        while len(got) < 40:
            try:
                got.append([flat(b) for b in next(loader)])
            except KeyboardInterrupt:
                n_interrupts += 1
        assert n_interrupts == 1
        assert got == expected


@pytest.mark.parametrize("place, method", [(threading.Thread, "start"), (threading.Event, "wait")])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_an_interrupt_while_the_thread_is_started_leaves_no_second_one(thin, monkeypatch, place, method, late, goes_on):
    """Thread.start() waits for an Event when the thread is there already, which says nothing of it."""
    with open_loader(thin, **SMALL, prefetch=0) as undisturbed, open_loader(thin, **SMALL, prefetch=2) as loader:
        with monkeypatch.context() as patch:
            interrupt(patch, place, method, 1, late)
            with pytest.raises(KeyboardInterrupt):
                next(loader)
        for _ in range(30 * goes_on):
            assert [flat(b) for b in next(loader)] == [flat(b) for b in next(undisturbed)]
    soon = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t.name == LOADER]:  # one that had not come may be ending still
        assert time.monotonic() < soon, left
        time.sleep(0.01)


class AtLine:
    """For sys.settrace: interrupts a function at the nth line that it runs."""

    def __init__(self, function, nth):
        self.code, self.left = function.__code__, nth

    def __call__(self, frame, event, _):
        if frame.f_code is not self.code:
            return None
        self.left -= event == "line"
        if event == "line" and not self.left:
            raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_interrupt_at_any_line_of_next_leaves_the_stream_where_its_state_says(thin, prefetch):
    with open_loader(thin, **SMALL, prefetch=0) as undisturbed:
        expected = [[flat(b) for b in next(undisturbed)] for _ in range(40)]
    n_interrupts, traced = 0, sys.gettrace()
    with open_loader(thin, **SMALL, prefetch=prefetch) as loader:
        while True:
            sys.settrace(AtLine(CellLoader.__next__, n_interrupts + 1))
            try:
                next(loader)
            except KeyboardInterrupt:
                n_interrupts += 1
            else:
                break
            finally:
                sys.settrace(traced)
            step = loader.state()["step"]
            assert [flat(b) for b in next(loader)] == expected[step], n_interrupts
    assert n_interrupts > 4
