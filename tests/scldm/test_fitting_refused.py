"""`scldm.fit`: what it refuses leaves the folder as it was, and what nobody asked for is in nobody's way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scldm
from scldm import fitting
from scldm.errors import InputError
from tests.scldm.test_fitting import FEW, SPLIT, G, N, cells


class Began(Exception):
    """Training would begin here."""


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that the autoencoder would be trained by. Nothing is trained."""
    configs: list[Any] = []

    def main(config: Any) -> None:
        configs.append(config)
        raise Began

    monkeypatch.setattr("launch.train_vae.main", main)
    return configs


# --- its folder ---


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(
    "wrong", [{"vae": {"train.stepps": 9}}, {"layer": "raw_counts"}, {"shards": {"split.validation": 0}}]
)
def test_a_refused_call_leaves_its_folder_as_it_was(wrong: dict[str, Any], is_there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "fit"
    if is_there:
        folder.mkdir(parents=True)
    with pytest.raises(InputError):
        scldm.fit(cells(), ["cell_type"], folder=folder, **wrong)
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if is_there else [])


def test_a_refused_call_takes_nothing_of_others(began: list[Any], tmp_path: Path) -> None:
    with pytest.raises(Began):
        scldm.fit(cells(), ["cell_type"], folder=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for wrong in ({"layer": "raw_counts"}, {"ldm": {"train.stepps": 9}}, {"seed": 1}):
        with pytest.raises(InputError):
            scldm.fit(cells(), ["cell_type"], folder=tmp_path, **wrong)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / fitting.NOTE).rename(tmp_path / "thesis.txt")
    with pytest.raises(InputError, match="is not empty and no folder of scldm.fit"):
        scldm.fit(cells(), ["cell_type"], folder=tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


@pytest.mark.slow
def test_the_second_stage_may_change_until_it_began(tmp_path: Path) -> None:
    """Its first refusal comes after the autoencoder was trained."""
    table, given = tmp_path / "labels.csv", {"vae": FEW, "shards": SPLIT, "folder": tmp_path / "fit"}
    table.write_text("label,x\nT,1\nB,2\nNK,3\n")
    wrong = {**FEW, "label_embeddings": {"cell_type": str(table)}, "hardware.micro_batch": 7}
    with pytest.raises(InputError, match="micro_batch"):
        scldm.fit(cells(), ["cell_type"], ldm=wrong, **given)
    trained = (tmp_path / "fit" / "vae" / "metrics.jsonl").read_bytes()
    model = scldm.fit(cells(), ["cell_type"], ldm={**wrong, "hardware.micro_batch": 10}, **given)
    assert (tmp_path / "fit" / "vae" / "metrics.jsonl").read_bytes() == trained
    assert model.history["ldm"]["step"].max() == 6
    with pytest.raises(InputError, match="holds another fit: ldm was"):
        scldm.fit(cells(), ["cell_type"], ldm=FEW, **given)


def test_label_embeddings_are_looked_at_before_anything_is_trained(began: list[Any], tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    of_ldm = {"label_embeddings": {"cell_type": str(table)}}
    with pytest.raises(InputError, match="^ldm: label_embeddings.cell_type=.*labels.csv: no such file"):
        scldm.fit(cells(), ["cell_type"], ldm=of_ldm, folder=tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
    table.write_text("label,x\nT,1\nB,2\n")
    with pytest.raises(InputError, match="no vector for 'NK'"):
        scldm.fit(cells(), ["cell_type"], ldm=of_ldm, folder=tmp_path / "fit")
    table.write_text("label,x\nT,1\nB,2\nNK,3\n")
    with pytest.raises(Began):
        scldm.fit(cells(), ["cell_type"], ldm=of_ldm, folder=tmp_path / "fit")


@pytest.mark.parametrize(
    "name", ["link", "link/x", "file/x", "a\0b", "n" * 300, f"x/{'n' * 300}", "\ud800", "/dev/null"]
)
def test_what_can_be_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^folder=[^\n]*$"):
        scldm.fit(cells(), ["cell_type"], folder=f"{tmp_path}/{name}" if name[0] != "/" else name)
    assert sorted(of.name for of in tmp_path.iterdir()) == ["file", "link"]


def test_messages_name_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adata = cells()
    adata.obs["x"] = np.inf
    with pytest.raises(InputError, match="^adata: column 'x' has an infinite value: no label"):
        scldm.fit(adata, ["x"], folder="relative")
    adata.write_h5ad("cells.h5ad")
    with pytest.raises(InputError, match="^cells.h5ad: column 'x' has an infinite value: no label"):
        scldm.fit("cells.h5ad", ["x"])
    with pytest.raises(InputError, match="^shards has no validation cells"):
        scldm.fit(adata, ["cell_type"], shards={"split.validation": 0})


# --- its presets ---


@pytest.mark.parametrize(
    "given, found",
    [
        ([], ["vae/20m", "M"]),
        (["hardware/cpu"], ["vae/20m", "M", "hardware/cpu"]),
        (["vae/tiny", "hardware/cpu"], ["vae/tiny", "M", "hardware/cpu"]),
        (["hardware/cpu", "vae/tiny"], ["M", "hardware/cpu", "vae/tiny"]),
        (["my.yaml"], ["M", "my.yaml"]),
    ],
)
def test_a_preset_of_the_machine_leaves_the_network(given: list[str], found: list[str]) -> None:
    assert fitting._presets_of("vae", fitting.Words(given, []), "vae/20m", ["M"]) == found


def test_the_network_is_that_of_the_number_of_cells(began: list[Any]) -> None:
    for given in (FEW, ["hardware/cpu", FEW]):
        with pytest.raises(Began):
            scldm.fit(cells(), ["cell_type"], vae=given)
    assert began[0].model == began[1].model
    assert (began[1].model.width, began[1].model.n_latents) == (64, 8)


# --- its cells ---


def test_labels_that_a_table_of_splits_names_tell_cells_apart(began: list[Any], tmp_path: Path) -> None:
    table = tmp_path / "held_out.csv"
    table.write_text("cell_type,treatment\nT,stim\n")
    given: dict[str, Any] = {"shards": {"split.held_out": str(table)}, "folder": tmp_path / "fit"}
    adata = cells()
    for _ in range(2):
        with pytest.raises(Began):
            scldm.fit(adata, ["cell_type"], **given)
    adata.obs["treatment"] = adata.obs["treatment"].to_numpy()[::-1]
    with pytest.raises(InputError, match="holds another fit: cells was"):
        scldm.fit(adata, ["cell_type"], **given)


def _set(table: str, column: Any, value: Any) -> Callable[[ad.AnnData], object]:
    """What gives every cell or gene a value."""

    def change(adata: ad.AnnData) -> None:
        of = getattr(adata, table)
        of[column] = pd.Series([value] * len(of), of.index)

    return change


def _twice(adata: ad.AnnData) -> None:
    adata.obs = pd.concat([adata.obs, adata.obs[["cell_type"]]], axis=1)


def _renamed(axis: str, name: str) -> Callable[[ad.AnnData], object]:
    return lambda adata: setattr(adata, axis, [name, *getattr(adata, axis)[1:]])


@pytest.mark.filterwarnings("ignore:.*names are not unique", "ignore:.*slash")
@pytest.mark.parametrize(
    "change, given, said",
    [
        (_set("obs", "scldm_split", "train"), {"conditions": ["scldm_split"]}, "fit itself writes the column"),
        (_set("obs", "scldm_split", "train"), {"shards": {"split.by": "scldm_split"}}, "fit itself writes the column"),
        (_set("obs", "scldm_split", "a"), {"shards": {"split.stratify": ["scldm_split"]}}, "fit itself writes the col"),
        (_set("obs", "scldm_split", "a"), {"shards": {"source.obs_filter": "scldm_split == 'a'"}}, "fit itself writes"),
        (_set("obs", "_index", "a"), {"conditions": ["_index"]}, "^adata: obs can't be written .*_index"),
        (_twice, {}, "adata.obs has several columns 'cell_type'. Rename all but one"),
        (_set("obs", "x", "a\0b"), {"conditions": ["x"]}, r"adata.obs\['x'\]: 'a\\x00b' holds a NUL"),
        (
            _set("obs", "x", "a\ud800"),
            {"conditions": ["x"]},
            r"adata.obs\['x'\]: 'a\\ud800' holds a NUL, or is no text",
        ),
        (_set("obs", "x", b"a\xff"), {"conditions": ["x"]}, r"b'a\\xff' is no text in UTF-8"),
        (_renamed("var_names", "a\0b"), {}, r"adata.var_names: 'a\\x00b' holds a NUL"),
        (_renamed("obs_names", "\ud800"), {}, r"adata.obs_names: '\\ud800' holds a NUL, or is no text in UTF-8"),
        (_set("obs", "x", [1]), {"shards": {"source.obs_filter": "x == 'T'"}}, "^adata: obs can't be written"),
    ],
)
def test_cells_that_are_refused(
    change: Callable[[ad.AnnData], object], given: dict[str, Any], said: str, began: list[Any]
) -> None:
    adata = cells()
    change(adata)
    with pytest.raises(InputError, match=said) as error:
        scldm.fit(**{"adata": adata, "conditions": ["cell_type"], **given})
    assert "\n" not in str(error.value)
    assert not re.search("/tmp|scldm-fit-", str(error.value))


def test_columns_that_nobody_asked_for_are_in_nobodys_way(began: list[Any]) -> None:
    adata = cells()
    for table, n in (("obs", N), ("var", G)):
        of = getattr(adata, table)
        of["l"] = [[1]] * n  # part of the name cell_type
        of["o"] = [object() for _ in range(n)]
        of["t"] = pd.Timestamp("2020", tz="UTC")
        of[5] = "x"
        of["a/b"] = 1
        of["of whom"] = 1
    adata.obs.loc["cell 3", "treatment"] = adata.var.loc[adata.var_names[3], "symbol"] = np.nan
    shards = {"source.obs_filter": "treatment == 'stim' and `of whom` == 1", "source.var_filter": "mean > 0"}
    with pytest.raises(Began):
        scldm.fit(adata, ["cell_type"], shards=shards | {"source.gene_column": "symbol"})
