"""One training loop for both stages. What happens every n steps is written in it, in the order in which it happens.

Reading order: TrainConfig, train, validate.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from scldm.errors import InputError
from scldm.parallel.dist import World
from scldm.parallel.engine import Engine
from scldm.progress import Progress
from scldm.train import checkpoint
from scldm.train.ema import EMA
from scldm.train.losses import Draws, Stage, check_finite
from scldm.train.optim import OptimConfig, learning_rate
from scldm.train.tracking import Tracker


@dataclass(frozen=True)
class TrainConfig:
    """The course of a training run.

    steps: optimizer steps
    global_batch: cells per optimizer step, over all ranks
    seed: of weights and of every draw
    ema_decay: of the averaged weights, which are what is validated, exported and sampled
    log_every: steps between two rows of training metrics
    validate_every: steps between two passes over the validation cells
    save_every: steps between two checkpoints
    keep: checkpoints kept, besides the best
    """

    steps: int = 100_000
    global_batch: int = 1_024
    seed: int = 0
    ema_decay: float = 0.9999
    log_every: int = 50
    validate_every: int = 1_000
    save_every: int = 1_000
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "log_every", "validate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"train.ema_decay={self.ema_decay} must be at least 0 and below 1")


class Loader(Protocol):
    """What the loop asks of a stream: the micro-batches of this rank, one list per optimizer step, and its place."""

    def __next__(self) -> list[Any]: ...
    def one_pass(self) -> Iterator[list[Any]]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


def train(
    stage: Stage,
    engine: Engine,
    loader: Loader,
    validation: Loader,
    config: TrainConfig,
    optim: OptimConfig,
    world: World,
    run_dir: Path,
    tracker: Tracker,
    name: str,
) -> dict[str, float]:
    """Train to `config.steps`, from the last checkpoint in `run_dir` if there is one; returns validation metrics.

    Collective: every rank calls it with its own loader.
    """
    checkpoints = run_dir / "checkpoints"
    ema = EMA(engine, config.ema_decay)
    step, best, metrics = 0, float("inf"), {}
    latest = checkpoint.pointed(checkpoints / "latest")
    if latest is not None:
        state = checkpoint.load(latest, engine, ema)
        loader.load_state(state["loader"])
        step, best, metrics = state["step"], state["best"], state["validation"]

    meter = _Meter(world)
    with Progress(name, config.steps, "steps", done=step, shown=world.is_first) as bar:
        while step < config.steps:
            batches = meter.wait_for(loader)
            for batch in batches:
                batch = batch.to(world.device)
                loss, parts = stage.loss(engine.model, batch, Draws(config.seed, step, batch.positions_B))
                check_finite(loss, batch, step)
                engine.backward(loss / batch.n_cells)
                meter.add(loss, parts, batch)
            lr = learning_rate(optim, step, config.steps)
            grad_norm = engine.step(lr)
            ema.update()
            step += 1
            cells_seen = step * config.global_batch

            if step % config.log_every == 0 or step == config.steps:
                row = {**meter.read(), "lr": lr, "grad_norm": grad_norm}
                tracker.log(step, row, cells_seen=cells_seen)
                bar.advance(0, f"loss {row['loss']:.4g}, {row['cells_per_s']:,.0f} cells/s")
            bar.advance()

            due = step == config.steps or step % config.validate_every == 0
            if due:
                metrics = validate(stage, engine, ema, validation, config.seed, world)
                tracker.log(step, metrics, split="validation", cells_seen=cells_seen)
                meter.restart()
            is_best = due and metrics[stage.validation_metric] < best
            if is_best:
                best = metrics[stage.validation_metric]
            if is_best or step == config.steps or step % config.save_every == 0:
                state = {"step": step, "best": best, "validation": metrics, "loader": loader.state()}
                checkpoint.save(checkpoints, engine, ema, state, world, is_best)
                if world.is_first:
                    checkpoint.retain(checkpoints, config.keep)
                meter.restart()
    return metrics


@torch.no_grad()
def validate(stage: Stage, engine: Engine, ema: EMA, loader: Loader, seed: int, world: World) -> dict[str, float]:
    """Means over the validation cells, with averaged weights and the same draws every time; collective."""
    engine.module.eval()
    sums: dict[str, torch.Tensor] = {}
    n_cells = torch.zeros((), device=world.device)
    with ema.applied():
        # keyed by the batch's number, as no two batches of a pass may share their draws
        for number, batches in enumerate(loader.one_pass()):
            for batch in batches:
                batch = batch.to(world.device)
                parts = stage.validation(engine.model, batch, Draws(seed + 1, number, batch.positions_B))
                n_cells += batch.weight_B.sum()
                for key, value in parts.items():
                    sums[key] = sums.get(key, torch.zeros((), device=world.device)) + value
    engine.module.train()
    totals = world.sum({**{key: float(value) for key, value in sums.items()}, "n_cells": float(n_cells)})
    n = totals.pop("n_cells")
    return {key: value / n for key, value in totals.items()}


class _Meter:
    """Means of training metrics between two readings, over all ranks, and how fast cells passed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.restart()

    def restart(self) -> None:
        """Forget: what passed since the last reading was not training."""
        self.sums: dict[str, torch.Tensor] = {}
        self.n_cells = torch.zeros((), device=self.world.device)
        self.waited_s, self.start = 0.0, time.perf_counter()

    def wait_for(self, loader: Loader) -> Iterable[Any]:
        began = time.perf_counter()
        batches = next(loader)
        self.waited_s += time.perf_counter() - began
        return batches

    def add(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], batch: Any) -> None:
        for key, value in {"loss": loss, **parts}.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.n_cells += batch.weight_B.sum()

    def read(self) -> dict[str, float]:
        """Collective."""
        elapsed = time.perf_counter() - self.start
        sums = {key: float(value) for key, value in self.sums.items()}
        totals = self.world.sum({**sums, "n_cells": float(self.n_cells), "waited_s": self.waited_s})
        n, waited_s = totals.pop("n_cells"), totals.pop("waited_s")
        self.restart()
        return {
            **{key: value / n for key, value in totals.items()},
            "cells_per_s": n / elapsed,
            "waiting_share": waited_s / self.world.size / elapsed,
        }
