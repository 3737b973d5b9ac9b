"""Damaged, changed and missing shards are named by the first batch that needs them."""

import errno
import os

import pytest
import torch

from data_pipeline.format.read_shards import ShardSet
from scldm.errors import InputError
from tests.data_pipeline.small_sets import write_set
from tests.data_pipeline.streams import open_loader


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


def test_a_file_system_that_answers_in_pieces_is_read_to_the_end(folder, monkeypatch):
    """As network and FUSE file systems may; a file that ends too early is damage all the same."""
    shards, preadv = ShardSet(folder), os.preadv
    whole = shards.fetch(4).tobytes()
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:100]], offset))
    assert len(whole) > 200
    assert shards.fetch(4).tobytes() == whole
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: 0)
    with pytest.raises(InputError, match="block 4: its CRC-32 is not"):
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
