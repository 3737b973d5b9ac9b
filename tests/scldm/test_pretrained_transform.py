"""Cells that a loaded model takes to other conditions: the way there, its ends, and what can not be transformed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from scldm.errors import InputError
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.pretrained import Pretrained
from tests.scldm.small_model import FEW, GENES, L, Z, cells, of_doses

FINE = SamplerConfig("heun", 240)


def labelled_cells(n: int = 70) -> Any:
    adata = cells(n)
    adata.obs["type"] = pd.Categorical(["T cell", "B cell"] * (n // 2))
    adata.obs["batch"] = range(n)
    return adata


@pytest.mark.heavy
def test_cells_taken_to_their_own_condition_are_the_same_cells(model: Pretrained) -> None:
    """Then the latent is the cell's own, and what is expected is what `reconstruct` expects."""
    adata = labelled_cells()
    adata = adata[adata.obs["type"] == "T cell"].copy()
    stay: Any = model.transform(adata, {"type": "T cell"}, sampler=FINE, kind="means")
    expected = model.reconstruct(adata).X
    np.testing.assert_allclose(stay.X.toarray(), expected, rtol=1e-3)
    moved: Any = model.transform(adata, {"type": "NK"}, sampler=FINE, kind="means")
    assert np.abs(moved.X.toarray() / expected - 1).max() > 0.01
    assert set(moved.obs["type"]) == {"NK"}
    assert list(moved.obs["scldm_source"]) == list(adata.obs_names) == list(moved.obs_names)
    np.testing.assert_allclose(np.asarray(moved.X.sum(1)).ravel(), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-4)


@pytest.mark.heavy
def test_between_two_conditions_cells_go_from_one_to_the_other(model: Pretrained) -> None:
    adata, alphas = labelled_cells(6), (0.0, 0.5, 1.0)
    way: Any = model.transform(adata, {"type": "NK"}, alphas=alphas, sampler=FINE, kind="means")
    assert list(way.obs["scldm_alpha"]) == [0.0] * 6 + [0.5] * 6 + [1.0] * 6
    assert list(way.obs["type"]) == list(adata.obs["type"]) + ["NK"] * 12
    assert way.obs_names[6] == "0-0.5"
    assert way.obs_names.is_unique
    assert list(way.obs["batch"]) == list(range(6)) * 3
    own, half, other = (way.X.toarray()[k : k + 6] for k in (0, 6, 12))
    np.testing.assert_allclose(own, model.reconstruct(adata).X, rtol=1e-3)
    far = np.linalg.norm(other - own)
    assert np.linalg.norm(half - own) < far
    assert np.linalg.norm(half - other) < far


@pytest.mark.heavy
def test_cells_are_shifted_to_a_combination_that_was_never_trained(model: Pretrained) -> None:
    """T cells go to donor d2 by the flow, as always; B cells, which d2 had none of, by the donors' shift."""
    labels = {"type": 3, "donor": 2}
    dit = DiT(DiTConfig(16, 1, 2), L, Z, labels, combinations_KC=torch.tensor([[0, 0], [0, 1], [1, 0]])).eval()
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.3)
    torch.manual_seed(0)
    dit.means.fit(torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.full((3,), 1e5), torch.randn(3, L, Z))
    dit.latent_std_LZ.fill_(0.5)
    model = replace(model, dit=dit.requires_grad_(False))
    adata = labelled_cells(6)
    adata.obs["donor"] = "d1"
    sampler = replace(FINE, guidance="shift")
    moved: Any = model.transform(adata, {"donor": "d2"}, alphas=(0.5, 1.0), sampler=sampler, kind="means")
    by_flow: Any = model.transform(adata, {"donor": "d2"}, alphas=(0.5, 1.0), sampler=FINE, kind="means")
    b = np.tile(adata.obs["type"] == "B cell", 2)
    np.testing.assert_allclose(moved.X[~b].toarray(), by_flow.X[~b].toarray(), rtol=1e-5)
    latent_BLZ = torch.from_numpy(model.embed(adata)).unflatten(1, (L, Z))
    way_LZ = 0.5 * (dit.means.shift_1[1] - dit.means.shift_1[0])
    size_B, every = torch.from_numpy(np.asarray(adata.X.sum(1)).ravel()), torch.arange(1, len(GENES.ids) + 1)
    expected = [
        model.vae.decode(model.vae.normalised(latent_BLZ + alpha * way_LZ), every).expected(size_B)
        for alpha in (0.5, 1.0)
    ]
    np.testing.assert_allclose(moved.X[b].toarray(), torch.cat(expected)[b].numpy(), rtol=1e-3)


def test_the_network_is_told_the_cells_own_library_sizes_and_what_they_are_of_other_labels(
    model: Pretrained, capsys: pytest.CaptureFixture
) -> None:
    """On the way to noise the cells' own. On the way back twice these, as NK have twice the counts of the others. A
    size unlike all of its kind, here 9,000, is told as the nearest."""
    usual = math.log(70)
    of_type = {("T cell",): LogNormal(50, usual, 0.5), ("B cell",): LogNormal(50, usual, 0.5)}
    of_type["NK",] = LogNormal(50, usual + math.log(2), 0.5)
    model = replace(model, library_sizes=LibrarySizeModel(("type",), {("type",): of_type}))
    told: list[torch.Tensor] = []
    hook = model.dit.register_forward_pre_hook(lambda _, __, named: told.append(named["size_B"]), with_kwargs=True)
    adata = labelled_cells(6)
    adata.X[0, 0] = 9_000
    model.transform(adata, {"type": "NK"}, sampler=FEW)
    hook.remove()
    assert len(told) == 2 * FEW.n_steps
    expected = np.asarray(adata.X.sum(1)).ravel()
    expected[0] = 70 * math.exp(2 * 0.5)
    for k, size_B in enumerate(told):
        np.testing.assert_allclose(size_B, expected * (1 if k < FEW.n_steps else 2), rtol=1e-5)
    assert "1 of 6 cells have a library size that few training cells of their labels have" in capsys.readouterr().err
    adata.X[0, 0] = 1
    model.transform(adata, {"type": "NK"}, sampler=FEW)
    assert "library size" not in capsys.readouterr().err


def test_a_files_own_columns_are_kept(model: Pretrained) -> None:
    """Many atlases have a column `source`."""
    adata = labelled_cells(4)
    adata.obs["source"], adata.obs["alpha"] = ["a", "b", "c", "d"], 7
    moved = model.transform(adata, {"type": "NK"}, sampler=FEW)
    assert list(moved.obs["source"]) == ["a", "b", "c", "d"]
    assert list(moved.obs["alpha"]) == [7] * 4
    assert list(moved.obs["scldm_source"]) == list(adata.obs_names)
    moved.X = adata.X
    with pytest.raises(
        InputError,
        match="obs has a column 'scldm_alpha': these cells were moved before.*in one call, as to=type=B cell,",
    ):
        model.transform(moved, {"type": "B cell"}, sampler=FEW)
    del moved.obs["scldm_alpha"], moved.obs["scldm_source"]
    assert model.transform(moved, {"type": "B cell"}, sampler=FEW).n_obs == 4


def test_bfloat16_takes_cells_nearly_to_the_same_place(model: Pretrained) -> None:
    coarse, adata = replace(model, precision="bfloat16"), labelled_cells(6)
    fine, made = (of.transform(adata, {"type": "NK"}, sampler=FEW, kind="means") for of in (model, coarse))
    assert 1e-4 < np.abs(made.X.toarray() / fine.X.toarray() - 1).max() < 0.1
    assert made.uns["scldm"]["precision"] == "bfloat16"


def test_the_way_to_noise_is_gone_once_for_all_alphas(model: Pretrained) -> None:
    cost = model.transform(labelled_cells(4), {"type": "NK"}, alphas=(0, 0.5, 1), sampler=FEW).uns["scldm"]
    assert cost["n_evaluations"] == 4 * 3 * (1 + 1 + 2 + 1)  # there; back along the own, both, and the other
    alone: Any = model.transform(labelled_cells(4), {"type": "NK"}, sampler=FEW, seed=2)
    among: Any = model.transform(labelled_cells(4), {"type": "NK"}, alphas=(0, 0.5, 1), sampler=FEW, seed=2)
    assert (among.X[8:] != alone.X).nnz == 0


def test_a_combination_without_a_token_is_told_in_transform_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, adata = of_doses(tmp_path), cells(4)
    adata.obs = pd.DataFrame({"dose": "0", "type": "T cell", "donor": "d1"}, index=adata.obs_names)
    model.transform(adata, {"dose": "1"}, sampler=FEW)
    assert "token" not in capsys.readouterr().err
    model.transform(adata, {"dose": "2.5"}, sampler=FEW)
    said = [line for line in capsys.readouterr().err.splitlines() if "token" in line]
    assert len(said) == 1
    assert said[0].startswith("dose=2.5, type=T cell, donor=d1: this combination was not trained and has no token")


def test_transformed_counts_are_drawn_by_cell(model: Pretrained) -> None:
    adata = labelled_cells()
    some = [GENES.ids[k] for k in (5, 2, 9)]
    made: Any = model.transform(adata, {"type": "NK"}, sampler=FEW, seed=3, genes=some)
    assert (made.X.dtype, made.X.format, list(made.var_names)) == (np.int32, "csr", some)
    again: Any = model.transform(adata, {"type": "NK"}, sampler=FEW, seed=3, genes=some)
    assert (made.X != again.X).nnz == 0
    other: Any = model.transform(adata, {"type": "NK"}, sampler=FEW, seed=4, genes=some)
    assert (made.X != other.X).nnz > 20


@pytest.mark.parametrize(
    "to, more, said",
    [
        ({}, {}, "to names no condition"),
        ({"typ": "NK"}, {}, "condition 'typ' is unknown. The model knows type, donor"),
        ({"type": "NKT"}, {}, "condition 'type' has no label 'NKT'. It has 'T cell', 'B cell', 'NK'"),
        ({"donor": "d1"}, {}, "obs has no column 'donor'. It has type, batch"),
        ({"type": "NK"}, {"by": ["batch"]}, "condition 'batch' is unknown"),
        ({"type": "NK"}, {"by": []}, "by must name 'type' too"),
        ({"type": "NK"}, {"alphas": (1.5,)}, "alphas=1.5 must be a number from 0 to 1"),
        ({"type": "NK"}, {"sampler": SamplerConfig("sde_heun", 3)}, "sampler.method=sde_heun can't be followed"),
        ({"type": "NK"}, {"genes": ["nix"]}, "gene 'nix' is not among"),
    ],
)
def test_what_can_not_be_transformed_is_said_in_one_line(model: Pretrained, to, more, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        model.transform(labelled_cells(4), to, **more)
    assert "\n" not in str(refusal.value)
