"""Cells out of an autoencoder: the right genes, labels and library sizes, draws of what the decoder expects."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.covariance import LedoitWolf

from launch.evaluation import reconstructed_cells
from launch.evaluation.reconstructed_cells import GaussianFit, decoded_from_training, gaussian_latents, reconstructed
from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.pretrained import Pretrained
from tests.scldm.small_model import CONDITIONS, GENES, G, L, Z, library_sizes, networks

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def model() -> Pretrained:
    vae, dit = networks()
    return Pretrained(vae.requires_grad_(False), dit, GENES, CONDITIONS, library_sizes(), {}, "hash", batch=16)


def some_cells(numbers: dict[str, int], seed: int = 0) -> Cells:
    """25 of the model's genes in an order of their own, and one that it does not know; cells of `big` types have ten
    times the counts."""
    rng = np.random.default_rng(seed)
    genes = [GENES.ids[k] for k in rng.permutation(G)[:25]]
    genes.insert(3, "unknown")
    types = np.repeat(list(numbers), list(numbers.values()))
    order = rng.permutation(len(types))
    rate = np.where(np.char.startswith(types, "big"), 20.0, 2.0)[:, None]
    counts = rng.poisson(rate, (len(types), 26))
    donor = np.array(["d1", "d2"])[np.arange(len(types)) % 2]
    return Cells(
        sp.csr_matrix(counts[order]), types[order], tuple(genes), "some cells", labels={"t": types[order], "d": donor}
    )


def known(cells: Cells) -> tuple[str, ...]:
    return tuple(g for g in cells.genes if g != "unknown")


def total(cells: Cells) -> np.ndarray:
    """Library sizes over the genes that the model knows."""
    columns = [k for k, g in enumerate(cells.genes) if g != "unknown"]
    return np.asarray(cells.counts[:, columns].sum(1)).ravel()


# --- reconstructed -------------------------------------------------------------------------------------------------


def test_reconstructed_cells_are_counts_of_the_same_cells_in_the_genes_that_the_model_knows(model: Pretrained) -> None:
    cells = some_cells({"a": 30, "big": 20})
    made = reconstructed(model, cells, seed=0)
    assert made.genes == known(cells)
    assert made.counts.shape == (50, 25)
    assert made.counts.dtype == np.int32
    assert made.counts.data.min() > 0
    assert made.types.tolist() == cells.types.tolist()
    assert {name: of.tolist() for name, of in made.labels.items()} == {n: of.tolist() for n, of in cells.labels.items()}
    assert made.name == "some cells, reconstructed"


def test_the_seed_decides_and_the_batch_does_not(model: Pretrained) -> None:
    cells = some_cells({"a": 40})
    first, again, other = (reconstructed(model, cells, seed).counts for seed in (0, 0, 1))
    assert (first != again).nnz == 0
    assert (first != other).nnz > 200
    otherwise = reconstructed(replace(model, batch=7), cells, 0).counts
    # rounding moves a rate in its last digits: of 1,000 draws hardly one lies that near to the next count
    assert (first != otherwise).nnz <= 3


def test_the_mean_of_many_draws_is_what_the_model_expects(model: Pretrained) -> None:
    cells, n = some_cells({"a": 10, "big": 10}), 200
    mean = sum(reconstructed(model, cells, seed).counts.toarray() for seed in range(n)) / n
    adata = ad.AnnData(cells.counts.astype(np.float32), var=pd.DataFrame(index=pd.Index(cells.genes)))
    expected = np.asarray(model.reconstruct(adata).X)
    ids = torch.from_numpy(GENES.lookup(known(cells)))
    theta = model.vae.log_theta(ids).exp().detach().numpy().ravel()
    error = np.sqrt((expected + expected**2 / theta) / n)
    z = (mean - expected) / np.maximum(error, 1e-3)
    assert np.abs(z).max() < 6  # 500 numbers, their tails wider than a normal's
    assert abs(z.mean()) < 0.25
    np.testing.assert_allclose(mean.sum(1), total(cells), rtol=0.25)


def test_a_cell_without_counts_stays_without(model: Pretrained) -> None:
    cells = some_cells({"a": 20})
    dense = cells.counts.toarray()
    dense[5], dense[5, 3] = 0, 9  # only in the gene that the model does not know
    made = reconstructed(model, cells.with_counts(sp.csr_matrix(dense), cells.genes, "some"), 0)
    assert made.counts[5].nnz == 0
    assert (np.delete(made.counts.getnnz(1), 5) > 0).all()


def test_what_the_model_can_not_encode_is_refused(model: Pretrained) -> None:
    cells = some_cells({"a": 20})
    strange = Cells(cells.counts, cells.types, tuple(f"x{k}" for k in range(26)), "strange")
    with pytest.raises(InputError, match=r"0 of 30 genes matched \(0 %\)"):
        reconstructed(model, strange, 0)
    of_expressed = replace(model, origin={"vae": {"config": {"data": {"given": {"policy": "expressed"}}}}})
    with pytest.raises(InputError, match=r"data\.given\.policy=expressed"):
        reconstructed(of_expressed, cells, 0)


# --- from training cells -------------------------------------------------------------------------------------------


def test_as_many_training_cells_are_decoded_as_asked_each_once(model: Pretrained, monkeypatch) -> None:
    train, given = some_cells({"a": 30, "big": 20, "c": 5}), []
    monkeypatch.setattr(
        reconstructed_cells,
        "reconstructed",
        lambda m, cells, seed: (given.append(cells), reconstructed(m, cells, seed))[1],
    )
    made = decoded_from_training(model, train, {"a": 8, "big": 20}, np.random.default_rng(0))
    assert made.numbers() == {"big": 20, "a": 8}
    assert sorted(total(given[0])[given[0].types == "big"]) == sorted(total(train)[train.types == "big"])
    again = decoded_from_training(model, train, {"a": 8, "big": 20}, np.random.default_rng(0))
    other = decoded_from_training(model, train, {"a": 8, "big": 20}, np.random.default_rng(1))
    assert (made.counts != again.counts).nnz == 0
    assert (made.counts != other.counts).nnz > 0
    with pytest.raises(InputError, match="has 5 cells of 'c', and 6 are asked for"):
        decoded_from_training(model, train, {"c": 6}, np.random.default_rng(0))
    assert len(decoded_from_training(model, train, {}, np.random.default_rng(0))) == 0


# --- Gaussians -----------------------------------------------------------------------------------------------------


def test_a_gaussians_draws_have_the_mean_and_the_shrunk_covariance() -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((30, 6)) @ rng.standard_normal((6, 6)) + 5
    fit = GaussianFit.of(latents)
    reference = LedoitWolf().fit(latents)
    assert 0.01 < fit.shrinkage < 0.9
    assert fit.shrinkage == pytest.approx(reference.shrinkage_, rel=0.1)  # which takes 1/N, not 1/(N - 1)
    drawn = fit.draw(100_000, np.random.default_rng(1))
    wanted = reference.covariance_ * 30 / 29
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(drawn.mean(0), latents.mean(0), atol=0.02 * largest**0.5)
    np.testing.assert_allclose(np.cov(drawn.T), wanted, atol=0.04 * largest)
    with_others = GaussianFit.of(latents[:2], 3 * rng.standard_normal((500, 6)))
    drawn = with_others.draw(50_000, np.random.default_rng(1))
    np.testing.assert_allclose(drawn.mean(0), latents[:2].mean(0), atol=0.1)
    np.testing.assert_allclose(drawn.std(0), 3, rtol=0.15)


def test_gaussian_latents_give_cells_of_each_combination_with_its_library_sizes(model: Pretrained) -> None:
    train = some_cells({"a": 40, "big": 40})
    made = gaussian_latents(model, train, {"a": 50, "big": 60}, np.random.default_rng(0))
    assert made.types.tolist() == ["a"] * 50 + ["big"] * 60
    assert made.genes == known(train)
    assert made.counts.dtype == np.int32
    mean = {label: np.asarray(made.counts[made.types == label].sum(1)).mean() for label in ("a", "big")}
    for label, size in (("a", 50), ("big", 500)):  # 25 genes of 2 and 20 counts; theta is 1, few genes have the counts
        assert mean[label] == pytest.approx(size, rel=0.35)
    again = gaussian_latents(model, train, {"a": 50, "big": 60}, np.random.default_rng(0))
    other = gaussian_latents(model, train, {"a": 50, "big": 60}, np.random.default_rng(1))
    assert (made.counts != again.counts).nnz == 0
    assert (made.counts != other.counts).nnz > 0
    assert len(gaussian_latents(model, train, {}, np.random.default_rng(0))) == 0


def test_a_combination_of_few_cells_has_its_own_mean_and_the_others_covariance(
    model: Pretrained, capsys, monkeypatch
) -> None:
    fits, of = [], GaussianFit.of

    def spied(latents_ND: np.ndarray, within_ND: np.ndarray | None = None) -> GaussianFit:
        fits.append((latents_ND, within_ND))
        return of(latents_ND, within_ND)

    monkeypatch.setattr(GaussianFit, "of", spied)
    train = some_cells({"a": 40, "big": 12, "two": 2})
    made = gaussian_latents(model, train, {"a": 5, "two": 7}, np.random.default_rng(0))
    assert made.numbers() == {"two": 7, "a": 5}
    (of_a, own), (of_two, others) = fits
    assert (of_a.shape, own, of_two.shape) == ((40, L * Z), None, (2, L * Z))
    assert others.shape == (52, L * Z)  # of `a` and `big`, each around its own mean
    np.testing.assert_allclose(others[:40].mean(0), 0, atol=1e-12)
    said = capsys.readouterr().err
    assert "'two' (2) have fewer than 10 training cells" in said
    assert "within combinations of 10 cells or more" in said
    gaussian_latents(model, train, {"a": 5}, np.random.default_rng(0))
    assert capsys.readouterr().err == ""


def test_where_all_combinations_are_small_their_covariance_is_taken_and_one_cell_has_none(
    model: Pretrained, capsys
) -> None:
    train = some_cells({"two": 2, "three": 3, "one": 1})
    made = gaussian_latents(model, train, {"one": 4, "two": 4}, np.random.default_rng(0))
    assert made.numbers() == {"one": 4, "two": 4}
    assert "within combinations of 2 cells or more" in capsys.readouterr().err
    with pytest.raises(InputError, match="every combination has a single cell"):
        gaussian_latents(model, some_cells({"one": 1, "other": 1}), {"one": 4}, np.random.default_rng(0))
    with pytest.raises(InputError, match="has no cells of 'absent'"):
        gaussian_latents(model, train, {"absent": 1}, np.random.default_rng(0))


def test_no_more_latents_are_held_than_is_said(model: Pretrained, monkeypatch) -> None:
    sizes, of = [], GaussianFit.of

    def spied(latents_ND: np.ndarray, within_ND: np.ndarray | None = None) -> GaussianFit:
        sizes.append(len(latents_ND) if within_ND is None else len(within_ND))
        return of(latents_ND, within_ND)

    monkeypatch.setattr(GaussianFit, "of", spied)
    monkeypatch.setattr(reconstructed_cells, "MOST_CELLS", 24)
    gaussian_latents(model, some_cells({"a": 60, "big": 30, "two": 2}), {"a": 3, "two": 3}, np.random.default_rng(0))
    assert sizes == [24, 26]  # 16 of `a` and, as at least, 10 of `big`
