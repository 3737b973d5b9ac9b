"""A stream that ends, however it does, leaves no thread and no open file behind."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.feed import Feed
from data_pipeline.stream.gene_set_config import GeneSetConfig
from scldm.errors import InputError
from tests.data_pipeline.streams import SAME, flat, interrupt, open_loader


def open_files():
    return len(os.listdir("/proc/self/fd"))


def threads():
    return {t.name for t in threading.enumerate() if t.name.startswith("scldm")}


@pytest.mark.heavy
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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "compact"])
def test_twenty_epochs_take_no_more_than_four(folder, form):
    """Memory, open files and threads; of the bytes that come by, a tenth would be seen."""
    whole = GeneSetConfig()
    with open_loader(folder, form=form, given=whole, asked=whole) as loader:
        taken, passed = [], 0
        for epoch in range(20):
            for _ in range(loader.steps_per_epoch):
                for batch in next(loader):
                    dense = batch.to("cpu")
                    passed += dense.given.counts_BS.nbytes * (epoch >= 4)
            del batch, dense
            gc.collect()
            taken.append((open_files(), threading.active_count(), resident_bytes()))
    files, alive, resident = (np.array(values[3:]) for values in zip(*taken))
    assert files.max() == files.min()
    assert alive.max() == alive.min()
    assert resident[-1] - resident[0] < passed / 10, (resident, passed)


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


COLLECTED = """
import gc, sys, threading
from data_pipeline.stream.collate import CellCollator
from data_pipeline.format.read_shards import ShardSet
from tests.data_pipeline.streams import open_loader

folder, thread, stream = sys.argv[1:]
place, method = {"scldm-read": (ShardSet, "fetch"), "scldm-loader": (CellCollator, "__call__")}[thread]
undisturbed, abandoned, collected = getattr(place, method), threading.Event(), threading.Event()

def collects(self, *rest):
    if abandoned.wait(0.02) and not collected.is_set():
        assert threading.current_thread().name.startswith(thread)
        assert gc.collect()
        collected.set()
    return undisturbed(self, *rest)

def consumer():
    loader = open_loader(folder, read_ahead=1, read_threads=1)
    batches = loader.one_pass() if stream == "one_pass" else loader
    try:
        next(batches)
        raise KeyError
    except KeyError as error:
        kept = error  # frame -> exception -> traceback -> frame: only the collector finds the loader

gc.collect()
gc.disable()
setattr(place, method, collects)
consumer()
abandoned.set()
assert collected.wait(20), "the collector waits for the thread that it runs in"
for left in threading.enumerate():
    if left.name.startswith("scldm"):
        left.join(20)
print(sorted(t.name for t in threading.enumerate()))
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "thread, stream", [("scldm-read", "next"), ("scldm-loader", "next"), ("scldm-loader", "one_pass")]
)
def test_a_loader_that_is_collected_in_a_thread_of_its_own_ends(folder, thread, stream):
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED, folder, thread, stream],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "['MainThread']\n", "")


def test_a_set_that_is_closed_while_it_is_read_closes_the_file_once_and_after(folder, monkeypatch):
    """By its loader and by its owner; the number of a file that is closed goes to the next one opened, by anybody."""
    before, preadv, others = open_files(), os.preadv, []
    shards = ShardSet(folder)

    def closed_meanwhile(fd, buffers, offset):
        shards.close()
        others.append(os.open(folder, os.O_RDONLY))
        shards.close()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", closed_meanwhile)
    assert len(shards.fetch(3)) == shards.blocks["length"][3]
    for fd in others:
        os.close(fd)  # would fail if it were closed already
    assert open_files() == before


def test_a_closed_loader_begins_nothing(folder):
    loader = open_loader(folder)
    one_pass = loader.one_pass()
    next(one_pass)
    loader.close()
    for begin in (lambda: next(loader), lambda: next(loader.one_pass()), lambda: next(one_pass)):
        with pytest.raises(AssertionError, match="closed"):
            begin()
    assert not threads()


@pytest.mark.heavy
@pytest.mark.parametrize("place, method", [(ShardSet, "close"), (threading.Thread, "join"), (Feed, "close")])
@pytest.mark.parametrize("again", ["close", "collected"])
def test_a_close_that_was_interrupted_is_ended_by_the_next(folder, monkeypatch, place, method, again):
    gc.collect()
    before = open_files()
    loader = open_loader(folder)
    next(loader)
    with monkeypatch.context() as patch:
        interrupt(patch, place, method, 1, late=False)
        with pytest.raises(KeyboardInterrupt):
            loader.close()
    with pytest.raises(AssertionError, match="closed"):
        next(loader)
    if again == "close":
        loader.close()
    del loader
    gc.collect()
    assert not threads()
    assert open_files() == before


def test_a_loader_that_is_refused_leaves_nothing_open(folder):
    before = open_files()
    with pytest.raises(InputError):
        open_loader(folder, given=SAME)
    assert open_files() == before


@pytest.mark.heavy
def test_loaders_share_cells_that_their_owner_closes(folder, tmp_path):
    """Such as DirectCells, whose close removes the set."""

    class Removed(ShardSet):
        def close(self):
            super().close()
            shutil.rmtree(self.root)

    shutil.copytree(folder, tmp_path / "set")
    before = open_files()
    shared = Removed(str(tmp_path / "set"))
    with open_loader(folder) as undisturbed, open_loader("", cells=shared) as loader:
        for end in ("close", "collected", "refused"):
            if end == "refused":
                with pytest.raises(InputError):
                    open_loader("", cells=shared, given=SAME)
            else:
                other = open_loader("", cells=shared, split="validation", global_batch=16)
                next(other)
                if end == "close":
                    other.close()
                del other
                gc.collect()
            for _ in range(20):
                assert [flat(b) for b in next(loader)] == [flat(b) for b in next(undisturbed)], end
    assert not threads()
    assert (tmp_path / "set").exists()
    shared.close()
    assert open_files() == before
