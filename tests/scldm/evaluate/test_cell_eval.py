"""cell-eval's numbers, and ours of the same name beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import false_discovery_control, norm

from scldm.evaluate.changes import Blocks, Pair
from scldm.evaluate.response import agreement
from scldm.evaluate.space import log_normalise

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
@pytest.mark.skipif(
    importlib.util.find_spec("cell_eval") is None,
    reason="needs the package cell-eval: pip install -c constraints.txt cell-eval",
)
@pytest.mark.filterwarnings("default")  # that of a package is not ours to mend
def test_equal_quantities_have_equal_numbers(sides: list[ad.AnnData], tmp_path: Path) -> None:
    from cell_eval import DESortBy, MetricsEvaluator  # pyright: ignore[reportMissingImports]

    # given counts, it would scale each side to its own median total
    log = [ad.AnnData(log_normalise(sp.csr_matrix(of.X)).astype(np.float32), of.obs, of.var) for of in sides]
    evaluator = MetricsEvaluator(
        adata_pred=log[1], adata_real=log[0], control_pert="control", pert_col="drug", num_threads=1,
        outdir=str(tmp_path), pdex_kwargs={"is_log1p": True},
    )  # fmt: skip
    # theirs are the genes of an FDR below 5 % by fold change; the same list as ours by p of all genes
    ours = {"fdr_threshold": 1.1, "sort_by": DESortBy.PVALUE}
    of_many = ["clustering_agreement", "pearson_edistance"]  # they compare perturbations with each other
    results, _ = evaluator.compute(metric_configs={"overlap_at_50": ours}, skip_metrics=of_many, write_csv=False)
    theirs = {row.pop("perturbation"): row for row in results.to_dicts()}
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
