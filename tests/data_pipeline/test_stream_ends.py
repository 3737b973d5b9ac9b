"""A stream that ends, however it does, leaves no thread and no open file behind."""

import gc
import os
import threading

import pytest

from data_pipeline.read_shards import ShardSet
from scldm.errors import InputError
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.data_pipeline.streams import SAME, open_loader


@pytest.fixture(scope="module")
def cells():
    return known_cells()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cells):
    """53 training blocks of 8 cells: more than 8 lanes of 2 hold, so that the order is that of a large set."""
    return str(write_set(tmp_path_factory.mktemp("shards") / "set", cells, block_cells=8))


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
