"""A blind encoder is told from one that sees; dimensions and labels are those of the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from launch.evaluation import sight as module
from launch.evaluation.of_autoencoder import blindness
from launch.evaluation.sight import (
    binarised,
    blind_spots,
    effective_dimension,
    known_by_latents,
    label_recall,
    shuffled,
    sight,
)
from scldm.evaluate.cells import Cells
from scldm.pretrained import Pretrained
from tests.scldm.small_model import CONDITIONS, GENES, G, library_sizes, networks

RNG = np.random.default_rng(0)
COUNTS = sp.csr_matrix(RNG.poisson(2.0, (40, G)) * RNG.integers(1, 9, (40, G)))
EVERY = torch.arange(1, G + 1)


@pytest.fixture
def model() -> Pretrained:
    vae, dit = networks()
    vae, dit = (network.eval().requires_grad_(False) for network in (vae, dit))
    return Pretrained(vae, dit, GENES, CONDITIONS, library_sizes(), {}, "hash", batch=16)


def test_distortions_keep_which_genes_are_expressed() -> None:
    one, dealt = binarised(COUNTS, RNG), shuffled(COUNTS, RNG)
    for other in (one, dealt):
        assert ((other > 0) != (COUNTS > 0)).nnz == 0
    assert set(one.data) == {1}
    for row in range(40):
        np.testing.assert_array_equal(np.sort(dealt[row].data), np.sort(COUNTS[row].data))
    assert (dealt != COUNTS).nnz > 100


def test_an_encoder_that_sees_counts_is_moved_and_a_blind_one_is_not(model: Pretrained, monkeypatch: Any) -> None:
    """Blind: it is given every input binarised."""
    seen = sight(model, COUNTS, EVERY, 0)
    assert min(of["moved"] for of in seen.values()) > 0.05
    assert blind_spots(seen) == []
    really = module.latents
    monkeypatch.setattr(module, "latents", lambda model, counts, ids: really(model, binarised(counts, RNG), ids))
    blind = sight(model, COUNTS, EVERY, 0)
    assert max(of["moved"] for of in blind.values()) < 1e-6
    assert all(abs(of["nats"]["mean"]) < 1e-3 for of in blind.values())
    assert len(blind_spots(blind)) == 2
    assert "BLIND to counts" in blindness(blind)[0]


def test_the_true_counts_are_what_becomes_less_likely(model: Pretrained) -> None:
    """By the decoder, from the moved latents: not the likelihood of the distorted counts."""
    found = sight(model, COUNTS, EVERY, 0)["binarised"]["nats"]["mean"]
    own, other = (model.vae.encode(module.GeneCounts(EVERY, torch.from_numpy(c.toarray()).int())) for c in
                  (COUNTS, binarised(COUNTS, RNG)))  # fmt: skip
    true = module.GeneCounts(EVERY, torch.from_numpy(COUNTS.toarray()).int())
    size_B = true.counts_BS.sum(1).float()
    nll = [model.vae.decode(p.mean_BLZ, EVERY).nll_B(true, size_B).mean().item() for p in (own, other)]
    assert found == pytest.approx(nll[1] - nll[0], abs=1e-3 * abs(nll[0]))


def test_one_cell_has_no_other_to_compare_its_move_with(model: Pretrained) -> None:
    found = sight(model, COUNTS[:1], EVERY, 0)
    assert [of["moved"] for of in found.values()] == [None] * 3
    assert blind_spots(found) == []


def test_effective_dimension_counts_directions() -> None:
    rng = np.random.default_rng(0)
    line, round_ = rng.normal(size=(4_000, 1)) @ np.ones((1, 6)), rng.normal(size=(4_000, 6))
    assert effective_dimension(line) == pytest.approx(1)
    assert effective_dimension(round_) == pytest.approx(6, rel=0.02)
    assert effective_dimension(np.ones((5, 3))) == 0


def test_recall_weighs_labels_alike() -> None:
    """Three of four rare cells are named right, and all of a hundred others: 0.875, where accuracy has 0.99."""
    train, named = np.repeat([[0.0], [10.0]], 20, axis=0), np.repeat(["common", "rare"], 20)
    test = np.array([0.0] * 100 + [10.0] * 3 + [0.0])[:, None]
    assert label_recall(train, named, test, np.array(["common"] * 100 + ["rare"] * 4)) == pytest.approx(0.875)


def test_all_of_it_of_sets_with_two_conditions(model: Pretrained, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_CELLS", 30)
    labels = {"type": np.array(["a", "b"] * 20), "donor": np.array(["1"] * 20 + ["2"] * 20)}
    cells = Cells.of_labels(COUNTS, labels, GENES.ids, "cells")
    found = known_by_latents(model, cells, cells, EVERY, 0)
    assert found["cells"] == {"train": 30, "test": 30}
    assert set(found["label_recall"]) == {"type", "donor"}
    assert 1 <= found["effective_dimension"] <= 30
