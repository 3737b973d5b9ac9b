"""Remote sets: a bounded cache that processes share, reads that fail, and what is refused at the door."""

import errno
import json
import os
import shutil
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.format import read_shards
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.loader import CellLoader, LoaderConfig
from scldm.errors import Busy, InputError
from tests.data_pipeline.small_sets import known_cells, write_set


class Flaky(MemoryFileSystem):
    """A memory filesystem that counts reads of shards and fails when told to."""

    protocol = "flaky"
    cachable = False
    reads: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012
    failures = 0
    cut_short = 0
    short_index = 0
    once: set[str] | None = None  # the paths whose first read has failed
    raised: type[Exception] = ConnectionResetError  # then; a store's client may have errors of its own

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky:"))

    def _fail(self, path):
        """The first read of each path fails where that is asked for."""
        if Flaky.once is not None and path not in Flaky.once:
            Flaky.once.add(path)
            raise Flaky.raised("reset by peer")

    def ls(self, path, detail=True, **kwargs):
        self._fail(path)
        return super().ls(path, detail, **kwargs)

    def open(self, path, mode="rb", block_size=None, cache_options=None, compression=None, **kwargs):
        self._fail(path)
        return super().open(path, mode, block_size, cache_options, compression, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        path = self._strip_protocol(path)
        if str(path).endswith(".npy"):
            self._fail(path)
            if Flaky.short_index:
                Flaky.short_index -= 1
                return super().cat_file(path, start, end, **kwargs)[:-3]
        if str(path).endswith(".tar"):
            Flaky.reads.append((str(path), start, end))
            if Flaky.failures:
                Flaky.failures -= 1
                raise (ConnectionResetError if Flaky.failures % 2 else RuntimeError)("reset by peer")
            if Flaky.cut_short:
                Flaky.cut_short -= 1
                return super().cat_file(path, start, end, **kwargs)[:-3]
        return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setattr(read_shards, "BACK_OFF_S", 0.001)
    cells = known_cells()
    folder = write_set(tmp_path / "set", cells, block_cells=32)
    fs = Flaky()
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    Flaky.reads, Flaky.failures, Flaky.cut_short, Flaky.short_index, Flaky.once = [], 0, 0, 0, None
    Flaky.raised = ConnectionResetError
    yield "flaky://bucket", str(folder)
    Flaky.once = None
    MemoryFileSystem.store.clear()


def test_a_remote_set_streams_the_same_batches_and_is_read_once(remote, tmp_path):
    url, folder = remote
    cache = str(tmp_path / "cache")
    loaders = [
        CellLoader(LoaderConfig(where, lanes=4, cache_folder=cache), global_batch=60, micro_batch=60)
        for where in (url, folder)
    ]
    for _ in range(14):  # two epochs
        a, b = (next(loader)[0].to("cpu") for loader in loaders)
        assert a.given.counts_BS.equal(b.given.counts_BS)
    n_first = len(Flaky.reads)
    assert len(set(Flaky.reads)) == n_first == 14
    other_rank = CellLoader(LoaderConfig(url, lanes=4, cache_folder=cache), global_batch=60, micro_batch=60)
    for _ in range(7):
        next(other_rank)
    assert len(Flaky.reads) == n_first  # the ranks of a node share what one of them fetched
    for loader in (*loaders, other_rank):
        loader.close()


def test_the_cache_keeps_to_its_limit(remote, tmp_path):
    url, folder = remote
    local = ShardSet(folder)
    limit = int(local.blocks["length"][:5].sum())
    shards = ShardSet(url, cache_folder=str(tmp_path / "cache"), cache_bytes=limit)
    for _ in range(2):
        for block in range(len(shards.blocks)):
            np.testing.assert_array_equal(shards.fetch(block), local.fetch(block))
    assert len(Flaky.reads) == len(shards.blocks) * 2 - 5
    file = next((tmp_path / "cache").rglob("blocks.bin"))
    assert file.stat().st_size <= limit
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)  # a damaged cache is read past, and mended
    np.testing.assert_array_equal(shards.fetch(0), local.fetch(0))
    shards.fetch(0)
    assert len(Flaky.reads) == len(shards.blocks) * 2 - 4
    local.close()
    shards.close()


def test_failing_reads_are_tried_again_and_then_raised(remote, tmp_path):
    url, folder = remote
    shards = ShardSet(url, cache_folder=str(tmp_path / "cache"))
    Flaky.failures, Flaky.cut_short = 2, 2
    assert shards.fetch(3).tobytes() == ShardSet(folder).fetch(3).tobytes()
    assert len(Flaky.reads) == 5
    Flaky.failures = 99
    with pytest.raises(Busy, match=r"flaky://bucket/shards/train-000001.tar, block 3: reading failed 5 times.*reset"):
        shards.fetch(3)
    Flaky.failures, Flaky.cut_short = 0, 99
    with pytest.raises(InputError, match="block 3: its CRC-32"):
        shards.fetch(3)
    shards.close()


@pytest.mark.parametrize("raised", [ConnectionResetError, RuntimeError])
def test_a_start_outlives_reads_of_manifest_index_and_folder_that_fail(remote, tmp_path, raised):
    url, folder = remote
    Flaky.once, Flaky.short_index, Flaky.raised = set(), 1, raised
    shards = ShardSet(url, cache_folder=str(tmp_path / "cache"))
    assert {path.rpartition("/")[2] for path in Flaky.once} == {"manifest.json", "blocks.npy", "shards"}
    assert shards.hash == ShardSet(folder).hash
    Flaky.short_index = 99
    with pytest.raises(InputError, match="genes.mean.npy: 5[0-9]* bytes, the manifest says"):
        shards.gene_column("mean")
    shards.close()


class NoCredentialsError(Exception):
    """As botocore has it."""


@pytest.mark.parametrize(
    "raised, n, told",
    [
        (ConnectionResetError, 5, "reading failed 5 times, at last: ConnectionResetError: no answer"),
        (RuntimeError, 5, "reading failed 5 times, at last: RuntimeError: no answer"),
        (PermissionError, 1, r"the store refuses access \(PermissionError: no answer\). Check its credentials"),
        (NoCredentialsError, 1, "the store refuses access"),
    ],
)
def test_a_manifest_that_can_not_be_read_is_tried_five_times_and_named(remote, tmp_path, monkeypatch, raised, n, told):
    """But once where no other try would help. Another start may help where the store failed, as the exit code says."""
    n_tries = []

    def fails(*_, **__):
        n_tries.append(1)
        raise raised("no answer")

    monkeypatch.setattr(Flaky, "open", fails)
    with pytest.raises(InputError, match=f"^flaky://bucket/manifest.json: {told}") as error:
        ShardSet(remote[0], cache_folder=str(tmp_path / "cache"))
    assert isinstance(error.value, Busy) == (n == 5)
    assert len(n_tries) == n


def test_closing_does_not_wait_for_a_read_that_keeps_failing(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(read_shards, "BACK_OFF_S", 30.0)
    url, _ = remote
    Flaky.failures = 99
    config = LoaderConfig(url, lanes=4, cache_folder=str(tmp_path / "cache"))
    loader = CellLoader(config, global_batch=60, micro_batch=60)
    running = loader.feed.start(loader.feed.plans_from(0), 1)
    while not Flaky.reads:
        time.sleep(0.01)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5
    assert running.thread is not None
    assert not running.thread.is_alive()


def test_closing_while_a_block_is_fetched_touches_no_file_that_others_open(remote, tmp_path, monkeypatch):
    """The block is kept in the cache when it is there, though the loader closed meanwhile and another thread's file has
    got the number that the cache's had."""
    url, _ = remote
    started, go, cat_file = threading.Event(), threading.Event(), Flaky.cat_file

    def slow(self, path, start=None, end=None, **kwargs):
        if str(path).endswith(".tar"):
            started.set()
            assert go.wait(20)
        return cat_file(self, path, start, end, **kwargs)

    monkeypatch.setattr(Flaky, "cat_file", slow)
    loader = CellLoader(
        LoaderConfig(url, lanes=4, cache_folder=str(tmp_path / "cache")), global_batch=60, micro_batch=60
    )
    before = descriptors()
    loader.feed.start(loader.feed.plans_from(0), 1)
    assert started.wait(10)
    closing = threading.Thread(target=loader.close)
    closing.start()
    while not (closed := before - descriptors()):
        time.sleep(0.001)
    (number,) = map(int, closed)
    with open(tmp_path / "checkpoint", "w+b") as other:
        other.write(b"whole")
        other.flush()
        if is_another := other.fileno() != number:  # it may have got the number by itself
            os.dup2(other.fileno(), number)
        go.set()
        closing.join()
        loader.cells.close()  # by its owner too
        assert os.fstat(number).st_size == 5
        if is_another:
            os.close(number)
    again = ShardSet(url, cache_folder=str(tmp_path / "cache"), cache_bytes=10**9)
    for block in range(17):
        again.fetch(block)
    assert len(Flaky.reads) == len(set(Flaky.reads)) == 17
    again.close()


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_a_full_disk_ends_writing_to_the_cache_not_reading_from_it(remote, tmp_path, monkeypatch, capsys):
    url, folder = remote
    shards = ShardSet(url, cache_folder=str(tmp_path / "cache"), cache_bytes=10**9)
    for block in range(10):
        shards.fetch(block)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    local, n_reads = ShardSet(folder), len(Flaky.reads)
    for block in (11, *range(10), 11):
        np.testing.assert_array_equal(shards.fetch(block), local.fetch(block))
    assert len(Flaky.reads) == n_reads + 2  # both of the block that found no room
    assert capsys.readouterr().err.count("No space left on device. Nothing more is cached") == 1
    local.close()
    shards.close()


def test_the_index_of_a_remote_set_is_cached_whole_or_not_at_all(remote, tmp_path):
    url, _ = remote
    cache = tmp_path / "cache"
    ShardSet(url, cache_folder=str(cache)).close()
    index = next(cache.rglob("blocks.npy"))
    index.write_bytes(index.read_bytes()[:-1])  # as a full disk leaves it
    shards = ShardSet(url, cache_folder=str(cache))
    assert len(shards.blocks) == 17
    shards.close()
    data = bytearray(index.read_bytes())
    data[200] ^= 1  # of the right size, but damaged
    index.write_bytes(data)
    shards = ShardSet(url, cache_folder=str(cache))
    assert len(shards.blocks) == 17
    shards.close()
    with pytest.raises(InputError, match="cache_folder"):
        ShardSet(url)


@pytest.mark.parametrize("taken", ["", "HASH", "HASH/index", "HASH/blocks.bin"])
def test_a_cache_folder_that_can_not_be_used_is_refused_by_name(remote, tmp_path, taken):
    """A file where a folder is to be, or the other way round."""
    url, folder = remote
    cache, local = tmp_path / "cache", ShardSet(folder)
    at = cache / taken.replace("HASH", local.hash[:16])
    at.parent.mkdir(parents=True, exist_ok=True)
    if taken.endswith(".bin"):
        at.mkdir()
    else:
        at.touch()
    with pytest.raises(InputError, match=f"^cache_folder={cache}: .*. Give a local folder that can be written"):
        ShardSet(url, cache_folder=str(cache), cache_bytes=10**9)
    local.close()


@pytest.mark.parametrize("path", ["index/cells.condition.type.npy", "index/cells.row.npy", "index/genes.mean.npy"])
def test_a_flipped_bit_in_any_column_is_named_at_its_first_use(tmp_path, path):
    folder = write_set(tmp_path / "set", known_cells())
    data = bytearray((folder / path).read_bytes())
    data[-1] ^= 1
    (folder / path).write_bytes(data)
    kind, name = path.removeprefix("index/").removesuffix(".npy").split(".", 1)
    shards = ShardSet(str(folder))
    with pytest.raises(InputError, match=f"{path}: its SHA-256 is not that of the manifest"):
        shards.cell_column(name) if kind == "cells" else shards.gene_column(name)
    shards.close()


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(read_shards, "OPEN_FILES", 2)
    folder = str(write_set(tmp_path / "set", known_cells(), block_cells=8))
    shards = ShardSet(folder)
    before = len(os.listdir("/proc/self/fd"))
    for block in range(len(shards.blocks)):
        shards.fetch(block)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "path, change, text",
    [
        ("index/blocks.npy", lambda d: d[:-1] + bytes([d[-1] ^ 1]), "blocks.npy: its SHA-256"),
        ("index/blocks.npy", lambda d: d[:-1], "blocks.npy: .* bytes, the manifest says"),
        ("manifest.json", lambda d: d.replace(b'"version": 3', b'"version": 4'), "version 4 is unknown"),
        ("manifest.json", lambda d: d.replace(b'"version": 3', b'"version": 2'), "version 2. .* write the set again"),
        ("manifest.json", lambda d: d.replace(b'"g17"', b'"g17x"'), "its SHA-256 is not that of what it says"),
        ("manifest.json", None, "no manifest.json"),
    ],
)
def test_what_is_no_whole_set_is_refused(tmp_path, path, change, text):
    folder = write_set(tmp_path / "set", known_cells())
    if change is None:
        (folder / path).unlink()
    else:
        (folder / path).write_bytes(change((folder / path).read_bytes()))
    with pytest.raises(InputError, match=text):
        ShardSet(str(folder))


def test_a_manifest_of_another_set_does_not_fit_these_shards(tmp_path):
    """The index of one set beside the shards of another: every block is checked against it."""
    a, b = (write_set(tmp_path / str(k), known_cells(seed=k), block_cells=32) for k in (0, 1))
    shutil.rmtree(a / "shards")
    shutil.copytree(b / "shards", a / "shards")
    manifest = json.loads((a / "manifest.json").read_text())
    for entry in manifest["shards"]:
        entry["bytes"] = (a / entry["path"]).stat().st_size
    (a / "manifest.json").write_text(json.dumps(manifest))
    shards = ShardSet(str(a))
    with pytest.raises(InputError, match="damaged or was changed"):
        shards.fetch(0)
    shards.close()
