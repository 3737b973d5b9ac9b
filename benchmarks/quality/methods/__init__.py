"""The methods of the table, by name, and the models that several of them share.

Reading order: Method, METHODS, MODELS, chosen. The files: naive.py, gaussian.py, flow.py (used by the next two),
mlp.py, scvi_tools.py, ours.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.cells import Task
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.known import Known
from benchmarks.quality.methods import gaussian, mlp, naive, ours, scvi_tools
from benchmarks.quality.work import Made, Place
from scldm.errors import InputError

# control: real cells, or cells that have seen the test cells; a table marks the best of the others
Kind = Literal["control", "ours", "scvi", "mlp", "naive"]
Train = Callable[[Task, int, Path, Place], dict[str, Any]]
Draw = Callable[[Task, int, Path, Place], Made]
Know = Callable[[Task, int, Path, Place], Known]


@dataclass(frozen=True)
class Method:
    """title: what it is, in one line; draw: makes its cells; model: what must be trained for it, of MODELS

    known: what that model knows of test cells, in one row of each model
    shifts: it takes control cells to unseen combinations, and makes nothing else
    """

    title: str
    kind: Kind
    draw: Draw
    model: str = ""
    shifts: bool = False
    known: Know | None = None


MODELS: Mapping[str, Train] = {
    "ours": ours.train,
    "scvi": scvi_tools.train,
    "scvi_conditions": scvi_tools.train_with_conditions,
    "mlp": mlp.train,
}

METHODS: Mapping[str, Method] = {
    "training_cells": Method("training cells: the floor, and a model that copies", "control", naive.training_cells),
    "ours": Method(ours.TITLE, "ours", ours.generated, "ours", known=ours.known),
    "ours_gaussian": Method(
        "ours, a Gaussian per combination instead of the flow", "ours", ours.gaussian_latents, "ours"
    ),
    "ours_from_training_latents": Method(
        "ours, decoded from training cells' latents", "control", ours.from_training_latents, "ours"
    ),
    "ours_reconstructed": Method("ours, test cells encoded and decoded", "control", ours.reconstructed, "ours"),
    "scvi_prior": Method(
        "scVI with the conditions, from its prior",
        "scvi",
        scvi_tools.prior,
        "scvi_conditions",
        known=scvi_tools.known_with_conditions,
    ),
    "scvi_gaussian": Method("scVI, a Gaussian per combination in its latents", "scvi", scvi_tools.gaussian, "scvi"),
    "scvi_flow": Method(
        "scVI, a conditional flow on its latents", "scvi", scvi_tools.flow, "scvi", known=scvi_tools.known
    ),
    "mlp_flow": Method(
        "an MLP autoencoder, a conditional flow on its latents", "mlp", mlp.flow, "mlp", known=mlp.known
    ),
    "pca_gaussian": Method("PCA, a Gaussian per combination, Poisson", "naive", gaussian.pca, known=gaussian.known),
    "independent_genes": Method("each gene from another training cell", "naive", naive.independent_genes),
    "poisson_mean": Method("Poisson at each gene's mean", "naive", naive.poisson_mean, known=naive.known_by_means),
    "ours_transformed": Method(
        "ours, control cells through `scldm transform`", "ours", ours.transformed, "ours", shifts=True
    ),
    "control_shift": Method(
        "control cells + the other types' mean log-shift", "naive", naive.control_shift, shifts=True
    ),
    "scvi_shift": Method(
        "scVI, control latents + the other types' mean shift", "scvi", scvi_tools.shift, "scvi", shifts=True
    ),
    "control_near_shift": Method(
        "control cells + the near types' mean log-shift", "naive", partial(naive.control_shift, near=True), shifts=True
    ),
    "scvi_near_shift": Method(
        "scVI, control latents + the near types' mean shift",
        "scvi",
        partial(scvi_tools.shift, near=True),
        "scvi",
        shifts=True,
    ),
}


def chosen(config: QualityConfig, task: Task) -> list[str]:
    """Names of the methods to run. Raises: InputError for an unknown one, and for one that lacks what it needs."""
    for name in config.methods:
        if name not in METHODS:
            raise InputError(f"methods: {name!r} is unknown; there are: {', '.join(METHODS)}")
    names = list(config.methods) or [n for n, method in METHODS.items() if task.unseen or not method.shifts]
    for name in names:
        if METHODS[name].shifts and not (task.unseen and task.control):
            raise InputError(
                f"methods: {name} takes control cells to a combination that is held out: give held_out, and "
                "control=CONDITION=LABEL for the untreated cells"
            )
        if METHODS[name].kind == "scvi":
            scvi_tools.check_installed()
    return names
