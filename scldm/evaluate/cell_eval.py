"""What the package cell-eval (Arc Institute) says about generated perturbations: its own numbers, by its own code.

Its inputs are log1p of counts per 10,000 on both sides. Given counts, it would scale each side to its own median total.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.evaluate.space import log_normalise

PROFILES = ("full", "minimal", "vcc", "de", "anndata", "pds")
OF_MANY = ("clustering_agreement", "pearson_edistance")


def cell_eval_scores(
    real: ad.AnnData,
    generated: ad.AnnData,
    pert_col: str,
    control: str,
    profile: str = "full",
    configs: dict[str, dict[str, Any]] | None = None,
    skip: Sequence[str] = OF_MANY,
) -> dict[str, dict[str, float | None]]:
    """Perturbation -> metric -> number, of cells of one type: X holds raw counts, obs[pert_col] the perturbations.

    profile: which of its metrics: full, minimal, vcc, de, anndata or pds
    configs: metric -> arguments other than its defaults
    skip: metrics to leave out. By default the two that compare perturbations with each other, and need many
    None stands for a number that it can't tell.

    Raises: InputError where cell-eval is not installed, a label is missing on one side, or genes differ.
    """
    try:
        evaluate = importlib.import_module("cell_eval").MetricsEvaluator
    except ImportError as error:
        raise InputError(
            f"cell-eval is needed for its scores ({error}). Install it: pip install -c constraints.txt cell-eval"
        ) from None
    if profile not in PROFILES:
        raise InputError(f"profile={profile!r} is none of cell-eval's: {', '.join(PROFILES)}")
    if not real.var_names.equals(generated.var_names):
        raise InputError("cell-eval needs the same genes in the same order in real and generated cells")
    sides = {name: _side(cells, pert_col, name) for name, cells in (("real", real), ("generated", generated))}
    labels = {name: set(side.obs[pert_col]) for name, side in sides.items()}
    if control not in labels["real"]:
        raise InputError(f"{pert_col}={control!r} is no label of the real cells: {', '.join(sorted(labels['real']))}")
    if odd := sorted(labels["real"] ^ labels["generated"]):
        raise InputError(f"cell-eval needs the same labels of {pert_col} on both sides. On one only: {', '.join(odd)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()), _quiet():
        evaluator = evaluate(
            adata_pred=sides["generated"],
            adata_real=sides["real"],
            control_pert=control,
            pert_col=pert_col,
            num_threads=1,
            outdir=folder,
            pdex_kwargs={"is_log1p": True},
        )
        results, _ = evaluator.compute(
            profile=profile, metric_configs=configs, skip_metrics=list(skip), write_csv=False, break_on_error=True
        )
    rows = results.to_dicts()
    return {str(row.pop("perturbation")): {name: _number(value) for name, value in row.items()} for row in rows}


def _side(cells: ad.AnnData, pert_col: str, name: str) -> ad.AnnData:
    """A copy as cell-eval wants it."""
    if pert_col not in cells.obs:
        there = ", ".join(map(str, cells.obs.columns)) or "none"
        raise InputError(f"{name} cells: obs has no column {pert_col!r}. It has {there}")
    log = log_normalise(sp.csr_matrix(cells.X)).astype(np.float32)
    obs = pd.DataFrame({pert_col: pd.Categorical(np.asarray(cells.obs[pert_col]).astype(str))}, cells.obs_names)
    return ad.AnnData(log, obs, pd.DataFrame(index=cells.var_names))


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its loggers say at every call that the folder, which it demands, exists."""
    loggers = [logging.getLogger(name) for name in ("cell_eval", "pdex")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
