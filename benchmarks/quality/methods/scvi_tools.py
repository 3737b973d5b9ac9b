"""scVI as scvi-tools has it: default architecture, negative binomial, early stopping on the validation cells.

Source: Lopez et al. 2018; Gayoso et al. 2022 (scvi-tools).
Reading order: check_installed, training, the trained model and what it knows, its draws.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from benchmarks.quality.cells import LabelledCells, Task, library_sizes
from benchmarks.quality.known import ROWS, Known, reconstruction
from benchmarks.quality.methods import gaussian as gaussians
from benchmarks.quality.methods.flow import Latents
from benchmarks.quality.methods.mlp import flow_on
from benchmarks.quality.methods.naive import control_rows, mean_shift, not_shifted
from benchmarks.quality.work import FIRST_STAGE, Clock, Made, Place, labels_frame
from scldm.errors import InputError, read_json

MAX_EPOCHS = 5_000  # early stopping or the CPU time ends it
BATCH = 128  # scvi-tools' default


def check_installed() -> None:
    """Raises: InputError that says what to install."""
    if importlib.util.find_spec("scvi") is None:
        raise InputError(
            "methods: scVI's need the package scvi-tools: pip install -c constraints.txt -e '.[baselines]'; "
            "or name the other methods"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and hints of scvi-tools and Lightning, which are about neither data nor result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch  # noqa: F401  # sets the levels of its loggers

        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


# --- training ------------------------------------------------------------------------------------------------------


def train(task: Task, seed: int, folder: Path, place: Place) -> dict[str, Any]:
    """Without covariates. It leaves time for a flow on its latents."""
    return _train(task, seed, folder, FIRST_STAGE * place.config.seconds, conditioned=False)


def train_with_conditions(task: Task, seed: int, folder: Path, place: Place) -> dict[str, Any]:
    """With the conditions as categorical covariates of the decoder."""
    return _train(task, seed, folder, place.config.seconds, conditioned=True)


def _train(task: Task, seed: int, folder: Path, seconds: float, conditioned: bool) -> dict[str, Any]:
    with quiet():
        import lightning.pytorch as pl
        import scvi

        class BestWithin(pl.Callback):
            """Keeps the weights of the best validation ELBO, and ends the training when its CPU time is used."""

            best, epoch, n_epochs, state, ended = math.inf, 0, 0, dict[str, Any](), "early stop"

            def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                found = float(trainer.callback_metrics["elbo_validation"])
                self.n_epochs = trainer.current_epoch + 1
                if found < self.best:
                    self.best, self.epoch, self.state = found, self.n_epochs, copy.deepcopy(model.module.state_dict())

            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                if clock.cpu_s >= seconds:
                    self.ended, trainer.should_stop = "budget", True

        clock = Clock()  # importing scvi-tools takes seconds, which are not its training
        scvi.settings.seed = seed
        scvi.settings.verbosity = logging.ERROR
        model = scvi.model.SCVI(known_cells(task, conditioned), gene_likelihood="nb")
        kept = BestWithin()
        n, n_validation = len(task.train), len(task.validation)
        rows = [np.arange(n), np.arange(n, n + n_validation), np.array([], int)]
        model.train(
            max_epochs=MAX_EPOCHS,
            accelerator="cpu",
            devices=1,
            # batch norm can't take a last batch of one cell
            batch_size=next(size for size in range(BATCH, 1, -1) if n % size not in (1, 2)),
            early_stopping=True,
            check_val_every_n_epoch=1,
            datasplitter_kwargs={"external_indexing": rows},
            callbacks=[kept],
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        if kept.state:
            model.module.load_state_dict(kept.state)
        model.module.eval()
        model.save(folder / "scvi", overwrite=True, save_anndata=False)
        return {
            "epochs": kept.n_epochs,
            "best_epoch": kept.epoch,
            "validation_loss": kept.best if math.isfinite(kept.best) else None,
            "ended": kept.ended,
        }


def known_cells(task: Task, conditioned: bool) -> ad.AnnData:
    """Training and validation cells, registered with scvi-tools."""
    import scvi

    both = LabelledCells(
        sp.csr_matrix(sp.vstack([task.train.counts, task.validation.counts])),
        pd.concat([task.train.labels, task.validation.labels], ignore_index=True),
        task.genes,
    ).to_anndata()
    for name, known in task.codes.items():
        both.obs[name] = pd.Categorical(both.obs[name].astype(str), categories=list(known))
    names = list(task.conditions) if conditioned else None
    scvi.model.SCVI.setup_anndata(both, categorical_covariate_keys=names)
    return both


# --- the trained model ---------------------------------------------------------------------------------------------


class Trained:
    """The networks of a trained scVI, called on arrays."""

    def __init__(self, task: Task, model: Any, conditioned: bool) -> None:
        self.task, self.module, self.conditioned = task, model.module.eval(), conditioned

    @classmethod
    def load(cls, task: Task, folder: Path, conditioned: bool) -> Trained:
        with quiet():
            import scvi

            model = scvi.model.SCVI.load(folder / "scvi", adata=known_cells(task, conditioned), accelerator="cpu")
        return cls(task, model, conditioned)

    def _covariates(self, labels: pd.DataFrame) -> torch.Tensor | None:
        return torch.from_numpy(self.task.encoded(labels)) if self.conditioned else None

    @torch.no_grad()
    def encode(self, cells: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the cells' posteriors, (n, 10)."""
        means, stds = [], []
        for start in range(0, len(cells), ROWS):
            few = cells.select(np.arange(start, min(start + ROWS, len(cells))))
            x = torch.from_numpy(few.counts.toarray()).float()
            found = self.module.inference(
                x, torch.zeros(len(few), 1, dtype=torch.long), cat_covs=self._covariates(few.labels)
            )["qz"]
            means.append(found.loc.numpy())
            stds.append(found.scale.numpy())
        return np.concatenate(means).astype(np.float64), np.concatenate(stds).astype(np.float64)

    @torch.no_grad()
    def decode(self, values: np.ndarray, sizes: np.ndarray, labels: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Means (n, genes) and inverse dispersions (genes,) of latents at these library sizes, float64."""
        found = self.module.generative(
            torch.from_numpy(values).float(),
            torch.from_numpy(np.log(sizes)).float()[:, None],
            torch.zeros(len(values), 1, dtype=torch.long),
            cat_covs=self._covariates(labels),
        )["px"]
        return found.mu.double().numpy(), self.module.px_r.exp().double().numpy()

    def counts(
        self, values: np.ndarray, sizes: np.ndarray, labels: pd.DataFrame, rng: np.random.Generator
    ) -> sp.csr_matrix:
        """Negative binomial draws, CSR."""
        parts = []
        for start in range(0, len(values), ROWS):
            few = slice(start, start + ROWS)
            mu, theta = self.decode(values[few], sizes[few], labels.iloc[few])
            parts.append(sp.csr_matrix(gaussians.negative_binomial(mu, theta, rng)))
        return sp.csr_matrix(sp.vstack(parts))

    def expected(self, cells: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
        """Means and inverse dispersions of the cells, decoded from the mean of their own latent."""
        return self.decode(self.encode(cells)[0], cells.library_size, cells.labels)


def known(task: Task, seed: int, folder: Path, place: Place) -> Known:
    """Without covariates."""
    return _known(task, seed, folder, conditioned=False)


def known_with_conditions(task: Task, seed: int, folder: Path, place: Place) -> Known:
    """The true conditions are given to the decoder, so that its latents need not hold them."""
    return _known(task, seed, folder, conditioned=True)


def _known(task: Task, seed: int, folder: Path, conditioned: bool) -> Known:
    model = Trained.load(task, folder, conditioned)
    latents = model.encode(task.train)[0], model.encode(task.test)[0]
    return Known(latents, reconstruction(task.test, model.expected, seed))


# --- draws ---------------------------------------------------------------------------------------------------------


def prior(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """Latents from N(0, I), decoded with the combination's covariates."""
    model, rng = Trained.load(task, folder, conditioned=True), np.random.default_rng([seed, 7])
    wanted = task.wanted()
    sizes = [library_sizes(task.train, task.labels_of[key], n, rng) for key, n in task.numbers.items()]
    values = rng.standard_normal((len(wanted), model.module.n_latent))
    return Made(model.counts(values, np.concatenate(sizes), wanted, rng), wanted)


def gaussian(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """A Gaussian per combination fitted to the training cells' posteriors: their spread is part of it."""
    model, rng = Trained.load(task, folder, conditioned=False), np.random.default_rng([seed, 8])
    mean, std = model.encode(task.train)
    none = task.train.labels  # without covariates, decoding does not look at labels
    return gaussians.per_combination(
        task, mean, std**2, lambda values, sizes: model.counts(values, sizes, none, rng), seed
    )


def flow(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """The flow is trained in what scVI left of the CPU time."""
    model = Trained.load(task, folder, conditioned=False)
    train, validation = (
        Latents(*model.encode(cells), task.encoded(cells.labels)) for cells in (task.train, task.validation)
    )

    def decode(values: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
        return model.counts(values, sizes, task.train.labels, rng)

    left = place.config.seconds - read_json(folder / "trained.json")["cpu_s"]
    return flow_on(task, seed, left, train, validation, decode)


def shift(task: Task, seed: int, folder: Path, place: Place, near: bool = False) -> Made:
    """Control cells of the same kind: a draw of their posterior, plus the mean shift that the treatment has in the
    others' latents, decoded at their own library sizes.

    near: as for `mean_shift`
    """
    model, rng = Trained.load(task, folder, conditioned=False), np.random.default_rng([seed, 9])
    mean, std = model.encode(task.train)
    values, sizes, keys = [], [], []
    for key in task.unseen:
        n = task.numbers[key]
        rows = control_rows(task, key, n, rng)
        drawn = mean[rows] + std[rows] * rng.standard_normal((n, mean.shape[1]))
        values.append(drawn + mean_shift(task, key, lambda of: mean[of].mean(0), near))
        sizes.append(task.train.library_size[rows])
        keys += [key] * n
    labels = labels_frame(task, np.array(keys, object))
    counts = model.counts(np.concatenate(values), np.concatenate(sizes), labels, rng)
    return Made(counts, labels, not_shifted(task))
