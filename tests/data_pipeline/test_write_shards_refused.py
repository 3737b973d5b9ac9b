"""What can't become a shard set is refused in a line that names it: counts, settings, places."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import scipy.sparse as sp

from data_pipeline.convert import stages, write_shards
from scldm.errors import InputError
from tests.data_pipeline.atlases import FilterConfig, SplitConfig, atlas, config, counts

write = write_shards.write_shards


@pytest.mark.heavy
def test_another_command_on_the_same_folder_is_refused(tmp_path, source, monkeypatch):
    _, path = source
    command = config(tmp_path / "set", path)
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "finish_set", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(command)
    with pytest.raises(
        InputError, match=r"unfinished work of another command: seed: was 0, is 1; split.test: was 0.1, is 0"
    ):
        write(replace(command, seed=1, split=SplitConfig(test=0.0)))
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"atlas.h5ad: has changed since"):
        write(command)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/stranger").touch()
    with pytest.raises(InputError, match=r"holds other files, such as stranger"):
        write(replace(command, out=str(tmp_path / "other")))
    write(replace(command, out=str(tmp_path / "done")))
    with pytest.raises(InputError, match=r"holds the set of another command: codec: was 'zstd', is 'lz4'"):
        write(replace(command, out=str(tmp_path / "done"), codec="lz4"))


@pytest.mark.parametrize(
    "value, fault", [(-2, "negative"), (1.5, "fractional"), (np.nan, "not a number"), (np.inf, "infinite")]
)
@pytest.mark.parametrize("storage", ["csr", "dense"])
def test_what_is_no_count_is_named(tmp_path, value, fault, storage, monkeypatch):
    """Beyond what a look at the file's values sees: the stream checks every one."""
    monkeypatch.setattr("data_pipeline.convert.source_h5ad.PROBE", 10)
    adata = atlas()
    x = counts(adata.n_obs, adata.n_vars).toarray()
    x[7, 3] = value
    adata.X = sp.csr_matrix(x) if storage == "csr" else x
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=rf"a.h5ad: X: cell cell7 \(row 7\), gene GENE3: {value}.*\({fault}\)"):
        write(config(tmp_path / "set", tmp_path / "a.h5ad"))
    assert not (tmp_path / "set/manifest.json").exists()


def test_cells_without_counts(tmp_path):
    adata = atlas(300)
    x = counts(adata.n_obs, adata.n_vars).toarray()
    x[5], x[9] = 0, 0
    adata.X = sp.csr_matrix(x)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=r"cell cell5 \(row 5\) has no counts. filter"):
        write(config(tmp_path / "set", tmp_path / "a.h5ad"))
    manifest = write(config(tmp_path / "set2", tmp_path / "a.h5ad", filter=FilterConfig(min_genes=1)))
    assert manifest is not None
    assert (manifest.n_cells, manifest.report["cells_with_too_few_genes"]) == (298, 2)


def test_no_space_left(tmp_path, source, monkeypatch):
    _, path = source
    take = stages.TarWriter.add

    def full(self, name, data):
        if name.startswith("00000003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return take(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(stages.TarWriter, "add", full)
        with pytest.raises(InputError, match="no space left"):
            write(config(tmp_path / "set", path))
    assert not list((tmp_path / "set").glob("shards/*"))
    assert not list((tmp_path / "set").rglob(".*.tar*"))
    assert write(config(tmp_path / "set", path)) is not None
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(InputError, match=r"no space left: about \d+(\.\d+)? [kM]B are needed for .*, 1 kB are free"):
        write(config(tmp_path / "set2", path))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"memory": "300MiB"}, r"memory=300MiB is too little for workers=1: at least 384MiB"),
        ({"memory": "much"}, r"memory='much' is no amount of memory"),
        ({"memory": "infGiB"}, r"memory='infGiB' is no amount of memory"),
        ({"memory": "1e999"}, r"memory='1e999' is no amount of memory"),
        ({"task": "3/3"}, r"task='3/3' must be i/n"),
        ({"task": "²/3"}, r"task='²/3' must be i/n"),
        ({"shard_cells": 100}, r"shard_cells=100 must be a multiple of block_cells=32"),
        ({"conditions": ("donor", "donor")}, r"conditions: 'donor' stands twice"),
        ({"conditions": ("..",)}, r"conditions: '..' can't be part of a file name"),
        ({"conditions": ("a/b",)}, r"conditions: 'a/b' can't be part of a file name"),
        ({"conditions": ("c" * 101,)}, r"conditions: 'c{101}' can't be part of a file name"),
        ({"conditions": ("n_cells",)}, r"conditions: 'n_cells' has another meaning"),
        ({"conditions": ("library_size",)}, r"conditions: 'library_size' has another meaning"),
        ({"conditions": ("donour",)}, r"obs has no column 'donour'. It has cell_type, donor, batch"),
        ({"max_labels": 2}, r"obs column 'cell_type' has 3 labels for 600 cells.*max_labels"),
        ({"source": {"obs_filter": "cell_type == 'X'"}}, r"obs_filter=.* selects no cell"),
        ({"source": {"obs_filter": "cell_tpye == 'B'"}}, r"obs_filter=.* can't be applied"),
        ({"source": {"var_filter": "index == 'X'"}}, r"no gene is left by source.var_filter"),
        ({"filter": FilterConfig(min_cells=10_000)}, r"filter.min_cells=10000: no gene"),
        ({"filter": FilterConfig(min_genes=10_000)}, r"no cell is left by filter.min_genes=10000"),
        ({"filter": FilterConfig(gene_list="missing.txt")}, r"filter.gene_list: missing.txt: no such file"),
    ],
)
def test_settings_that_can_not_work(tmp_path, source, settings, message):
    with pytest.raises(InputError, match=message):
        write(config(tmp_path / "set", source[1], **settings))
    assert not (tmp_path / "set/manifest.json").exists()


def test_a_place_that_can_not_be_written(tmp_path, source, monkeypatch):
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file", r"file/manifest.json: Not a directory"),
        (tmp_path / "file/set", r"file/set/manifest.json: Not a directory"),
    ):
        with pytest.raises(InputError, match=message):
            write(config(out, source[1]))
    with pytest.raises(InputError, match="bogus://set: Protocol not known: bogus"):
        write(replace(config(tmp_path / "set", source[1]), out="bogus://set"))
    with pytest.raises(InputError, match=r"file/\.scldm-\w+: Not a directory"):
        write(replace(config(tmp_path / "set", source[1]), work=str(tmp_path / "file")))

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "set/shards"))

    monkeypatch.setattr(stages, "deliver", refuse)
    with pytest.raises(InputError, match=r"set/shards: Permission denied"):
        write(config(tmp_path / "set", source[1]))


def test_what_an_object_store_answers_is_said_in_a_line(tmp_path, source, monkeypatch):
    class ClientError(Exception):  # the store's clients derive theirs from Exception alone
        pass

    def put_file(*args, **kwargs):
        raise ClientError("An error occurred (SlowDown)\nwhen calling PutObject")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", put_file)
    wanted = replace(config(tmp_path, source[1]), out="memory://shop/set", work=str(tmp_path / "work"))
    with pytest.raises(InputError, match=r"^memory://shop/set: ClientError: .*SlowDown\) when calling PutObject$"):
        write(wanted)
