"""What an autoencoder's latents know: whether they see counts, tell labels apart, and in how many directions they vary.

An encoder may learn which genes a cell expresses and nothing of how much. Every score of reconstruction stays decent
then, and nothing but such a test shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial.distance import pdist
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from launch.evaluation.reconstructed_cells import decoded, latents
from scldm.batch import GeneCounts
from scldm.evaluate.cells import Cells
from scldm.evaluate.reconstruction import mean_and_error
from scldm.pretrained import Pretrained

MOST_CELLS = 2_000  # that are looked at
NEIGHBOURS = 15
BLIND = 0.02  # of the distance between cells: a change of latents below it counts as none


def binarised(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Every expressed gene has one count."""
    return _with(counts, np.ones_like(counts.data))


def shuffled(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """A cell's counts are dealt anew among the genes that it expresses."""
    data = counts.data.copy()
    for start, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        data[start:end] = rng.permutation(data[start:end])
    return _with(counts, data)


def times_50(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Every count 50 times. An encoder that divides by the library size need not see it."""
    return _with(counts, 50 * counts.data)


DISTORTIONS: Mapping[str, tuple[str, Callable[[sp.csr_matrix, np.random.Generator], sp.csr_matrix]]] = {
    "binarised": ("counts set to 1", binarised),
    "shuffled": ("counts dealt anew among a cell's expressed genes", shuffled),
    "times_50": ("counts x 50", times_50),
}


def _with(counts: sp.csr_matrix, data: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def sight(
    model: Pretrained, counts: sp.csr_matrix, gene_ids_G: Tensor, seed: int, own_ND: np.ndarray | None = None
) -> dict[str, dict]:
    """distortion of the input -> `moved`: how far latents move, as a share of the median distance between cells.
    `nats`: by how much the true counts become less likely, mean over cells, with its standard error. Near 0, the
    encoder does not see what was distorted.

    own_ND: the latents of these counts, where they are known already
    """
    counts = sp.csr_matrix(counts, dtype=np.int64, copy=True)
    counts.eliminate_zeros()
    own_ND = latents(model, counts, gene_ids_G) if own_ND is None else own_ND
    between = float(np.median(pdist(own_ND))) if len(own_ND) > 1 else float("nan")
    own_n = _nll(model, counts, own_ND, gene_ids_G)
    out = {}
    for k, (name, (title, distort)) in enumerate(DISTORTIONS.items()):
        other_ND = latents(model, distort(counts, np.random.default_rng([seed, k])), gene_ids_G)
        moved = float(np.linalg.norm(other_ND - own_ND, axis=1).mean()) / between if between > 0 else None
        nats = mean_and_error(_nll(model, counts, other_ND, gene_ids_G) - own_n)
        out[name] = {"title": title, "moved": moved, "nats": nats}
    return out


@torch.no_grad()
def _nll(model: Pretrained, counts: sp.csr_matrix, latent_ND: np.ndarray, gene_ids_G: Tensor) -> np.ndarray:
    """Nats a cell of these counts under what the latents decode to, (cells,)."""
    shape, parts = (model.vae.config.n_latents, model.vae.config.latent_width), []
    for start in range(0, len(latent_ND), model.batch):
        rows = slice(start, start + model.batch)
        of = GeneCounts(gene_ids_G, torch.from_numpy(counts[rows].toarray().astype(np.int32)).to(model.device))
        latent_BLZ = torch.from_numpy(latent_ND[rows]).float().unflatten(1, shape).to(model.device)
        predicted = decoded(model, latent_BLZ, gene_ids_G)
        parts.append(predicted.nll_B(of, of.counts_BS.sum(1).float()).cpu().numpy())
    return np.concatenate(parts)


def effective_dimension(latent_ND: np.ndarray) -> float:
    """In how many directions latents vary: (sum of l)^2 / sum of l^2 over the eigenvalues l of their covariance. It
    is 1 where all lie on a line. Source: the participation ratio, Gao et al. 2017."""
    values = np.linalg.svd(latent_ND - latent_ND.mean(0), compute_uv=False) ** 2
    return float(values.sum() ** 2 / np.square(values).sum()) if values.sum() > 0 else 0.0


def label_recall(train_ND: np.ndarray, train_n: np.ndarray, test_ND: np.ndarray, test_n: np.ndarray) -> float:
    """How well the 15 nearest training cells name a test cell's label: recall, mean over the test cells' labels."""
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train_n))).fit(train_ND, train_n)
    named = neighbours.predict(test_ND)
    return float(np.mean([(named[test_n == label] == label).mean() for label in np.unique(test_n)]))


def known_by_latents(model: Pretrained, train: Cells, test: Cells, gene_ids_G: Tensor, seed: int) -> dict:
    """JSON-ready: sight, effective dimension of the latents, and label recall by condition. Of each side at most 2,000
    cells are looked at, drawn under the seed. Genes are those that the model knows, the same on both sides."""
    rng = np.random.default_rng([seed, 11])
    train, test = (
        cells.select(np.sort(rng.choice(len(cells), MOST_CELLS, replace=False))) if len(cells) > MOST_CELLS else cells
        for cells in (train, test)
    )
    train_ND, test_ND = (latents(model, cells.counts, gene_ids_G) for cells in (train, test))
    recall = {c: label_recall(train_ND, train.labels[c], test_ND, test.labels[c]) for c in test.labels}
    return {
        "sight": sight(model, test.counts, gene_ids_G, seed, test_ND),
        "effective_dimension": effective_dimension(test_ND),
        "label_recall": recall,
        "cells": {"train": len(train), "test": len(test)},
    }


def blind_spots(found: Mapping[str, dict]) -> list[str]:
    """What the encoder does not see, in words, from `sight`. Multiplying counts is none."""
    seen = {name: of for name, of in found.items() if name != "times_50" and of["moved"] is not None}
    return [of["title"] for of in seen.values() if of["moved"] < BLIND]
