"""What a trained model knows of test cells: how well it gives them back, and which labels its latents tell.

Nothing is computed here but by `scldm.evaluate`: `Reconstruction` on all genes of the test cells, and a linear probe
and nearest neighbours that learn from the training cells' latents and are asked about the test cells'.
Reading order: METRICS, Known, reconstruction, told_by, scores_of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.cells import LabelledCells, Task
from scldm.evaluate.metrics import Metric
from scldm.evaluate.reconstruction import Reconstruction, log_profile, nb_nll
from scldm.evaluate.representation import classification, predictions

ROWS = 256  # cells that are dense at once: 256 x 60,000 genes x 8 B = 120 MB

METRICS: Mapping[str, Metric] = {
    "test_nll": Metric("test NLL", "RE: negative log-likelihood of test cells at their own latent, nats", "lowest"),
    "pcc_draw": Metric(
        "PCC, draw", "r of a gene over 128 test cells and one draw each, the published reading", "highest"
    ),
    "mse_draw": Metric(
        "MSE, draw", "of log1p counts per 10,000, one draw of each cell, the published reading", "lowest"
    ),
    "pcc_gene": Metric("PCC, genes", "r of a gene's log1p counts per 10,000 and its expectation over cells", "highest"),
    "pcc_cell": Metric("PCC, cells", "the same of a cell over all genes", "highest"),
    "mse": Metric("MSE, mean", "of log1p counts per 10,000 and the expectation", "lowest"),
    "probe_f1": Metric("probe F1", "macro F1 of a linear probe on latents, learnt from training cells", "highest"),
    "knn_recall": Metric("kNN recall", "recall of labels by the 15 nearest training cells in latents", "highest"),
}


@dataclass(frozen=True)
class Known:
    """latents: of the training and of the test cells, (n, d); none where a model has no latents
    reconstruction: what `Reconstruction.result` says of the test cells; none where a model has no likelihood
    """

    latents: tuple[np.ndarray, np.ndarray] | None = None
    reconstruction: Mapping[str, Any] | None = None


def reconstruction(
    cells: LabelledCells, expected: Callable[[LabelledCells], tuple[np.ndarray, np.ndarray]], seed: int
) -> dict[str, Any]:
    """Scores of a negative binomial model on these cells.

    expected: some cells -> their means (n, genes) and inverse dispersions (genes,)
    """
    found, rng = Reconstruction(), np.random.default_rng([seed, 13])
    for start in range(0, len(cells), ROWS):
        few = cells.select(np.arange(start, min(start + ROWS, len(cells))))
        mean_BG, theta_G = expected(few)
        drawn_BG = rng.poisson(rng.gamma(np.broadcast_to(theta_G, mean_BG.shape), mean_BG / theta_G))
        found.add(log_profile(few.counts.toarray()), mean_BG, drawn_BG, nb_nll(few.counts, mean_BG, theta_G))
    return found.result()


def told_by(train_ND: np.ndarray, test_ND: np.ndarray, train_n: np.ndarray, test_n: np.ndarray) -> dict[str, float]:
    """Macro F1 of the linear probe, and macro recall of 15 neighbours, on the test cells."""
    both_ND, labels_n = np.concatenate([train_ND, test_ND]), np.concatenate([train_n, test_n]).astype(str)
    fold = (np.arange(len(train_n)), np.arange(len(train_n), len(labels_n)))
    named, _ = predictions(lambda train, test: (both_ND[train], both_ND[test]), labels_n, [fold])
    linear, knn = (classification(labels_n[fold[1]], named[of][fold[1]]) for of in ("linear", "knn"))
    return {"probe_f1": linear["macro_f1"], "knn_recall": knn["macro_recall"]}


def scores_of(task: Task, known: Known) -> dict[str, float]:
    """Metric -> score. Those of labels are named after their condition too, such as `probe_f1, cell_type`."""
    out: dict[str, float | None] = {}
    if of := known.reconstruction:
        out |= {"test_nll": of["re"]["mean"], "pcc_draw": of["published"]["pcc"], "mse_draw": of["published"]["mse"]}
        out |= {name: of["ours"][name] for name in ("pcc_gene", "pcc_cell", "mse")}
    if known.latents is not None:
        for condition in task.conditions:
            labels = (cells.labels[condition].to_numpy() for cells in (task.train, task.test))
            out |= {f"{name}, {condition}": value for name, value in told_by(*known.latents, *labels).items()}
    return {name: float(value) for name, value in out.items() if value is not None}
