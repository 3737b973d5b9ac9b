"""Runs of a second: synthetic cells whose true rates are known, a loader over them, and both stages on either engine.

Reading order: Cells, the loaders, small_run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scldm.batch import CellBatch, GeneCounts, LatentBatch
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World
from scldm.parallel.engine import DeepSpeedEngine, FSDPEngine, HardwareConfig, PlainEngine, start_engine
from scldm.parallel.watch import Watch
from scldm.train import checkpoint, steps
from scldm.train.loop import TrainConfig, train
from scldm.train.losses import GuidanceConfig, LDMStage, Stage, VAEStage
from scldm.train.optim import OptimConfig, make_optimizer
from scldm.train.parts import KINDS
from scldm.train.previews import Make, Previews
from scldm.train.requests import Requests
from scldm.train.tracking import Tracker, TrackingConfig

N_GENES, N_LABELS, N_LATENTS, LATENT_WIDTH = 40, 3, 2, 4
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Cells:
    """n cells of N_LABELS types.

    rates_nG: true expected counts; theta: true inverse dispersion of every gene
    counts_nG: a draw from them; label_n; latent_nLZ: apart by type
    """

    rates_nG: np.ndarray
    counts_nG: np.ndarray
    label_n: np.ndarray
    latent_nLZ: np.ndarray
    theta: float = 5.0

    def __len__(self) -> int:
        return len(self.label_n)


def make_cells(n: int, seed: int, library_size: float = 400.0) -> Cells:
    """Types differ in a third of their genes; within a type a cell slides along one direction of its own."""
    profiles = np.random.default_rng(0)  # the same types for every seed: another seed is other cells of them
    log_share = profiles.normal(0, 1, N_GENES) + 2.0 * profiles.normal(0, 1, (N_LABELS, N_GENES)) * (
        profiles.random((N_LABELS, N_GENES)) < 1 / 3
    )
    slide = profiles.normal(0, 0.7, (N_LABELS, N_GENES))
    centre = 2 * profiles.normal(0, 1, (N_LABELS, N_LATENTS, LATENT_WIDTH))
    rng = np.random.default_rng([1, seed])
    label_n = rng.integers(0, N_LABELS, n)
    log_rate = log_share[label_n] + rng.normal(0, 1, (n, 1)) * slide[label_n]
    share = np.exp(log_rate) / np.exp(log_rate).sum(1, keepdims=True)
    rates = share * library_size * np.exp(rng.normal(0, 0.3, (n, 1)))
    counts = rng.poisson(rng.gamma(Cells.theta, rates / Cells.theta))
    counts[:, 0] += 1  # no cell is empty
    latents = centre[label_n] + rng.normal(0, 0.5, (n, N_LATENTS, LATENT_WIDTH))
    return Cells(rates, counts, label_n, latents.astype(np.float32))


# --- the loaders ---------------------------------------------------------------------------------------------------


@dataclass
class CellsLoader:
    """Epoch after epoch in an order of its own, the last global batch filled up with cells of weight 0.

    n_given: genes drawn for each global batch; 0 takes all
    fail_at: the step whose batch is never delivered, as where a job is killed
    read: the rows of every global batch that was asked for, this rank's part
    """

    cells: Cells
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    n_given: int = 0
    fail_at: int = -1
    step: int = 0
    read: list[tuple[int, list[int]]] = field(default_factory=list)

    def __next__(self) -> list[Any]:
        if self.step == self.fail_at:
            raise KeyboardInterrupt
        per_epoch = -(-len(self.cells) // self.global_batch)
        epoch, k = divmod(self.step, per_epoch)
        rows = np.random.default_rng([2, epoch]).permutation(len(self.cells))[k * self.global_batch :]
        batches = self._batches(rows[: self.global_batch], self.step)
        self.step += 1
        return batches

    def one_pass(self) -> Iterator[list[Any]]:
        for k in range(0, len(self.cells), self.global_batch):
            yield self._batches(np.arange(len(self.cells))[k : k + self.global_batch], 0)

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def _batches(self, rows: np.ndarray, step: int) -> list[Any]:
        n = len(rows)
        weight = (np.arange(self.global_batch) < n).astype(np.float32)
        rows = np.resize(rows, self.global_batch)
        share = self.global_batch // self.world_size
        starts = range(self.rank * share, (self.rank + 1) * share, self.micro_batch)
        self.read.append((step, rows[self.rank * share : (self.rank + 1) * share].tolist()))
        return [
            self.batch(rows[k : k + self.micro_batch], weight[k : k + self.micro_batch], k, n, step) for k in starts
        ]

    def batch(self, rows: np.ndarray, weight: np.ndarray, first: int, n: int, step: int) -> CellBatch:
        counts = torch.from_numpy(self.cells.counts_nG[rows])
        genes = torch.arange(1, N_GENES + 1)
        if self.n_given:
            genes = torch.from_numpy(1 + np.random.default_rng([3, step]).permutation(N_GENES)[: self.n_given])
        given = GeneCounts(genes, counts[:, genes - 1])
        return CellBatch(
            given=given,
            asked=given,
            library_size_B=given.counts_BS.sum(1).float(),
            library_size_all_B=counts.sum(1).float(),
            **self._rest(rows, weight, first, n),
        )

    def _rest(self, rows: np.ndarray, weight: np.ndarray, first: int, n: int) -> dict[str, Any]:
        ids = torch.from_numpy(rows)
        return {
            "weight_B": torch.from_numpy(weight),
            "conditions": {"type": torch.from_numpy(self.cells.label_n[rows])},
            "cell_ids_B2": torch.stack((torch.zeros_like(ids), ids), dim=1),
            "positions_B": torch.arange(first, first + len(rows)),
            "n_cells": n,
        }


class LatentsLoader(CellsLoader):
    """The same of latents."""

    def batch(self, rows: np.ndarray, weight: np.ndarray, first: int, n: int, step: int) -> LatentBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        latents = torch.from_numpy(self.cells.latent_nLZ[rows])
        sizes = torch.from_numpy(self.cells.counts_nG[rows].sum(1)).float()
        return LatentBatch(latent_BLZ=latents, library_size_all_B=sizes, **self._rest(rows, weight, first, n))


# --- the runs ------------------------------------------------------------------------------------------------------


def make_vae(kl_weight: float = 0.01, **how: Any) -> VAE:
    return VAE(VAEConfig(16, N_LATENTS, LATENT_WIDTH, 1, 2, 1, kl_weight, **how), N_GENES)


def make_dit(**how: Any) -> DiT:
    return DiT(DiTConfig(16, 2, 2, **how), N_LATENTS, LATENT_WIDTH, {"type": N_LABELS})


def stored(run_dir: Path, which: str = "latest") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """State and whole tensors of a run's checkpoint, after checking every byte."""
    target = steps.pointed(run_dir / "checkpoints" / which)
    assert target is not None
    found = checkpoint.Checkpoint(target)
    found.check()
    tensors = {f"{kind}/{name}": found.whole(kind, name) for kind in KINDS for name in found.shapes}
    return found.state, tensors | {f"buffer/{name}": value for name, value in found.buffers().items()}


def tensors_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors of checkpoints that are in memory, each time that one was read from now on."""
    read, alive, found = checkpoint.Checkpoint.read, list[weakref.ref[Any]](), list[int]()

    def counted(self: checkpoint.Checkpoint, *what: Any) -> torch.Tensor:
        tensor = read(self, *what)
        alive.append(weakref.ref(tensor.untyped_storage()))
        found.append(sum(one() is not None for one in alive))
        return tensor

    monkeypatch.setattr(checkpoint.Checkpoint, "read", counted)
    return found


@dataclass
class Finished:
    """What a run leaves in memory."""

    engine: PlainEngine | DeepSpeedEngine | FSDPEngine
    loader: CellsLoader
    metrics: dict[str, float]


def small_run(
    stage_name: str,
    run_dir: Path,
    *,
    steps: int = 20,
    hardware: HardwareConfig | None = None,
    world: World = ALONE,
    global_batch: int = 16,
    optim: OptimConfig | None = None,
    fail_at: int = -1,
    keep: int = 2,
    deepspeed: dict[str, Any] | None = None,
    how: dict[str, Any] | None = None,
    watch: Watch | None = None,
    disturb: Callable[[Stage, CellsLoader], None] = lambda stage, loader: None,
    preview: Callable[[torch.nn.Module], Make] | None = None,
    **every: Any,
) -> Finished:
    """Train `vae` or `ldm` on 50 cells as the verbs do, logging every step unless told otherwise.

    how: more of the model's config, such as recompute
    disturb: is given the stage and the loader, to make them fail
    preview: is given the network, and makes what makes previews, one at each validation
    """
    hardware = hardware or HardwareConfig(engine="plain", micro_batch=global_batch // world.size)
    config = TrainConfig(
        **{
            "steps": steps,
            "global_batch": global_batch,
            "ema_decay": 0.9,
            "log_every": 1,
            "validate_every": 6,
            "save_every": 5,
            "keep": keep,
            **every,
        }
    )
    optim = optim or OptimConfig(lr=3e-3, clip=2.0, weight_decay=0.01)
    torch.manual_seed(0)
    module = make_vae(**(how or {})) if stage_name == "vae" else make_dit(**(how or {}))
    stage: Stage = VAEStage(module) if isinstance(module, VAE) else LDMStage(module, GuidanceConfig(0.2))
    kind = CellsLoader if stage_name == "vae" else LatentsLoader
    place = (global_batch, hardware.micro_batch, world.rank, world.size)
    n_given = 24 if stage_name == "vae" else 0
    loader = kind(make_cells(50, 0), *place, n_given=n_given, fail_at=fail_at)
    disturb(stage, loader)
    validation = kind(make_cells(21, 1), *place)
    engine = start_engine(
        module, lambda m: make_optimizer(optim, m), hardware, optim.clip, world, global_batch, deepspeed
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    with (
        Tracker(run_dir, TrackingConfig(enabled=False), active=world.is_first) as tracker,
        Requests(run_dir, config.stop_signals, world) as requests,
    ):
        common = (config, optim, world, run_dir, tracker, stage_name, watch, requests)
        previews = Previews(run_dir, tracker, preview(module), 1.0) if preview else None
        metrics = train(stage, engine, loader, validation, *common, previews=previews)
    return Finished(engine, loader, metrics)
