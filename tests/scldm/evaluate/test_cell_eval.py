"""cell-eval's numbers through its wrapper, and ours of the same name beside them."""

from __future__ import annotations

import importlib.util
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import false_discovery_control, norm

from scldm.errors import InputError
from scldm.evaluate.cell_eval import cell_eval_scores
from scldm.evaluate.changes import Blocks, Pair
from scldm.evaluate.response import agreement

needs_cell_eval = pytest.mark.skipif(
    importlib.util.find_spec("cell_eval") is None,
    reason="needs the package cell-eval: pip install -c constraints.txt cell-eval",
)
GENES = 150


@pytest.fixture(scope="module")
def sides() -> list[ad.AnnData]:
    """Real and generated cells: 60 controls and 60 each of two drugs that change 30 genes, in part others."""
    rng = np.random.default_rng(0)
    mean_G = rng.lognormal(0.5, 1, GENES)
    drugs = np.repeat(["control", "a", "b"], 60)
    change = {"control": np.zeros(GENES)}
    for drug in "ab":
        change[drug] = np.where(rng.permutation(GENES) < 30, rng.normal(0, 1, GENES), 0)
    sides = []
    for scale in (1.0, 0.7):
        mean_BG = np.concatenate([np.tile(mean_G * 2 ** (scale * change[d]), (60, 1)) for d in ("control", "a", "b")])
        counts = sp.csr_matrix(rng.poisson(rng.gamma(3, mean_BG / 3)).astype(np.float32))
        obs = pd.DataFrame({"drug": drugs}, index=pd.Index([f"cell{k}" for k in range(180)]))
        sides.append(ad.AnnData(counts, obs, pd.DataFrame(index=pd.Index([f"g{k}" for k in range(GENES)]))))
    return sides


def pair(cells: ad.AnnData, drug: str) -> Pair:
    rng, of = np.random.default_rng(0), cells.obs["drug"].to_numpy()
    return Pair(*(Blocks.of_counts(sp.csr_matrix(cells.X)[np.flatnonzero(of == x)], rng) for x in (drug, "control")))


@pytest.mark.slow
@needs_cell_eval
@pytest.mark.filterwarnings("default")  # that of a package is not ours to mend
def test_equal_quantities_have_equal_numbers(sides: list[ad.AnnData]) -> None:
    from cell_eval import DESortBy  # pyright: ignore[reportMissingImports]

    # theirs are the genes of an FDR below 5 % by fold change; the same list as ours by p of all genes
    ours = {"fdr_threshold": 1.1, "sort_by": DESortBy.PVALUE}
    theirs = cell_eval_scores(*sides, "drug", "control", configs={"overlap_at_50": ours})
    assert set(theirs) == {"a", "b"}
    for drug, found in theirs.items():
        real, generated = (pair(side, drug) for side in sides)
        expected = agreement(real, generated)
        # float32 sums of theirs
        assert found["pearson_delta"] == pytest.approx(expected["delta_r"], rel=1e-4)
        assert found["mae_delta"] == pytest.approx(expected["delta_mae"], rel=1e-4)
        assert found["overlap_at_50"] == pytest.approx(expected["overlap_50"])
        significant = [false_discovery_control(2 * norm.sf(np.abs(p.z))) < 0.05 for p in (real, generated)]
        assert found["de_nsig_counts_real"] == significant[0].sum() > 5
        assert found["de_nsig_counts_pred"] == significant[1].sum()
        same = np.sign(real.log1p_change) == np.sign(generated.log1p_change)
        assert found["de_direction_match"] == pytest.approx(same[significant[0]].mean())


@needs_cell_eval
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda real, made: (real, made[:, ::-1].copy()), "same genes in the same order"),
        (lambda real, made: (real, made[made.obs["drug"] != "b"].copy()), "On one only: b"),
        (lambda real, made: (real[real.obs["drug"] != "control"].copy(), made), "no label of the real cells: a, b"),
    ],
)
def test_what_does_not_fit_is_named(sides: list[ad.AnnData], change, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cell_eval_scores(*change(*sides), "drug", "control")


def test_without_the_package_the_line_to_type_is_named(sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cell_eval", None)
    with pytest.raises(InputError, match="pip install -c constraints.txt cell-eval"):
        cell_eval_scores(*sides, "drug", "control")
