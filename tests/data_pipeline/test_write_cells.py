"""Parts in any order, by several writers, become one file that others open; nothing is there before it is whole."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_pipeline import write_cells
from data_pipeline.write_cells import FORMATS, CellWriter
from scldm import files
from scldm.errors import InputError

N, GENES = 47, tuple(f"g{k}" for k in range(9))
COST = {"n_evaluations": 470}
MADE_BY = {"model": "abc", "seed": 7, "config": '{"sampler": {"method": "heun", "n_steps": 5}}'}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 parts, of which some are appended together."""
    monkeypatch.setattr(write_cells, "PART_CELLS", 10)
    monkeypatch.setattr(write_cells, "JOIN_VALUES", 60)


def counts(dtype: type = np.int32) -> sp.csr_matrix:
    dense = np.random.default_rng(0).poisson(0.7, (N, len(GENES))).astype(dtype)
    dense[12:20] = 0  # a cell may have no count, and the last gene none either
    dense[:, -1] = 0
    return sp.csr_matrix(dense)


def obs() -> pd.DataFrame:
    of = pd.Categorical.from_codes(np.arange(N) % 2, categories=["T", "B", "not given"])
    return pd.DataFrame({"type": of, "size": np.linspace(1, 2, N)}, index=pd.Index([f"c{k}" for k in range(N)]))


def writer(out: Path, dtype: type = np.int32, **other: Any) -> CellWriter:
    return CellWriter(out, other.pop("n", N), GENES, dtype, {**MADE_BY, **other})


def write(of: CellWriter, parts: list[int], dtype: type = np.int32) -> None:
    matrix, size = counts(dtype), obs()["size"].to_numpy()
    for part in parts:
        rows = of.rows(part)
        of.write_part(part, matrix[rows.start : rows.stop], {"size": size[rows.start : rows.stop]})


def begin(of: CellWriter) -> None:
    """As a process does that ends before it has joined the parts."""
    with of.begun():
        pass


def read(path: Path) -> Any:
    if path.suffix == ".h5ad":
        return ad.read_h5ad(path)
    if path.suffix == ".zarr":
        return ad.read_zarr(path)
    import tiledbsoma
    import tiledbsoma.io

    with tiledbsoma.Experiment.open(str(path)) as experiment:
        return tiledbsoma.io.to_anndata(experiment, "RNA")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_parts_in_any_order_are_one_file(tmp_path: Path, suffix: str, dtype: type) -> None:
    out = tmp_path / "new" / f"cells{suffix}"
    first, second = writer(out, dtype), writer(out, dtype)
    assert first.missing == [0, 1, 2, 3, 4]
    with first.begun():
        write(second, [4, 1], dtype)
        write(first, [0, 3, 2, 3], dtype)
    assert not out.exists()
    last = writer(out, dtype)
    assert last.missing == []
    np.testing.assert_array_equal(last.column("size"), obs()["size"])
    last.join(obs, COST)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    made = read(out)
    assert (made.X != counts(dtype)).nnz == 0
    assert made.X.nnz == counts().nnz
    assert (made.X.dtype, made.X.format) == (dtype, "csr")
    assert list(made.var_names) == list(GENES)
    assert list(made.obs_names) == list(obs().index)
    assert list(made.obs["type"]) == list(obs()["type"])
    assert isinstance(made.obs["type"].dtype, pd.CategoricalDtype)
    np.testing.assert_array_equal(made.obs["size"], obs()["size"])
    assert dict(made.uns["scldm"]) == {"n_cells": N, "n_genes": 9, **MADE_BY, **COST}
    again = writer(out, dtype)
    assert (again.finished, again.missing) == (True, [])


def test_a_changed_note_makes_no_parts_another_commands(tmp_path: Path) -> None:
    of = writer(tmp_path / "cells.h5ad")
    begin(of)
    note = of.parts / "made_by.json"
    note.write_text(note.read_text().replace('"seed": 7', '"seed": 8'))
    for seed in (7, 8):
        with pytest.raises(InputError, match=r"cells\.h5ad\.parts/made_by\.json: its SHA-256 is not that of what"):
            writer(of.out, seed=seed)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_of_another_command_is_refused_by_what_differs(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"cells{suffix}"
    of = writer(out)
    begin(of)
    write(of, [0, 1, 2])
    heun = '{"sampler": {"method": "euler", "n_steps": 5}}'
    for phase in ("is unfinished and of another command", "exists and holds other cells"):
        for other, said in (
            ({"seed": 8}, "seed was 7, now 8"),
            ({"model": "x" * 64}, "model was abc, now xxxxxxxxxxxx..."),
            ({"config": heun}, "config.sampler.method was heun, now euler"),
            ({"n": 5}, "n_cells was 47, now 5"),
        ):
            with pytest.raises(InputError, match=f"{phase}.*{said}"):
                writer(out, **other)
        if not of.finished:
            write(of, [3, 4])
            of.join(obs, COST)
    assert (read(out).X != counts()).nnz == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_somebody_else_made_is_left_alone(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"cells{suffix}"
    if suffix == ".h5ad":
        ad.AnnData(counts()).write_h5ad(out)
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not of this command") as refusal:
        writer(out)
    assert "\n" not in str(refusal.value)
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    (tmp_path / f"{out.name}.parts").mkdir()
    (tmp_path / f"{out.name}.parts" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="parts is in the way"):
        writer(out)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_join_that_was_killed_is_done_again(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / f"cells{suffix}"
    of = writer(out)
    begin(of)
    (of.parts / ".000002.npz.0123456789ab.partial").write_bytes(b"half a part")
    write(of, [0, 1, 2, 3, 4])

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            of.join(obs, COST)
    assert not out.exists()
    (of.parts / f"joined{suffix}").write_bytes(b"what kill -9 leaves")
    again = writer(out)
    begin(again)
    assert not list(again.parts.glob(".*"))
    assert again.missing == []
    again.join(obs, COST)
    assert (read(out).X != counts()).nnz == 0
    assert not again.parts.exists()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    of = writer(tmp_path / "cells.h5ad")
    begin(of)
    write(of, [0, 1, 2, 3, 4])
    path = of.parts / "000003.npz"
    data = bytearray(path.read_bytes())
    data[data.find(b"data.npy") + 160] ^= 1  # in the values
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"000003.npz is damaged .*Remove it and run the same command again"):
        of.join(obs, COST)
    assert not of.out.exists()


def test_a_full_disk_is_one_line_before_and_during(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = writer(tmp_path / "new" / "cells.h5ad")
    of.require_space(100)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=r"[kMGT]B are needed for 47 cells. .* [kMGT]B free"):
        of.require_space(1.01 * free / N)
    assert not (tmp_path / "new").exists()
    begin(of)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="no space left"):
        write(of, [1])
    assert sorted(p.name for p in of.parts.iterdir()) == ["lock", "made_by.json"]


def test_what_is_written_already_needs_no_space_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 B a value of the missing parts, 4 B a value and 100 B of obs of the file; what a killed join left goes."""
    of, values, free = writer(tmp_path / "cells.h5ad"), 1_000, 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))

    def needs(exactly: int) -> None:
        nonlocal free
        free = exactly
        writer(of.out).require_space(values)
        free = exactly - 1
        with pytest.raises(InputError, match="for 47 cells"):
            writer(of.out).require_space(values)

    of_file = 47 * (4 * values + 100)
    needs(of_file + 47 * 8 * values)
    begin(of)
    write(of, [0, 4])  # of 10 cells and of 7
    needs(of_file + 30 * 8 * values)
    write(of, [1, 2, 3])
    needs(of_file)
    (of.parts / "joined.h5ad").write_bytes(bytes(50_000))
    needs(of_file - 50_000)


def test_a_part_holds_whole_batches(tmp_path: Path) -> None:
    """Else a batch at their border would be made twice."""
    of = CellWriter(tmp_path / "cells.h5ad", N, GENES, np.int32, MADE_BY, batch=16)
    assert [of.rows(part) for part in of.missing] == [range(16), range(16, 32), range(32, 47)]
    of = CellWriter(tmp_path / "cells.h5ad", N, GENES, np.int32, MADE_BY, batch=4)
    assert [of.rows(part).start for part in of.missing] == [0, 12, 24, 36]


def test_a_second_command_waits_for_nothing_and_harms_nothing(tmp_path: Path) -> None:
    first, second = writer(tmp_path / "cells.h5ad"), writer(tmp_path / "cells.h5ad")
    with first.begun():
        (first.parts / ".000001.npz.0123456789ab.partial").write_bytes(b"just being written")
        with pytest.raises(InputError, match="another process is making these cells"), second.begun():
            pass
        assert (first.parts / ".000001.npz.0123456789ab.partial").exists()
    with second.begun():
        assert not (first.parts / ".000001.npz.0123456789ab.partial").exists()


def test_a_command_killed_before_it_said_what_it_makes_is_begun_again(tmp_path: Path) -> None:
    parts = writer(tmp_path / "cells.h5ad").parts
    parts.mkdir()
    (parts / "lock").touch()
    (parts / ".made_by.json.0123456789ab.partial").touch()
    begin(writer(tmp_path / "cells.h5ad"))
    assert sorted(p.name for p in parts.iterdir()) == ["lock", "made_by.json"]


def test_a_suffix_says_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in .h5ad, .zarr, .soma"):
        writer(tmp_path / "cells.loom")


@pytest.mark.slow
def test_scanpy_opens_it(tmp_path: Path) -> None:
    import scanpy

    of = writer(tmp_path / "cells.h5ad")
    begin(of)
    write(of, [0, 1, 2, 3, 4])
    of.join(obs, COST)
    made = scanpy.read_h5ad(of.out)
    made = made[np.asarray(made.X.sum(1)).ravel() > 0].copy()
    scanpy.pp.normalize_total(made)
    scanpy.pp.log1p(made)
    assert np.isfinite(made.X.data).all()
    backed = scanpy.read_h5ad(of.out, backed="r")
    assert (backed[5:9].to_memory().X != counts()[5:9]).nnz == 0
