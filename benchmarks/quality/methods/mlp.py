"""CFGen's idea: an MLP autoencoder of whole cells, then a flow on its latents.

log1p of the counts -> 512 -> 256 -> 50 -> 256 -> 512 -> share of each gene, times the cell's total; negative binomial
with a dispersion per gene; no prior on the latent. Source: Palma et al. 2025 (CFGen).
Reading order: Autoencoder, train; known, flow.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from benchmarks.quality.cells import LabelledCells, Task, library_sizes
from benchmarks.quality.known import ROWS, Known, reconstruction
from benchmarks.quality.methods.flow import Latents, train_flow
from benchmarks.quality.methods.gaussian import negative_binomial
from benchmarks.quality.work import FIRST_STAGE, Clock, Made, Place
from scldm.errors import read_json
from scldm.likelihood import nb_log_prob

HIDDEN, WIDTH = (512, 256), 50
BATCH, LR, WEIGHT_DECAY = 128, 1e-3, 1e-5
PATIENCE = 30  # epochs without a better validation loss


class Autoencoder(nn.Module):
    """counts (B, G) -> latent (B, 50) -> mean counts (B, G); theta is the inverse dispersion, (G,)."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.encoder = _layers(n_genes, *HIDDEN, WIDTH)
        self.decoder = _layers(WIDTH, *HIDDEN[::-1], n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    def encode(self, counts_BG: Tensor) -> Tensor:
        return self.encoder(torch.log1p(counts_BG))

    def decode(self, latent_BZ: Tensor, library_size_B: Tensor) -> Tensor:
        return self.decoder(latent_BZ).softmax(1) * library_size_B[:, None]

    def nll_B(self, counts_BG: Tensor) -> Tensor:
        """Negative log-likelihood of the counts at their own latent, nats a cell, (B,)."""
        mu_BG = self.decode(self.encode(counts_BG), counts_BG.sum(1))
        return -nb_log_prob(counts_BG, mu_BG, self.log_theta.exp()).sum(1)


def _layers(*widths: int) -> nn.Sequential:
    """Linear maps with batch norm and ELU between them."""
    layers: list[nn.Module] = []
    for k, (width, following) in enumerate(zip(widths, widths[1:])):
        layers.append(nn.Linear(width, following))
        if k < len(widths) - 2:
            layers += [nn.BatchNorm1d(following), nn.ELU()]
    return nn.Sequential(*layers)


def train(task: Task, seed: int, folder: Path, place: Place) -> dict[str, Any]:
    """The autoencoder at its best validation loss; it ends after 30 epochs without a better one, or at its share of
    the CPU time."""
    clock, seconds = Clock(), FIRST_STAGE * place.config.seconds
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 5])
    model = Autoencoder(len(task.genes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    best, state, best_epoch, epoch, ended = math.inf, model.state_dict(), 0, 0, ""
    while not ended:
        model.train()
        for rows in np.array_split(rng.permutation(len(task.train)), math.ceil(len(task.train) / BATCH)):
            loss = model.nll_B(dense(task.train, rows)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if clock.cpu_s >= seconds:
                ended = "budget"
                break
        epoch += 1
        found = nll(model, task.validation)
        if found < best:
            best, best_epoch, state = found, epoch, copy.deepcopy(model.state_dict())
        ended = ended or ("early stop" if epoch - best_epoch >= PATIENCE else "")
    torch.save(state, folder / "autoencoder.pt")
    model.load_state_dict(state)
    return {
        "epochs": epoch,
        "best_epoch": best_epoch,
        "validation_loss": best,
        "ended": ended,
    }


def dense(cells: LabelledCells, rows: np.ndarray | slice) -> Tensor:
    return torch.from_numpy(cells.counts[rows].toarray()).float()


@torch.no_grad()
def nll(model: Autoencoder, cells: LabelledCells) -> float:
    """Mean over the cells of their negative log-likelihood at their own latent, nats."""
    model.eval()
    parts = [model.nll_B(dense(cells, slice(k, k + ROWS))) for k in range(0, len(cells), ROWS)]
    return float(torch.cat(parts).mean())


def load(task: Task, folder: Path) -> Autoencoder:
    model = Autoencoder(len(task.genes))
    model.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
    return model.eval()


@torch.no_grad()
def encode(model: Autoencoder, cells: LabelledCells) -> np.ndarray:
    """Latents of the cells, (n, 50)."""
    parts = [model.encode(dense(cells, slice(k, k + ROWS))) for k in range(0, len(cells), ROWS)]
    return torch.cat(parts).numpy()


@torch.no_grad()
def known(task: Task, seed: int, folder: Path, place: Place) -> Known:
    model = load(task, folder)

    def expected(cells: LabelledCells) -> tuple[np.ndarray, np.ndarray]:
        sizes = torch.from_numpy(cells.library_size).float()
        mean_BG = model.decode(torch.from_numpy(encode(model, cells)), sizes)
        return mean_BG.double().numpy(), model.log_theta.exp().double().numpy()

    return Known((encode(model, task.train), encode(model, task.test)), reconstruction(task.test, expected, seed))


@torch.no_grad()
def flow(task: Task, seed: int, folder: Path, place: Place) -> Made:
    """The flow is trained in what the autoencoder left of the CPU time."""
    model = load(task, folder)

    def latents(cells: LabelledCells) -> Latents:
        mean = encode(model, cells)
        return Latents(mean, np.zeros_like(mean), task.encoded(cells.labels))

    def decode(values: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
        theta, parts = model.log_theta.exp().double().numpy(), []
        for k in range(0, len(values), ROWS):
            few = (torch.from_numpy(x[k : k + ROWS]).float() for x in (values, sizes))
            parts.append(sp.csr_matrix(negative_binomial(model.decode(*few).double().numpy(), theta, rng)))
        return sp.csr_matrix(sp.vstack(parts))

    left = place.config.seconds - read_json(folder / "trained.json")["cpu_s"]
    return flow_on(task, seed, left, latents(task.train), latents(task.validation), decode)


def flow_on(task: Task, seed: int, seconds: float, train: Latents, validation: Latents, decode) -> Made:
    """Cells of every combination, from a flow trained on these latents.

    decode: latents, library sizes and a generator -> counts
    """
    with torch.enable_grad():
        found = train_flow(train, validation, [len(known) for known in task.codes.values()], seconds, seed)
    rng = np.random.default_rng([seed, 6])
    wanted = task.wanted()
    sizes = [library_sizes(task.train, task.labels_of[key], n, rng) for key, n in task.numbers.items()]
    counts = decode(found.draw(task.encoded(wanted), seed), np.concatenate(sizes), rng)
    return Made(counts, wanted, train_cpu_s=found.cpu_s, facts=found.facts)
