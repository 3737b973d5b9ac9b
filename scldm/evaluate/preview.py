"""What a preview says in a training: genes of a few held-out cells beside what the model makes of these cells.

Moments are of raw counts. The library sizes are those of the held-out cells, so that nothing is normalised.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.evaluate.genes import Moments, gene_moments, pearson
from scldm.evaluate.memorisation import Nearness, memorisation_scores
from scldm.evaluate.response import guess_control, response
from scldm.evaluate.space import shape_of


def log_moments(counts: sp.csr_matrix) -> Moments:
    """log10 of mean and of variance of each gene's counts, and the share of cells that express it, each (genes,).

    Of a gene without counts in n cells both are taken as 0.5 / n: one count has a mean and a variance of 1 / n.
    """
    least = 0.5 / shape_of(counts)[0]
    mean, variance, fraction = gene_moments(sp.csr_matrix(counts, dtype=np.float64))
    return np.log10(np.maximum(mean, least)), np.log10(np.maximum(variance, least)), fraction


def gene_agreement(real: Moments, made: Moments) -> dict[str, float]:
    """How far moments agree over the genes that real cells express. log_mean_r, log_variance_r: Pearson correlation.
    log_mean_error, log_variance_error: mean absolute difference, in powers of ten. 0.3 is twofold."""
    expressed = real[2] > 0
    out: dict[str, float] = {}
    for name, x, y in (("log_mean", real[0], made[0]), ("log_variance", real[1], made[1])):
        out[f"{name}_r"] = pearson(x[expressed], y[expressed])
        out[f"{name}_error"] = float(np.abs(x[expressed] - y[expressed]).mean())
    return out


def responses_to(train: Cells, held_out: Cells, generated: Cells, seed: int) -> dict[str, float]:
    """Condition -> slope of the generated cells' log changes on those of held-out cells, over all labels with enough
    cells against the reference label. 1 is right. The reference is the label that is named like one, else the most
    frequent one. Cells of all other conditions are taken together. A condition is left out where too few cells, or no
    response beyond chance, let nothing be told.

    Source of the slope: scldm/evaluate/changes.py
    """
    out, sources = dict[str, float](), (train, held_out, generated)
    for name, labels_n in held_out.labels.items():
        labels, n = np.unique(labels_n, return_counts=True)
        control = guess_control(labels.tolist()) or str(labels[np.argmax(n)])
        one = [Cells(c.counts, c.labels[name], c.genes, c.name, 0, {name: c.labels[name]}) for c in sources]
        slope = response(one[0], one[1], one[2], name, control, seed=seed).pooled.get("slope")
        if slope is not None and slope.value is not None:
            out[name] = slope.value
    return out


def memorised(held_out: Nearness, generated: Nearness) -> dict[str, float]:
    """memorisation_ratio and closer_to_training of MEMORISATION. Empty where held-out cells coincide with training
    cells, so that there is no distance to compare with."""
    try:
        scores = memorisation_scores(held_out, generated)
    except InputError:
        return {}
    names = ("memorisation_ratio", "closer_to_training")
    return {name: scores[name] for name in names if np.isfinite(scores[name])}
