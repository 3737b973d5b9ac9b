"""The example cells are what they are called."""

from __future__ import annotations

import numpy as np

from scldm.examples import pbmc, perturbed


def test_pbmcs_have_whole_counts() -> None:
    cells = pbmc()
    assert cells.shape == (700, 765)
    assert cells.X.dtype == np.int32
    assert cells.X.sum() == 486_651
    assert cells.obs["cell_type"].nunique() == 10


def test_simulated_cells_respond_as_they_say() -> None:
    cells = perturbed(4_000)
    effect = cells.uns["log2_effect"]
    for kind in effect.index:
        of = cells[cells.obs["cell_type"] == kind]
        control, treated = (
            np.asarray(of[of.obs["treatment"] == name].X.mean(0)).ravel() for name in ("control", "treated")
        )
        enough = control > 0.3
        found = np.log2(treated[enough] / control[enough])
        assert np.abs(found - effect.loc[kind].to_numpy()[enough]).mean() < 0.2
    assert (perturbed(20).X != perturbed(20).X).nnz == 0
    assert (perturbed(20).X != perturbed(20, seed=1).X).nnz > 0
