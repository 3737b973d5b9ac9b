"""Cells out of a model's autoencoder, for an evaluation: each limits what generated cells can reach, in another way.

reconstructed: test cells, encoded and decoded again. What they lose, the autoencoder loses.
decoded_from_training: training cells, encoded and decoded again. A perfect flow would make such cells.
gaussian_latents: latents from a Gaussian for each combination, decoded. A flow should be nearer to the real cells.

All decode with the library sizes of real cells, and draw counts. Genes are those of the cells that the model knows.
Cells are dense a batch at a time.

Reading order: known_genes, encode and decode, the three kinds, GaussianFit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm import draws
from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.evaluate.baselines import rows_per_type
from scldm.evaluate.cells import Cells, with_genes
from scldm.model.all_genes import encoder_of
from scldm.model.predicted import Predicted
from scldm.pretrained import Pretrained, written

LEAST_CELLS = 10  # of a combination that has a covariance of its own
MOST_CELLS = 5_000  # whose latents are held at once: 5,000 x 128 tokens x 16 numbers x 8 B = 82 MB

# --- encode and decode ---------------------------------------------------------------------------------------------


def known_genes(model: Pretrained, cells: Cells) -> tuple[Cells, Tensor]:
    """The cells with the genes that the model knows, in the cells' order, and the model's indices of these.

    Raises: InputError where there are none, or where the autoencoder was trained on cells that are given otherwise.
    """
    one = sp.csr_matrix((1, len(cells.genes)), dtype=np.float32)  # its genes are what is checked
    model.counted(ad.AnnData(one, var=pd.DataFrame(index=pd.Index(cells.genes))))  # raises
    index = model.genes.lookup(cells.genes)
    genes = tuple(gene for gene, k in zip(cells.genes, index, strict=True) if k)
    return with_genes(cells, genes), torch.from_numpy(index[index > 0]).to(model.device)


class Block(NamedTuple):
    """Some cells: their rows, raw counts with all genes, latents at the posterior mean, library sizes."""

    rows: slice
    given: GeneCounts
    latent_BLZ: Tensor
    size_B: Tensor


@torch.no_grad()
def encoded(model: Pretrained, counts: sp.csr_matrix, gene_ids_G: Tensor) -> Iterator[Block]:
    """The cells in order, `model.batch` at a time, given all genes. A cell without counts is encoded too."""
    n = len(counts.indptr) - 1
    encode = encoder_of(model.vae, gene_ids_G, counts.getnnz(0) / max(n, 1))
    for start in range(0, n, model.batch):
        rows = slice(start, min(start + model.batch, n))
        dense_BG = torch.from_numpy(counts[rows].toarray().astype(np.int32)).to(model.device)
        with model.computing():
            latent_BLZ = encode(dense_BG).mean_BLZ
        yield Block(rows, GeneCounts(gene_ids_G, dense_BG), latent_BLZ, dense_BG.sum(1).float())


def latents(model: Pretrained, counts: sp.csr_matrix, gene_ids_G: Tensor) -> np.ndarray:
    """Posterior means of the cells, token after token, float64, (cells, L * Z)."""
    blocks = [block.latent_BLZ.flatten(1).double().cpu().numpy() for block in encoded(model, counts, gene_ids_G)]
    return np.concatenate(blocks)


@torch.no_grad()
def decoded(model: Pretrained, latent_BLZ: Tensor, gene_ids_G: Tensor) -> Predicted:
    """The distributions of counts, of which the library size is a cell's total over these genes."""
    with model.computing():
        return model.vae.decode(latent_BLZ, gene_ids_G)


def drawn(
    model: Pretrained, latent_BLZ: Tensor, gene_ids_G: Tensor, size_B: Tensor, first: int, seed: int
) -> sp.csr_matrix:
    """Counts of the cells whose numbers begin at `first`, one draw a cell, (B, G)."""
    numbers_B = torch.arange(first, first + len(size_B), device=model.device)
    predicted = decoded(model, latent_BLZ, gene_ids_G)
    return written(predicted, "counts", size_B, draws.keys(seed, "counts", numbers_B, gene_ids_G))


# --- the three kinds -----------------------------------------------------------------------------------------------


def reconstructed(model: Pretrained, cells: Cells, seed: int, check: Callable[[], None] = lambda: None) -> Cells:
    """The cells, encoded and decoded with their own library sizes, one draw of counts each. A cell without counts in
    genes that the model knows stays without.

    seed: of the draws. That of a gene depends on the seed, the gene and the cell's row alone
    check: is called before each batch is decoded, and may raise

    Raises: InputError as `known_genes`.
    """
    known, gene_ids_G = known_genes(model, cells)
    parts = list[sp.csr_matrix]()
    for block in encoded(model, known.counts, gene_ids_G):
        check()
        parts.append(drawn(model, block.latent_BLZ, gene_ids_G, block.size_B, block.rows.start, seed))
    return known.with_counts(_stacked(parts, known), known.genes, f"{cells.name}, reconstructed")


def decoded_from_training(
    model: Pretrained, train: Cells, numbers: Mapping[str, int], rng: np.random.Generator
) -> Cells:
    """Training cells, `numbers[label]` of each combination without replacement, encoded and decoded with their own
    library sizes, one draw of counts each.

    Raises: InputError where a combination has fewer training cells than asked for, and as `known_genes`.
    """
    there = train.numbers()
    for label, n in numbers.items():
        if n > there.get(label, 0):
            raise InputError(f"{train.name} has {there.get(label, 0)} cells of {label!r}, and {n} are asked for")
    rows = rows_per_type(train.types, numbers, rng) if numbers else np.empty(0, np.int64)
    return reconstructed(model, train.select(rows), _seed(rng))


def gaussian_latents(model: Pretrained, train: Cells, numbers: Mapping[str, int], rng: np.random.Generator) -> Cells:
    """Cells whose latents are drawn from a Gaussian for each combination, fitted to its training cells' latents
    (`GaussianFit`). They are decoded with library sizes drawn, with replacement, from these training cells.

    A combination of more than MOST_CELLS training cells is fitted to that many of them. One of fewer than LEAST_CELLS
    has its own mean, and the covariance within the combinations of LEAST_CELLS or more, which is printed. Where no
    combination has so many, 2 cells do.

    Raises: InputError for a combination without training cells, where every combination has a single cell, and as
        `known_genes`.
    """
    known, gene_ids_G = known_genes(model, train)
    there = known.numbers()
    if missing := [label for label in numbers if not there.get(label)]:
        raise InputError(f"{train.name} has no cells of {missing[0]!r}: no Gaussian can be fitted to their latents")
    few = [label for label in numbers if there[label] < LEAST_CELLS]
    within_ND = _within_others(model, known, gene_ids_G, rng) if few else None
    seed, shape = _seed(rng), (model.vae.config.n_latents, model.vae.config.latent_width)
    parts, rows, first = [], [np.empty(0, np.int64)], 0
    for label, n in numbers.items():
        of_label = np.flatnonzero(known.types == label)
        latents_ND = latents(model, known.counts[_at_most(of_label, MOST_CELLS, rng)], gene_ids_G)
        fit = GaussianFit.of(latents_ND, within_ND if label in few else None)
        rows_n = rng.choice(of_label, n)
        size_n = np.asarray(known.counts[rows_n].sum(1), np.float32).ravel()
        for start in range(0, n, model.batch):
            size_B = torch.from_numpy(size_n[start : start + model.batch]).to(model.device)
            latent_BLZ = torch.from_numpy(fit.draw(len(size_B), rng)).to(model.device).unflatten(1, shape)
            latent_BLZ = model.vae.normalised(latent_BLZ)
            parts.append(drawn(model, latent_BLZ, gene_ids_G, size_B, first, seed))
            first += len(size_B)
        rows.append(rows_n)
    if few:
        shown = ", ".join(f"{label!r} ({there[label]})" for label in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        print(
            f"Gaussian latents: {shown}{more} have fewer than {LEAST_CELLS} training cells. Their covariance is that "
            f"within combinations of {_least(there)} cells or more.",
            file=sys.stderr,
        )
    cells = known.select(np.concatenate(rows))
    return cells.with_counts(_stacked(parts, known), known.genes, f"{train.name}, Gaussian latents")


def _within_others(model: Pretrained, cells: Cells, gene_ids_G: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Latents less their combination's mean, (n, L * Z), of combinations of LEAST_CELLS cells or more. Where none has
    so many, of those of 2 or more. About MOST_CELLS cells in all, in the shares that these have."""
    numbers = cells.numbers()
    least = _least(numbers)
    there = {label: n for label, n in numbers.items() if n >= least}
    if not there:
        raise InputError(
            f"{cells.name}: every combination has a single cell, so that there is no covariance of latents to draw "
            "from. Give more cells, or fewer conditions"
        )
    share, parts, n_parts = min(1.0, MOST_CELLS / sum(there.values())), [], 0
    for label, n in there.items():  # most cells first
        if n_parts >= MOST_CELLS:
            break
        of_label = _at_most(np.flatnonzero(cells.types == label), max(LEAST_CELLS, round(n * share)), rng)
        latents_ND = latents(model, cells.counts[of_label], gene_ids_G)
        parts.append(residuals(latents_ND))
        n_parts += len(latents_ND)
    return np.concatenate(parts)


def _least(numbers: Mapping[str, int]) -> int:
    """Cells of a combination whose covariance may stand for that of one of few."""
    return LEAST_CELLS if max(numbers.values()) >= LEAST_CELLS else 2


def _at_most(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))


def _stacked(parts: list[sp.csr_matrix], cells: Cells) -> sp.csr_matrix:
    """The blocks below each other. A matrix without rows where no cells were asked for."""
    return sp.csr_matrix(sp.vstack(parts)) if parts else sp.csr_matrix((0, len(cells.genes)), dtype=np.int32)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


# --- a Gaussian ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianFit:
    """N(mean, (1 - s) S + s m I): S is the covariance of the residuals, m the mean of its diagonal, and s says how far
    it is shrunk. Nothing of size D x D is made, so that 2,048 latent numbers cost no more than the cells.
    Source: Ledoit & Wolf 2004, with s as scikit-learn estimates it.
    """

    mean_D: np.ndarray
    residual_ND: np.ndarray
    shrinkage: float

    @classmethod
    def of(cls, latents_ND: np.ndarray, within_ND: np.ndarray | None = None) -> GaussianFit:
        """within_ND: residuals of other cells, around a mean of 0, whose covariance is taken instead."""
        from sklearn.covariance import ledoit_wolf_shrinkage

        mean_D = latents_ND.mean(0)
        residual_ND = residuals(latents_ND) if within_ND is None else within_ND
        # numbers that never vary are as they are: nothing to shrink
        some = bool(np.ptp(residual_ND, axis=0).any())
        shrinkage = float(ledoit_wolf_shrinkage(residual_ND, assume_centered=True)) if some else 0.0
        return cls(mean_D, residual_ND, shrinkage)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """float32, (n, D): residuals summed with normal weights have their covariance S."""
        n_residuals, n_numbers = self.residual_ND.shape
        of_cells_nD = rng.standard_normal((n, n_residuals)) @ self.residual_ND / n_residuals**0.5
        scale = float(np.square(self.residual_ND).mean()) ** 0.5
        even_nD = rng.standard_normal((n, n_numbers)) * scale
        mixed_nD = (1 - self.shrinkage) ** 0.5 * of_cells_nD + self.shrinkage**0.5 * even_nD
        return (self.mean_D + mixed_nD).astype(np.float32)


def residuals(latents_ND: np.ndarray) -> np.ndarray:
    """Cells less their mean, times sqrt(N / (N - 1)): the mean takes a part of 1/N of the variance with it."""
    n = len(latents_ND)
    assert n > 1, "one cell has no spread"
    return (latents_ND - latents_ND.mean(0)) * (n / (n - 1)) ** 0.5
