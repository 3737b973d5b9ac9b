"""How well a label is told from an embedding, beside principal components of the same cells.

`scldm evaluate embedding=FILE label=cell_type` calls evaluate_embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from data_pipeline.convert.source_h5ad import find_counts
from launch.evaluation.config import EvaluateVerbConfig
from launch.evaluation.terminal import console, started
from scldm.cells_file import read_frame, read_names
from scldm.cells_opened import check_key, frame_of, open_cells, reading
from scldm.environment import describe
from scldm.errors import InputError
from scldm.evaluate.representation import N_COMPONENTS, SCORES, probe
from scldm.label_text import labels_of

CLASSIFIERS = {"linear": "linear probe", "knn": "15 nearest neighbours"}
SHOWN = 6  # labels in a sentence


def evaluate_embedding(config: EvaluateVerbConfig) -> dict:
    """Scores of a linear probe and of nearest neighbours.

    Raises: InputError for what is not there, or does not belong together.
    """
    file, label, held_out_by = config.embedding, config.label, config.held_out_by
    embedding_nD, obs = embedded(file, config.key)
    labels = labels_of(obs, label, file, "label")
    groups = labels_of(obs, held_out_by, file, "held_out_by") if held_out_by else None
    if held_out_by == label:
        raise InputError(f"held_out_by={held_out_by} is the label itself. Give a column such as the donor")
    counts = counts_of(config.real or file, config.layer, obs.index, file if config.real else "")
    found = probe(embedding_nD, labels, groups, config.evaluate.seed, counts)
    return {
        "kind": "representation",
        "embedding": {"file": file, "key": config.key, "width": embedding_nD.shape[1]},
        "counts": config.real or file,
        "label": label,
        "held_out_by": held_out_by,
        "seed": config.evaluate.seed,
        "cells": sum(found.labels.values()),
        **asdict(found),
        "made_with": describe(),
    }


def embedded(path: str, key: str) -> tuple[np.ndarray, pd.DataFrame]:
    """The embedding of a file, (cells, width), and its obs.

    Raises: InputError where there is none of that name.
    """
    with open_cells(path) as file, reading(path):
        check_key(file, key, path)
        found: Any = read_elem(file[f"obsm/{key}"])
        obs = read_frame(frame_of(file, "obs", path))
    matrix = found.toarray() if sp.issparse(found) else np.asarray(found, np.float64)
    if matrix.ndim != 2:
        raise InputError(f"{path}: obsm[{key!r}] has {matrix.ndim} dimensions. It must be a matrix (cells, width)")
    return matrix, obs


def counts_of(path: str, layer: str, names: pd.Index, embedding: str) -> sp.csr_matrix:
    """Counts of the cells with these names, CSR (cells, genes).

    embedding: file that the names come from. Empty: this one, whose rows they are

    Raises: InputError where there are no counts, or not of all these cells.
    """
    with open_cells(path) as file, reading(path):
        try:
            name = find_counts(file, layer, "layer")
        except InputError as error:
            more = "" if embedding else ". The baseline, PCA, needs them: real=FILE gives them for the same cells"
            raise InputError(f"{error}{more}") from None
        counts: Any = read_elem(file[name])
        there = read_names(frame_of(file, "obs", path))
    counts = sp.csr_matrix(counts)
    if not embedding:
        return counts
    for index, of in ((there, path), (names, embedding)):
        if not index.is_unique:
            raise InputError(f"{of}: cells have no names of their own. {index[index.duplicated()][0]!r} stands twice")
    rows = there.get_indexer(names.astype(str))
    if n := int((rows < 0).sum()):
        first = names[np.flatnonzero(rows < 0)[0]]
        raise InputError(f"{path} lacks {n:,} of the {len(names):,} cells of {embedding}, such as {first!r}")
    return counts[rows]


def show(evaluation: Mapping[str, Any]) -> None:
    """The table in the terminal, and what a reader must know of it."""
    title = f"{evaluation['label']} told from {evaluation['cells']:,} cells: {len(evaluation['labels'])} labels"
    columns = [name.replace("_", " ").replace("f1", "F1") for name in SCORES]
    table, terminal = started(title, columns, ("classifier", "features"), len("0.953 ± 0.012")), console(140)
    titles = {"embedding": f"embedding ({evaluation['embedding']['width']} wide)", "pca": "PCA of the counts"}
    for classifier, of_classifier in CLASSIFIERS.items():
        for features, scores in evaluation["scores"].items():
            texts = [f"{scores[classifier][s]['value']:.3f} ± {scores[classifier][s]['sd']:.3f}" for s in SCORES]
            table.add_row(of_classifier, titles[features], *texts)
    terminal.print(table)
    for line in notes(evaluation):
        terminal.print(line, soft_wrap=True)


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences below the table."""
    groups, n = evaluation["groups"], evaluation["n_folds"]
    if groups is None:
        held = f"{n} folds of single cells. Cells of one donor are on both sides, unless held_out_by names its column."
    else:
        held = (
            f"{n} folds of whole groups: {sum(map(len, groups))} of {evaluation['held_out_by']} are held out in turn."
        )
    lines = [
        held,
        "Every cell is predicted once. The number is that of all predictions, and ± is the standard deviation over "
        f"folds. The most frequent label alone has an accuracy of {evaluation['most_frequent']:.3f}.",
        f"PCA: {N_COMPONENTS} components of log1p counts per 10,000 or fewer, fitted on each fold's training cells.",
        "The embedding's model may have been trained on the held-out cells. PCA has never seen them.",
    ]
    if left := evaluation["left_out"]:
        named = "; ".join(f"{x['label']}: {x['cells']:,} cells, {x['reason']}" for x in left[:SHOWN])
        more = f"; and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        lines.append(f"{len(left)} labels are left out: {named}{more}.")
    if evaluation["drawn_of"]:
        lines.append(f"The cells were drawn from {evaluation['drawn_of']:,}.")
    if stopped := evaluation["not_converged"]:
        lines.append(f"The linear probe of {' and '.join(stopped)} stopped before it converged.")
    return lines
