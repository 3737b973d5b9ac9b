"""Latent shards: the cells of the cell set in its order, written by any number of ranks, interrupted at will."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.convert.verify import verify_shards
from data_pipeline.format import schema
from data_pipeline.format.latent_block import LatentSlots, encode_latent_block
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LatentLoader, LoaderConfig, StreamConfig, shard_batches
from data_pipeline.write_latents import LatentWriter, precision_of
from scldm.errors import InputError
from scldm.given_json import SEAL, sealed
from tests.data_pipeline.small_sets import known_cells, write_set

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 2)


def encode(batch):
    """A stand-in whose latents say which cell they are of."""
    return (batch.cell_ids_B2[:, 1].numpy()[:, None, None] / 1_000_003 + np.arange(6).reshape(SHAPE)).astype(np.float32)


def write(writer, shards):
    for shard in shards:
        writer.write_shard(shard, (encode(b) for b in shard_batches(writer.cells, shard, micro_batch=20)))


def writer_of(out, cells, vae_hash="model", genes=None):
    """One that has begun, as the first rank's does before any writes."""
    writer = LatentWriter(out, cells, vae_hash, SHAPE, genes)
    with writer.begun():
        return writer


@pytest.fixture
def cells(tmp_path):
    shards = ShardSet(str(write_set(tmp_path / "cells", known_cells(), block_cells=32)))
    yield shards
    shards.close()


@pytest.mark.heavy
def test_latents_stand_where_their_cells_stood(cells, tmp_path):
    out = tmp_path / "latents"
    first = writer_of(out, cells)
    missing = first.missing_shards()
    assert len(missing) == 6
    write(first, missing[:2])
    (out / cells.manifest.shards[3].path).write_bytes(b"half a shard")  # killed while the note was not written
    second = writer_of(out, cells)
    assert second.missing_shards() == missing[2:]
    with pytest.raises(AssertionError, match="4 shards are missing"):
        second.finish()
    ranks = [LatentWriter(out, cells, "model", SHAPE) for _ in range(3)]
    for rank, writer in enumerate(ranks):
        write(writer, missing[2:][rank::3])
    ranks[0].finish()
    ranks[0].finish()
    assert LatentWriter(out, cells, "model", SHAPE).missing_shards() == []
    assert not (out / "parts").exists()

    latents = LatentLoader(StreamConfig(str(out), lanes=4), global_batch=60, micro_batch=30)
    counts = CellLoader(LoaderConfig(cells.url, lanes=4), global_batch=60, micro_batch=30)
    assert latents.latent_shape == SHAPE
    for _ in range(8):  # the same order as the cells, to the end of an epoch and beyond
        for a, b in zip(next(latents), next(counts)):
            np.testing.assert_array_equal(a.latent_BLZ.numpy(), encode(b))
            assert a.cell_ids_B2.equal(b.cell_ids_B2)
            assert a.library_size_all_B.equal(b.library_size_all_B)
            assert a.weight_B.equal(b.weight_B)
            assert a.conditions["donor"].equal(b.conditions["donor"])
    state = latents.state()
    expected = [[b.cell_ids_B2.tolist() for b in next(latents)] for _ in range(6)]
    ranks = [LatentLoader(latents.config, rank=r, world_size=2, global_batch=60, micro_batch=30) for r in range(2)]
    for rank in ranks:
        rank.load_state(state)
    for step in expected:
        batches = [b for rank in ranks for b in next(rank)]
        assert [b.cell_ids_B2.tolist() for b in batches] == step
        for b in batches:
            np.testing.assert_array_equal(b.latent_BLZ.numpy(), encode(b))
    for rank in ranks:
        rank.close()
    train = np.concatenate([encode(b) for k in range(5) for b in shard_batches(cells, k, micro_batch=32)])
    np.testing.assert_allclose(latents.manifest.extra["mean"], train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(latents.manifest.extra["std"], train.std(0), rtol=1e-4)
    assert latents.manifest.statistics == cells.manifest.statistics
    latents.close()
    counts.close()


def test_any_number_of_ranks_writes_the_same_bytes(cells, tmp_path):
    for name, pieces in (("one", 1), ("many", 4)):
        writer = writer_of(tmp_path / name, cells)
        for rank in range(pieces):
            write(writer, writer.missing_shards()[rank :: pieces - rank])
        write(writer, writer.missing_shards())
        writer.finish()
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert len(files) == 16  # 6 shards, 9 files of the index, the manifest
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "many" / path).read_bytes(), path


@pytest.mark.parametrize("done", [False, True])
def test_latents_of_another_model_are_refused(cells, tmp_path, done):
    writer = writer_of(tmp_path / "out", cells)
    if done:
        write(writer, writer.missing_shards())
        writer.finish()
    with pytest.raises(InputError, match="vae is 'model', not 'other'"):
        LatentWriter(tmp_path / "out", cells, "other", SHAPE)


@pytest.mark.parametrize("done", [False, True])
def test_latents_of_other_gene_sets_are_refused(cells, tmp_path, done):
    """Two widths of one policy, or what is done with cells that have more genes, are other latents."""
    writer = writer_of(tmp_path / "out", cells, genes=GeneSetConfig("expressed", 64, overflow="sample"))
    if done:
        write(writer, writer.missing_shards())
        writer.finish()
    for other in (GeneSetConfig("expressed", 65, overflow="sample"), GeneSetConfig("expressed", 64)):
        with pytest.raises(InputError, match="holds latents of another run: genes is .*'sample'"):
            LatentWriter(tmp_path / "out", cells, "model", SHAPE, other)


@pytest.mark.parametrize("done", [False, True])
def test_latents_of_two_precisions_are_never_one_set(cells, tmp_path, done):
    """One that does not say its own is of no precision."""
    writer = writer_of(tmp_path / "out", cells)
    if done:
        write(writer, writer.missing_shards())
        writer.finish()
    LatentWriter(tmp_path / "out", cells, "model", SHAPE, precision="float32")
    with pytest.raises(InputError, match=r"precision is 'float32', not 'bfloat16'\. Give precision=float32, or"):
        LatentWriter(tmp_path / "out", cells, "model", SHAPE, precision="bfloat16")
    name = schema.MANIFEST if done else "parts/set.json"
    told = json.loads((tmp_path / "out" / name).read_text())
    assert (told["extra"] if done else told).pop("precision") == "float32"
    (tmp_path / "out" / name).write_text(json.dumps(sealed({k: told[k] for k in told if k != SEAL})))
    with pytest.raises(InputError, match=r"precision is None, not 'float32'\. Give another folder, or"):
        LatentWriter(tmp_path / "out", cells, "model", SHAPE, precision="float32")


def test_notes_of_unfinished_latents_that_were_changed_are_refused_by_their_names(cells, tmp_path):
    """Both as a resumed encode acts on them. A shard whose note is removed is encoded again."""
    writer = writer_of(tmp_path / "out", cells)
    write(writer, writer.missing_shards())
    whole = writer.parts / "set.json"
    kept = whole.read_text()
    whole.write_text(kept.replace('"model"', '"other"'))
    for read in (lambda: writer_of(tmp_path / "out", cells, "other"), lambda: precision_of(str(tmp_path / "out"))):
        with pytest.raises(InputError, match=r"parts/set\.json: its SHA-256 is not that .*changed$"):
            read()
    whole.write_text(kept)
    part = writer.parts / "000002.json"
    told = json.loads(part.read_text())
    told["sum"][0][0] += 1.0
    part.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"parts/000002\.json: its SHA-256 .*\. Remove this file and run"):
        writer.finish()
    part.unlink()
    assert writer.missing_shards() == [2]
    write(writer, [2])
    writer.finish()


@pytest.mark.heavy
def test_what_a_kill_left_half_written_is_gone_from_the_set(cells, tmp_path):
    out, script = tmp_path / "out", Path(__file__).with_name("killed_writer.py")
    killed = subprocess.run([sys.executable, script, cells.url, out], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((out / "shards").iterdir())) == 1
    writer = writer_of(out, cells)
    assert writer.missing_shards() == list(range(6))
    write(writer, writer.missing_shards())
    writer.finish()
    assert sorted(f"shards/{path.name}" for path in (out / "shards").iterdir()) == sorted(
        shard.path for shard in cells.manifest.shards
    )


def test_a_shard_has_its_name_when_its_bytes_are_on_the_disk(cells, tmp_path, monkeypatch):
    """Else a machine that goes down may leave the name, and a note that says that it is whole, without the bytes."""
    writer, synced = writer_of(tmp_path / "out", cells), []
    shard = tmp_path / "out" / cells.manifest.shards[0].path
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_size, shard.exists())))
    write(writer, [0])
    assert synced[0] == (shard.stat().st_size, False)
    assert len(synced) == 4  # and the note; with the folder of each


def test_one_command_writes_latents_at_a_time(cells, tmp_path):
    with LatentWriter(tmp_path / "out", cells, "model", SHAPE).begun():
        other = LatentWriter(tmp_path / "out", cells, "model", SHAPE)
        with pytest.raises(InputError, match="another process is writing these latents"), other.begun():
            pass


def test_latents_that_are_not_finite_or_not_as_many_as_cells_are_refused(cells, tmp_path):
    writer = writer_of(tmp_path / "out", cells)
    n = cells.manifest.shards[0].n_cells
    bad = np.zeros((n, *SHAPE))
    bad[50, 1, 1] = np.nan
    with pytest.raises(InputError, match="train-000000.tar, block 1: not finite"):
        writer.write_shard(0, bad)
    for wrong in (n - 1, n + 1):
        with pytest.raises(AssertionError, match="than its 96 cells"):
            writer.write_shard(0, np.zeros((wrong, *SHAPE)))
    assert 0 in writer.missing_shards()


def test_a_damaged_block_of_latents_and_a_set_of_another_kind_are_named(cells, tmp_path):
    writer = writer_of(tmp_path / "out", cells)
    write(writer, writer.missing_shards())
    writer.finish()
    with pytest.raises(InputError, match="a set of cells, not of latents"):
        LatentLoader(StreamConfig(cells.url), global_batch=60, micro_batch=60)
    with pytest.raises(InputError, match="a set of latents, not of cells"):
        CellLoader(LoaderConfig(str(tmp_path / "out")), global_batch=60, micro_batch=60)
    shard = tmp_path / "out" / json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"][0]["path"]
    data = bytearray(shard.read_bytes())
    data[900] ^= 1
    shard.write_bytes(data)
    with (
        LatentLoader(StreamConfig(str(tmp_path / "out")), global_batch=60, micro_batch=60) as loader,
        pytest.raises(InputError, match="train-000000.tar, block 0"),
    ):
        list(loader.one_pass())


def test_latents_for_a_gpu_are_pinned(cells, tmp_path, monkeypatch):
    writer = writer_of(tmp_path / "latents", cells)
    write(writer, writer.missing_shards())
    writer.finish()
    made = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: made.append(tensor.clone()) or made[-1])
    config = StreamConfig(str(tmp_path / "latents"), prefetch=0)
    with LatentLoader(config, global_batch=60, micro_batch=60, device="cuda") as loader:
        (batch,) = next(loader)
    parts = [part for part in vars(batch).values() if isinstance(part, torch.Tensor)] + list(batch.conditions.values())
    assert {id(part) for part in parts} == {id(part) for part in made}


@pytest.fixture
def latent_slots(cells, tmp_path):
    writer = writer_of(tmp_path / "out", cells)
    write(writer, writer.missing_shards())
    writer.finish()
    return LatentSlots(schema.read_manifest(str(tmp_path / "out")), 1)


def encoded(n=8, types=2, donors=299, conditions=2):
    labels = [np.full(n, types, np.uint8), np.full(n, donors, np.uint16)][:conditions]
    latents = np.zeros((n, *SHAPE))
    return encode_latent_block(
        latents, split=0, total_counts=np.ones(n), sources=np.zeros(n), rows=np.arange(n), conditions=labels
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "data, text",
    [
        (encoded(types=250), "damaged: a label id of 'type' is beyond its 3 labels"),
        (encoded(donors=300), "damaged: a label id of 'donor' is beyond its 300 labels"),
        (encoded(conditions=1), "8 cells, 1 conditions do not fit the manifest"),
        (encoded(n=33), "33 cells, 2 conditions do not fit the manifest"),
        (encoded() + bytes(8), "damaged: 440 bytes, its sections are 432"),
        (encoded()[:-8], "damaged: buffer is smaller"),
        (encoded().replace(b"\1\2\0\0\0\0\0\0", b"\3\2\0\0\0\0\0\0"), r"damaged: condition widths \[3, 2\]"),
    ],
    ids=["label", "label 2", "conditions", "cells", "long", "short", "widths"],
)
def test_a_block_of_latents_that_is_none_of_the_set_is_refused(latent_slots, data, text):
    latent_slots.fill(0, np.frombuffer(encoded(), np.uint8), "sound")
    assert latent_slots.labels[0, 7].tolist() == [2, 299]
    with pytest.raises(InputError, match=f"the liar: {text}"):
        latent_slots.fill(0, np.frombuffer(data, np.uint8), "the liar")


def test_verify_finds_what_is_wrong_with_latents(cells, tmp_path):
    """Also moments that were changed together with the hash."""
    out = tmp_path / "latents"
    writer = writer_of(out, cells)
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards():
        n_cells = cells.manifest.shards[shard].n_cells
        writer.write_shard(shard, rng.normal(size=(n_cells, *SHAPE)).astype(np.float32))
    writer.finish()

    def faults():  # but for the order: these cells were never shuffled
        return [fault for fault in verify_shards(str(out)).faults if "order of its seed" not in fault.what]

    assert faults() == []
    path = out / "manifest.json"
    whole = json.loads(path.read_text())
    for name in ("mean", "std"):
        document = json.loads(json.dumps({key: of for key, of in whole.items() if key != "sha256"}))
        document["extra"][name][0][0] += 0.5
        path.write_text(json.dumps(sealed(document)))
        (fault,) = faults()
        assert str(fault) == f"manifest.json: extra.{name} is not that of the training cells' latents"
    path.write_text(json.dumps(whole))
    shard = out / cells.manifest.shards[1].path
    data = bytearray(shard.read_bytes())
    data[512 + 200] ^= 1
    shard.write_bytes(data)
    (fault,) = faults()
    assert fault.what == "its checksum is not the index's: changed or damaged"
