"""Every layout of AnnData that is about, through every verb that reads or writes one: counts and labels one by one."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scldm
from launch import cli
from launch.evaluation import of_embedding, of_generated
from launch.evaluation.cells import generated_cells
from scldm import cells_file
from scldm.count_matrix import is_in_memory
from scldm.errors import InputError
from scldm.model_folder import save_pretrained
from tests.data_pipeline.atlases import read_set
from tests.scldm.small_model import CONDITIONS, GENES, library_sizes, networks
from tests.scldm.small_model import cells as small_cells

GOLDEN = Path(__file__).parents[1] / "golden"
N = 12
TYPES = ["T cell", "B cell", "B cell"] * 4
SHARDS = [
    "conditions=type,dose",
    "missing=none",
    "block_cells=4",
    "shard_cells=8",
    "split.validation=0",
    "split.test=0",
]


def cells() -> Any:
    """Twelve cells with a label, a number with one value missing, and columns of other kinds."""
    adata = small_cells(N)
    adata.obs_names = [f"cell-{k}" for k in range(N)]
    adata.obs["type"] = pd.Categorical(TYPES)
    adata.obs["dose"] = [0.5, 10.0, np.nan, 1.0] * 3
    adata.obs["part"] = PARTS
    return adata


PARTS = ["train", "validation", "test"] * 4
DOSES = ["0.5", "10", "none", "1"] * 3


def plain(adata: Any, path: Path) -> Path:
    adata.write_h5ad(path / "a.h5ad")
    return path / "a.h5ad"


def csc(adata: Any, path: Path) -> Path:
    adata.X = sp.csc_matrix(adata.X)
    return plain(adata, path)


def dense(adata: Any, path: Path) -> Path:
    adata.X = adata.X.toarray()
    return plain(adata, path)


def integers(adata: Any, path: Path) -> Path:
    adata.X = adata.X.astype(np.int64)
    return plain(adata, path)


def nullable(adata: Any) -> Any:
    """As pandas 3 makes them: text, names included, is of a dtype that has missing values; and others of its kind."""
    adata.obs["type"] = pd.array(TYPES, "string")
    adata.obs["note"] = pd.array(["x", None] * 6, "string")
    adata.obs["ill"] = pd.array([True, None, False] * 4, "boolean")
    adata.obs["age"] = pd.array([30, None] * 6, "Int64")
    adata.obs["kind"] = pd.Categorical(["a", None, "b"] * 4)
    adata.obs_names, adata.var_names = adata.obs_names.astype("string"), adata.var_names.astype("string")
    return adata


def of_0_13_h5ad(adata: Any, path: Path) -> Path:
    """The same cells as anndata 0.13.4 with pandas 3.1.1 wrote them, with those columns and nullable names."""
    (path / "a.h5ad").write_bytes(gzip.decompress((GOLDEN / "anndata-0.13-pandas-3.h5ad.gz").read_bytes()))
    with h5py.File(path / "a.h5ad", "r+") as file:
        add_parts(file["obs"])
    return path / "a.h5ad"


def of_0_13_zarr(adata: Any, path: Path) -> Path:
    with tarfile.open(GOLDEN / "anndata-0.13-pandas-3.zarr.tar.gz") as tar:
        tar.extractall(path, filter="data")
    with ad.settings.override(auto_shard_zarr_v3=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that zarr itself consolidated
        add_parts(zarr.open_group(path / "zarr3.zarr", use_consolidated=False)["obs"])
        zarr.consolidate_metadata(path / "zarr3.zarr")
    return path / "zarr3.zarr"


def add_parts(obs: Any) -> None:
    ad.io.write_elem(obs, "part", np.array(PARTS, object))
    obs.attrs["column-order"] = [*obs.attrs["column-order"], "part"]


def nullable_raw(adata: Any, path: Path) -> Path:
    with ad.settings.override(allow_write_nullable_strings=True):
        return raw(nullable(adata), path)


def raw(adata: Any, path: Path) -> Path:
    adata.raw = adata.copy()
    adata.X = adata.X * np.float32(0.37)
    return plain(adata, path)


def zarr_of(
    version: int, made: Callable[[Any], Any] = lambda adata: adata, sharded: bool = False
) -> Callable[[Any, Path], Path]:
    def write(adata: Any, path: Path) -> Path:
        more = {"allow_write_nullable_strings": True, "auto_shard_zarr_v3": sharded}
        with ad.settings.override(zarr_write_format=version, **more), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what will be written next year
            made(adata).write_zarr(path / "a.zarr")
        return path / "a.zarr"

    return write


def of_0_7(adata: Any, path: Path) -> Path:
    """Codes that refer to their categories."""
    plain(adata, path)
    with h5py.File(path / "a.h5ad", "r+") as file:
        obs: Any = file["obs"]
        labels, codes = obs["type/categories"][:], obs["type/codes"][:]
        del obs["type"]
        obs["__categories/type"] = labels
        obs["type"] = codes
        obs["type"].attrs["categories"] = obs["__categories/type"].ref
        obs.attrs["encoding-version"] = "0.1.0"
    return path / "a.h5ad"


def magic(adata: Any, path: Path) -> Path:
    adata.write_h5ad(path / "cells [v2].h5ad")
    return path / "cells [v2].h5ad"


LAYOUTS = {
    "csc": csc, "dense": dense, "integers": integers, "nullable": of_0_13_h5ad, "raw": raw, "0.7": of_0_7,
    "zarr 2": zarr_of(2), "zarr 3": of_0_13_zarr, "sharded zarr": zarr_of(3, sharded=True), "brackets": magic,
    "nullable zarr": zarr_of(3, nullable), "nullable raw": nullable_raw,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any") / "model"
    vae, dit = networks()
    save_pretrained(folder, vae, dit, GENES, CONDITIONS, library_sizes(), {})
    return folder


def run(*words: str) -> None:
    assert cli.main(words) == 0, words


def made_of(path: Path, model: Path, out: Path, layer: str) -> dict[str, Any]:
    """What every verb makes of a file."""
    given = [f"model={model}", f"h5ad={path}", *([f"layer={layer}"] if layer else [])]
    run("embed", *given, f"out={out}/embedded.h5ad")
    run("reconstruct", *given, f"out={out}/expected.h5ad")
    run("transform", *given, "by=type", "to=type=T cell", f"out={out}/moved.h5ad", "sampler.n_steps=2")
    run("generate", f"model={model}", f"like={path}", "by=type", f"out={out}/made.h5ad", "sampler.n_steps=2")
    run("shards", "write", f"source.paths=[{json.dumps(str(path))}]", f"out={out}/shards", *SHARDS)
    found = {name: ad.read_h5ad(out / f"{name}.h5ad") for name in ("embedded", "expected", "moved", "made")}
    return found | {"set": read_set(str(out / "shards"))[1]} | judged(path, out, layer)


def judged(path: Path, out: Path, layer: str) -> dict[str, Any]:
    """What `scldm evaluate` compares where a file is the generated cells, the real ones, or those of an embedding."""
    seen: dict[str, Any] = {}

    def compared(train: Any, validation: Any, test: Any, generated: Any, *_: Any) -> dict:
        seen.update(train=train, validation=validation, test=test, generated=generated)
        raise InputError("twelve cells are too few for scores")

    def probed(latents: Any, labels: Any, _groups: Any, _seed: int, counts: Any) -> None:
        seen["probed"] = latents, labels, counts
        raise InputError("twelve cells are too few for a probe")

    real = [f"real={path}", *([f"layer={layer}"] if layer else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_generated, "compare", compared)
        patch.setattr(of_embedding, "probe", probed)
        words = [f"generated={path}", "split=part", "conditions=type", f"out={out}/evaluation"]
        assert cli.main(["evaluate", *words, *real]) == 2
        assert cli.main(["evaluate", f"embedding={out}/embedded.h5ad", "label=type", *real]) == 2
    return {"judged": seen}


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plain")
    return made_of(plain(cells(), folder), model, folder, "")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_made_of_a_file_does_not_depend_on_its_layout(layout: str, model, right, tmp_path: Path) -> None:
    path = LAYOUTS[layout](cells(), tmp_path)
    made = made_of(path, model, tmp_path, "raw" if "raw" in layout else "")
    counts = cells().X.toarray()
    for row in range(N):
        of_set = made["set"][0, row]
        assert of_set["labels"] == {"type": TYPES[row], "dose": DOSES[row]}
        assert of_set["counts"] == {g: int(n) for g, n in zip(GENES.ids, counts[row], strict=True) if n}
    every = range(N)
    parts = {"generated": every, **{part: [k for k in every if PARTS[k] == part] for part in set(PARTS)}}
    for part, rows in parts.items():
        of_part = made["judged"][part]
        assert of_part.labels["type"].tolist() == [TYPES[k] for k in rows]
        assert of_part.genes == GENES.ids
        np.testing.assert_array_equal(of_part.counts.toarray(), counts[rows])
    latents, labels, of_probe = made["judged"]["probed"]
    np.testing.assert_array_equal(latents, made["embedded"].obsm["X_scldm"])
    assert labels.tolist() == TYPES
    np.testing.assert_array_equal(of_probe.toarray(), counts)
    for name, key in (("embedded", "X_scldm"), ("expected", ""), ("moved", ""), ("made", "")):
        ours, theirs = made[name], right[name]
        for of in (ours, theirs):
            assert of.obs["type"].astype(str).tolist() == (["T cell"] * N if name == "moved" else TYPES)
        assert list(map(str, ours.obs_names)) == list(theirs.obs_names)
        assert list(map(str, ours.var_names)) == list(theirs.var_names)
        ours, theirs = (of.obsm[key] if key else of.X for of in (ours, theirs))
        ours, theirs = (of.toarray() if sp.issparse(of) else of for of in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    if "nullable" in layout:  # what is missing stays missing, and nothing else does
        obs = made["embedded"].obs
        assert obs["note"].isna().tolist() == obs["age"].isna().tolist() == [False, True] * 6
        assert obs["ill"].tolist() == [True, pd.NA, False] * 4


def test_a_file_that_was_opened_and_not_read_is_embedded_by_rows(model: Path, tmp_path: Path, monkeypatch) -> None:
    loaded = scldm.load(model)
    expected = loaded.embed(cells())
    monkeypatch.setattr("scldm.count_matrix.FILE_ROWS", 5)
    for name in ("csr", "csc", "dense"):
        (tmp_path / name).mkdir()
        path = {"csr": plain, "csc": csc, "dense": dense}[name](cells(), tmp_path / name)
        backed = ad.read_h5ad(path, backed="r")
        np.testing.assert_allclose(loaded.embed(backed), expected, rtol=1e-5, atol=1e-6)
        backed.file.close()


# --- what is refused, and what it says -----------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 2
    return capsys.readouterr().err


def tenx(path: Path) -> Path:
    with h5py.File(path / "filtered.h5", "w") as file:
        file["matrix/data"] = [1]
    return path / "filtered.h5"


def mtx(path: Path) -> Path:
    (path / "filtered").mkdir()
    (path / "filtered" / "matrix.mtx.gz").touch()
    return path / "filtered"


def text(path: Path) -> Path:
    (path / "counts.csv").write_text("a,b\n1,2\n")
    return path / "counts.csv"


@pytest.mark.parametrize(
    "make, said",
    [(tenx, "a 10x file, no AnnData file. Write one: python -c \"import scanpy as r; a = r.read_10x_h5("),
     (mtx, "10x matrices, no AnnData file. Write one: python -c \"import scanpy as r; a = r.read_10x_mtx("),
     (text, "a table, no AnnData file. Write one: python -c \"import scanpy as r; a = r.read_csv(")],
)  # fmt: skip
def test_what_another_library_reads_is_refused_with_the_line_to_type(make, said, model, tmp_path, capsys) -> None:
    path = make(tmp_path)
    for words in (
        ("shards", "write", f"source.paths={path}", f"out={tmp_path}/set"),
        ("embed", f"model={model}", f"h5ad={path}", f"out={tmp_path}/out.h5ad"),
        ("generate", f"model={model}", f"like={path}", "by=type", f"out={tmp_path}/out.h5ad"),
    ):
        assert said in refused(capsys, *words)


def test_a_file_that_is_written_is_called_locked(tmp_path: Path) -> None:
    path = plain(cells(), tmp_path)
    code = f"import h5py; f = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=r"a.h5ad: locked: another process has it open for writing"):
            generated_cells(str(path), [])
        writer.kill()


def test_what_can_not_be_written_is_refused_before_anything_is_computed(model, tmp_path, capsys, monkeypatch) -> None:
    path = plain(cells(), tmp_path)
    monkeypatch.setattr("scldm.load", lambda *a, **k: pytest.fail("the model was loaded"))
    for out, said in (
        (path, "which would be lost"),
        (tmp_path / "x.csv", "must end in .h5ad"),
        (tmp_path / "a.h5ad" / "x.h5ad", "can't be written to"),
    ):
        for verb in ("embed", "reconstruct", "transform"):
            to = ["to=type=T cell"] if verb == "transform" else []
            assert said in refused(capsys, verb, f"model={model}", f"h5ad={path}", f"out={out}", *to)
    assert "which would be lost" in refused(
        capsys, "generate", f"model={model}", f"like={path}", "by=type", f"out={path}"
    )
    adata = cells()
    adata.uns["odd"] = {"set": {1, 2}}
    monkeypatch.setattr("launch.own_cells.cells_in_file", lambda _: nullcontext(adata))
    assert "uns can't be written" in refused(
        capsys, "embed", f"model={model}", f"h5ad={path}", f"out={tmp_path}/out.h5ad"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]


def test_more_cells_than_a_disk_holds_are_refused_before_there_is_an_array(model, tmp_path, capsys) -> None:
    table = tmp_path / "wanted.csv"
    table.write_text("type,n_cells\nT cell,1000000000000\n")
    for asked in ("n=1000000000000", f"conditions={table}"):
        said = refused(capsys, "generate", f"model={model}", asked, f"out={tmp_path}/out.h5ad")
        assert "at least 100 TB are needed for 1,000,000,000,000 cells" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wanted.csv"]


# --- cells that stay in their file ---------------------------------------------------------------------------------


def with_matrices(made: Callable[[Any], Any]) -> Any:
    """Counts in a layer and in raw, beside X."""
    adata = cells()
    adata.raw = adata.copy()
    adata.layers["counts"] = made(adata.X)
    adata.X = made(adata.X * np.float32(0.37))
    return adata


@pytest.mark.heavy
@pytest.mark.parametrize("made", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_matrices_are_written_as_they_lie_in_the_file_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Any], Any], kind: str
) -> None:
    adata = with_matrices(made)
    path = plain(adata, tmp_path) if kind == "h5ad" else zarr_of(3)(adata, tmp_path)
    monkeypatch.setattr(cells_file, "COPIED_NUMBERS", 50)
    with cells_file.cells_in_file(path) as found:
        assert found.raw is not None
        assert not any(is_in_memory(of) for of in (found.X, found.layers["counts"], found.raw.X))
        found.obsm["X_scldm"] = np.ones((N, 2))
        cells_file.write_cells(found, tmp_path / "out.h5ad")
    back: Any = ad.read_h5ad(tmp_path / "out.h5ad")
    for ours, theirs in ((back.X, adata.X), (back.layers["counts"], adata.layers["counts"]), (back.raw.X, adata.raw.X)):
        assert (type(ours), ours.dtype) == (type(theirs), theirs.dtype)
        np.testing.assert_array_equal(*(of.toarray() if sp.issparse(of) else of for of in (ours, theirs)))
    pd.testing.assert_frame_equal(back.obs, cells_file.storable(adata.obs), check_categorical=False)
    assert list(back.raw.var_names) == list(adata.var_names)
    with h5py.File(tmp_path / "out.h5ad") as file:
        node: Any = file["X/data"] if sp.issparse(adata.X) else file["X"]
        assert node.compression == "gzip"


def test_a_part_of_a_file_that_is_found_damaged_while_it_is_read_is_said_in_one_line(model, tmp_path, capsys) -> None:
    path = tmp_path / "a.h5ad"
    small_cells(2_000).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        data: Any = file["X/data"]
        at = data.id.get_chunk_info(data.id.get_num_chunks() // 2).byte_offset
    whole = bytearray(path.read_bytes())
    whole[at + 20 : at + 60] = bytes(40)
    path.write_bytes(whole)
    said = refused(capsys, "embed", f"model={model}", f"h5ad={path}", f"out={tmp_path}/out.h5ad")
    assert f"{path}: can't be read: damaged or truncated (Can't synchronously read data" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]


@pytest.mark.parametrize("missing", ["indices", "indptr", "data", "cut"])
def test_a_matrix_of_a_file_that_lacks_a_part_is_said_before_anything_is_read(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "a.h5ad"
    small_cells(20).write_h5ad(path)
    with h5py.File(path, "a") as file:
        if missing == "cut":
            some = file["X/indices"][:-3]  # pyright: ignore[reportIndexIssue]
        del file[f"X/{'indices' if missing == 'cut' else missing}"]
        if missing == "cut":
            file["X/indices"] = some
    with (
        pytest.raises(InputError, match="can't be read: damaged or truncated"),
        cells_file.cells_in_file(path),
    ):
        pass


def test_a_file_without_raw_is_written_without(tmp_path: Path) -> None:
    """anndata before 0.12 can't read the null that stands there otherwise, and 0.12 takes it for genes from a file."""
    path = tmp_path / "a.h5ad"
    small_cells(20).write_h5ad(path)
    with cells_file.cells_in_file(path) as found:
        cells_file.write_cells(found, tmp_path / "out.h5ad")
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert "raw" not in file
    back = ad.read_h5ad(tmp_path / "out.h5ad", backed="r")
    assert back.raw is None
