"""Atlas to shard set: every count exact, the same bytes whoever does it, and nothing that looks whole and isn't."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata
import fsspec
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from webdataset.tariterators import group_by_keys, tar_file_expander

import data_pipeline
from data_pipeline import stages, write_shards
from data_pipeline.schema import read_manifest
from data_pipeline.stages import Worker
from data_pipeline.write_soma import SomaWriteConfig, write_soma
from scldm.errors import InputError
from tests.data_pipeline.atlases import FilterConfig, SplitConfig, atlas, config, counts, digest, read_set, row_counts

write = write_shards.write_shards


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[anndata.AnnData, Path]:
    adata = atlas()
    path = tmp_path_factory.mktemp("source") / "atlas.h5ad"
    adata.write_h5ad(path)
    return adata, path


def holds(cells: dict, adata: anndata.AnnData, number: int = 0) -> None:
    assert sorted(cells) == [(number, row) for row in range(adata.n_obs)]
    for (_, row), cell in cells.items():
        assert cell["counts"] == row_counts(adata, row)
        assert cell["labels"]["cell_type"] == adata.obs["cell_type"].iloc[row]


# --- exact, from every storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "storage", ["csr", "csc", "dense", "int64", "layers/counts", "raw/X", "unsorted", "soma", "census"]
)
def test_every_count_of_every_cell(tmp_path, source, storage):
    adata, path = source
    stored = adata.copy()
    if storage == "csc":
        stored.X = sp.csc_matrix(stored.X)
    elif storage == "dense":
        stored.X = stored.X.toarray()
    elif storage == "int64":
        stored.X = stored.X.astype(np.int64)
    elif storage == "layers/counts":
        stored.layers["counts"] = stored.X.copy()
        stored.X = stored.X * 0.37
    elif storage == "raw/X":
        stored.raw = stored.copy()
        stored = stored[:, :50].copy()
        stored.X = stored.X * 0.37
    elif storage == "unsorted":
        x = stored.X
        for a, b in zip(x.indptr, x.indptr[1:]):
            x.indices[a:b], x.data[a:b] = x.indices[a:b][::-1].copy(), x.data[a:b][::-1].copy()
    if storage in ("soma", "census"):
        write_soma(SomaWriteConfig(h5ad=str(path), out=str(tmp_path / "soma")))
        path = tmp_path / "soma"
        path = path / "census_data/homo_sapiens" if storage == "soma" else path
    else:
        path = tmp_path / "stored.h5ad"
        stored.write_h5ad(path)
    manifest = write(config(tmp_path / "set", path))
    holds(read_set(str(tmp_path / "set"))[1], adata)
    assert manifest is not None
    assert manifest.sources[0]["layer"] == {"soma": "raw", "census": "raw"}.get(
        storage, storage if "/" in storage else "X"
    )
    assert manifest.statistics.largest_count == 70_000


def test_splits_statistics_and_order(tmp_path, source):
    """Against pandas, from the source alone."""
    adata, path = source
    x = adata.X.astype(np.float64)
    split = SplitConfig(validation=0.2, test=0.2, stratify=("cell_type",))
    write(config(tmp_path / "set", path, split=split, conditions=("cell_type", "batch")))
    manifest, cells, order = read_set(str(tmp_path / "set"))
    obs = adata.obs.assign(split=[cells[0, row]["split"] for row in range(adata.n_obs)])
    shares = obs.groupby("cell_type", observed=True)["split"].value_counts(normalize=True).unstack()
    np.testing.assert_allclose(shares[["train", "validation", "test"]], [[0.6, 0.2, 0.2]] * 3, atol=0.01)
    assert manifest.conditions.labels["batch"] == ("0", "1", "2")

    total = np.asarray(x.sum(axis=1)).ravel()
    train = (obs["split"] == "train").to_numpy()
    by_type = {t.by: t for t in manifest.statistics.library_sizes}
    assert set(by_type) == {("cell_type", "batch"), ("cell_type",), ("batch",), ()}
    for k, label in enumerate(manifest.conditions.labels["cell_type"]):
        logs = np.log(total[train & (obs["cell_type"] == label).to_numpy()])
        table = by_type[("cell_type",)]
        assert table.ids[k] == (k,)
        assert table.n[k] == len(logs)
        np.testing.assert_allclose((table.log_mean[k], table.log_std[k]), (logs.mean(), logs.std()), rtol=1e-9)
    mean = np.load(tmp_path / "set/index/genes.mean.npy")
    np.testing.assert_allclose(mean, np.asarray(x[train].mean(axis=0)).ravel(), rtol=1e-6)
    fraction = np.load(tmp_path / "set/index/genes.fraction_expressed.npy")
    np.testing.assert_allclose(fraction, np.asarray((x[train] > 0).mean(axis=0)).ravel(), rtol=1e-6)
    stored = np.load(tmp_path / "set/index/cells.total_counts.npy")
    np.testing.assert_array_equal(stored, total[[row for _, row in order]])
    # shuffled as a whole: neighbours in the set are no neighbours in the source
    rows = np.array([row for _, row in order[: manifest.splits[0].n_cells]])
    assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.15


def test_the_reader_in_the_readme(tmp_path, source):
    """The very text of the README reads the set; and any WebDataset reader lists it."""
    adata, path = source
    write(config(tmp_path / "set", path))
    text = (Path(data_pipeline.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"<!-- a test runs this text -->\n```python\n(.*?)```", text, re.S)
    scope: dict = {}
    exec(code, scope)
    read = 0
    for split in ("train", "validation", "test"):
        for _, row, columns, values in scope["cells"](str(tmp_path / "set"), split):
            assert dict(zip(adata.var_names[columns], values.tolist())) == row_counts(adata, int(row))
            read += 1
    assert read == adata.n_obs
    assert len(code.splitlines()) <= 30
    with open(tmp_path / "set/shards/train-000000.tar", "rb") as tar:
        samples = list(group_by_keys(tar_file_expander([{"url": "train", "stream": tar}])))
    assert [s["__key__"] for s in samples] == ["00000000", "00000001", "00000002", "00000003"]
    assert all("block" in s for s in samples)


# --- the same bytes ------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_memory_or_tasks(tmp_path, source, monkeypatch, capsys):
    """Chunks of a few rows, runs of a few chunks, units of 100 cells: every boundary is met."""
    _, path = source
    settings = {"filter": FilterConfig(min_genes=100, min_cells=95, n_top_genes=300), "source": {"layer": "X"}}
    write(config(tmp_path / "whole", path, **settings))
    monkeypatch.setattr("data_pipeline.plan.UNIT_CELLS", 100)
    monkeypatch.setattr("data_pipeline.source_h5ad.CHUNK_BYTES", 20_000)
    arena = stages.Arena.__init__
    monkeypatch.setattr(stages.Arena, "__init__", lambda self, budget: arena(self, 10_000))
    write(config(tmp_path / "small", path, **settings))
    assert digest(tmp_path / "small") == digest(tmp_path / "whole")

    command = config(tmp_path / "tasks", path, **settings)
    for turn in range(5):  # scan, clip, scatter, gather, each waiting for the last; then nothing is left
        results = [write(replace(command, task=f"{i}/3")) for i in range(3)]
        assert results == [None] * 3, f"turn {turn}"
    assert not (tmp_path / "tasks/manifest.json").exists()
    assert "every task's share is done" in capsys.readouterr().out
    assert write(replace(command, task="0/3", finish=True)) is not None
    assert digest(tmp_path / "tasks") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(tmp_path, source):
    _, path = source
    soma = tmp_path / "soma"
    write_soma(SomaWriteConfig(h5ad=str(path), out=str(soma)))
    for name, workers in (("one", 1), ("two", 2)):
        write(config(tmp_path / name, soma, workers=workers))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def killed(task: tuple[str, int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_said_and_its_unit_done_by_the_next_run(tmp_path, source, monkeypatch):
    _, path = source
    command = config(tmp_path / "set", path, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "_do_unit", killed)
        with pytest.raises(InputError, match=r"scatter: a worker process died .* fewer workers than 2"):
            write(command)
    assert write(replace(command, workers=1)) is not None


KILLED = """
import sys, time
from data_pipeline import plan, stages
from launch.cli import main
plan.UNIT_CELLS = 50
work = stages.Worker.do
stages.Worker.do = lambda self, stage, unit: (time.sleep(0.02), work(self, stage, unit))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, source):
    _, path = source
    write(config(tmp_path / "whole", path, split=SplitConfig(stratify=("cell_type",))))
    words = ["shards", "write", f"out={tmp_path / 'killed'}", f"source.paths={path}", "conditions=cell_type"]
    words += ["block_cells=32", "shard_cells=128", "split.stratify=cell_type"]
    rng = np.random.default_rng(0)
    kills, status = 0, None
    while status is None or status < 0:
        assert kills < 40
        work = tmp_path / "killed/.work"
        before = files_of(work)
        process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.DEVNULL)
        while process.poll() is None and files_of(work) <= before:
            time.sleep(0.005)  # Python still starts
        # early at first: a quick machine is soon done; later and later: a busy one must come to its next file
        time.sleep(rng.uniform(0, 0.2 if kills < 3 else 0.9 + 0.1 * kills))
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        kills += status < 0
    assert status == 0
    assert kills >= 3
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def files_of(folder: Path) -> set[str]:
    """What lies in a folder that another process may be writing."""
    return {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}


def test_finished_work_is_not_repeated(tmp_path, source, monkeypatch):
    """The last step fails once; the second run does that step alone."""
    _, path = source
    command = config(tmp_path / "set", path)
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "finish_set", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(command)
    done: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "do", lambda self, stage, unit: done.append(stage))
        os.remove(tmp_path / "set/shards/train-000001.tar")  # a tar that went missing is not finished work
        with pytest.raises(AssertionError):
            write(command)
    assert done == ["gather"]
    assert write(command) is not None
    assert write(command) is not None  # complete: says so, changes nothing
    assert not (tmp_path / "set/.work").exists()
    (tmp_path / "set/.work/runs").mkdir(parents=True)  # as an interrupted removal leaves it
    assert write(command) is not None
    assert not (tmp_path / "set/.work").exists()


@pytest.mark.parametrize("name", ["scratch", "set"])
def test_only_our_own_unfinished_work_is_removed(tmp_path, source, name, monkeypatch):
    """work= names the user's folder, or even the set's own; ours is one within it, found again after a kill."""
    _, path = source
    work = tmp_path / name
    work.mkdir()
    if name == "scratch":
        (work / "thesis.txt").touch()
    command = replace(config(tmp_path / "set", path), work=str(work))
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "finish_set", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(command)
    manifest = write(command)
    assert manifest is not None
    assert sorted(p.name for p in work.iterdir()) == (
        ["thesis.txt"] if name == "scratch" else ["index", "manifest.json", "shards"]
    )
    assert len(list((tmp_path / "set/shards").iterdir())) == len(manifest.shards)


def test_a_strangers_work_folder_is_left_alone(tmp_path, source):
    thesis = tmp_path / "set/.work/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    with pytest.raises(InputError, match=r"\.work: holds other files, such as thesis.txt; work=FOLDER"):
        write(config(tmp_path / "set", source[1]))
    assert thesis.exists()


# --- refusals ------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("data_pipeline.source_h5ad.PROBE", 10)
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
    with pytest.raises(InputError, match=r"cell cell5 \(row 5\) has no counts; filter.min_genes=1 drops such cells"):
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
    with pytest.raises(InputError, match=r"no space left: about 0\.\d GB are needed"):
        write(config(tmp_path / "set2", path))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"memory": "300MiB"}, r"memory=300MiB is too little for workers=1: at least 384MiB"),
        ({"memory": "much"}, r"memory='much' is no amount of memory"),
        ({"task": "3/3"}, r"task='3/3' must be i/n"),
        ({"shard_cells": 100}, r"shard_cells=100 must be a multiple of block_cells=32"),
        ({"conditions": ("donour",)}, r"obs has no column 'donour'; it has cell_type, donor, batch"),
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


# --- genes, elsewhere ----------------------------------------------------------------------------------------------


def test_chosen_genes_are_scanpys(tmp_path):
    """Cells with enough genes, genes in enough cells, the most variable ones of those; single cells with thousands of a
    gene make clipping decide."""
    rng = np.random.default_rng(0)
    x = rng.negative_binomial(2, 1 / (1 + rng.lognormal(-1, 1.5, 400)), (500, 400)).astype(np.float32)
    x[:40, 100:] = 0  # cells with few genes; some genes live in them alone
    x[40:, :20] = 0
    x[rng.choice(np.arange(40, 500), 60), rng.choice(np.arange(20, 400), 60)] = 3000
    x[:, 20] = 1
    adata = atlas(500, 400)
    adata.X = sp.csr_matrix(x)
    adata.write_h5ad(tmp_path / "a.h5ad")
    chosen = FilterConfig(min_genes=90, min_cells=10, n_top_genes=80)
    manifest = write(config(tmp_path / "set", tmp_path / "a.h5ad", filter=chosen))
    scanpy.pp.filter_cells(adata, min_genes=90)
    scanpy.pp.filter_genes(adata, min_cells=10)
    scanpy.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=80)
    top = adata[:, adata.var["highly_variable"]]
    assert manifest is not None
    assert 300 < manifest.n_cells == adata.n_obs < 500
    assert list(manifest.genes.ids) == list(top.var_names)
    assert manifest.report["genes"]["filter.min_cells"] == 400 - adata.n_vars > 0
    cells = read_set(str(tmp_path / "set"))[1]
    assert cells[0, 45]["counts"] == row_counts(top, list(adata.obs_names).index("cell45"))


def test_to_a_url(tmp_path, source):
    """The same bytes through fsspec; unfinished work stays here."""
    _, path = source
    write(config(tmp_path / "here", path))
    with pytest.raises(InputError, match="work must name a local folder"):
        write(replace(config(tmp_path, path), out="memory://bucket/set"))
    write(replace(config(tmp_path, path), out="memory://bucket/set", work=str(tmp_path / "work")))
    fs = fsspec.filesystem("memory")
    there = {name.removeprefix("/bucket/set/"): fs.cat(name) for name in fs.find("/bucket/set")}
    assert there == {p: (tmp_path / "here" / p).read_bytes() for p in digest(tmp_path / "here")}
    assert read_manifest("memory://bucket/set").n_cells == 600
    assert not list((tmp_path / "work").iterdir())


def test_what_an_object_store_answers_is_said_in_a_line(tmp_path, source, monkeypatch):
    class ClientError(Exception):  # the store's clients derive theirs from Exception alone
        pass

    def put_file(*args, **kwargs):
        raise ClientError("An error occurred (SlowDown)\nwhen calling PutObject")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", put_file)
    wanted = replace(config(tmp_path, source[1]), out="memory://shop/set", work=str(tmp_path / "work"))
    with pytest.raises(InputError, match=r"^memory://shop/set: ClientError: .*SlowDown\) when calling PutObject$"):
        write(wanted)


# --- twice ---------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time_does_a_share(tmp_path, source, monkeypatch):
    """A second start of a command that runs, of a task that runs, or --finish beside tasks that run."""
    wanted = config(tmp_path / "set", source[1])
    refused: list[str] = []
    scatter = Worker.scatter

    def meanwhile(worker, unit):
        for task in ("", "1/2", "0/2"):
            try:
                write(replace(wanted, task=task))
            except InputError as error:
                refused.append(f"{task}: {error}")
        return scatter(worker, unit)

    monkeypatch.setattr(Worker, "scatter", meanwhile)
    write(replace(wanted, task="0/2"))
    monkeypatch.setattr(Worker, "scatter", scatter)
    assert re.match(r": .*another process is writing this set", refused[0])
    assert any(re.match(r"0/2: .*another process is doing task=0/2", text) for text in refused)
    assert not any(text.startswith("1/2") for text in refused)
    write(replace(wanted, task="1/2"))
    assert write(replace(wanted, finish=True)) is not None


def test_a_source_that_changed_after_its_set_was_written(tmp_path, source):
    path = tmp_path / "a.h5ad"
    path.write_bytes(source[1].read_bytes())
    wanted = config(tmp_path / "set", path)
    assert write(wanted) is not None
    assert write(wanted) is not None
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match=r"a\.h5ad has changed since this set was written"):
        write(wanted)
    path.unlink()  # a set outlives its source
    assert write(wanted) is not None


def test_shards_of_unfinished_work_that_is_gone_are_not_taken_over(tmp_path, source):
    """Someone removed .work and left its tars: they would be read as this command's, or fail `shards verify`."""
    (tmp_path / "set/shards").mkdir(parents=True)
    (tmp_path / "set/shards/train-00000.tar").write_bytes(b"another's")
    with pytest.raises(InputError, match="holds shards of unfinished work that is gone; remove them"):
        write(config(tmp_path / "set", source[1]))
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["shards"]
