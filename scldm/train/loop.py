"""One training loop for both stages. What happens every n steps is written in it, in the order in which it happens.

Reading order: TrainConfig, train, validate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from scldm.errors import InputError
from scldm.parallel.dist import World
from scldm.parallel.engine import Engine
from scldm.parallel.watch import Watch
from scldm.progress import Progress
from scldm.train import checkpoint, nonfinite
from scldm.train.ema import EMA
from scldm.train.losses import Draws, Stage
from scldm.train.optim import OptimConfig, early_end, learning_rate
from scldm.train.requests import Asked, Requests, signal_named
from scldm.train.saver import Saver
from scldm.train.throughput import Meter, note_rank
from scldm.train.tracking import Tracker


@dataclass(frozen=True)
class TrainConfig:
    """The course of a training run.

    steps: optimizer steps
    global_batch: cells per optimizer step, over all ranks
    seed: of weights and of every draw
    ema_decay: of the averaged weights, which are what is validated, exported and sampled
    log_every: steps between two rows of training metrics
    rank_logs: also keep a file for each rank, ranks/K.jsonl: its own cells/s, waiting and memory
    validate_every: steps between two passes over the validation cells
    save_every: steps between two checkpoints
    keep: checkpoints kept, besides the best
    keep_every: those of every so many steps are kept too; 0 keeps none besides
    patience: validations without a better metric after which the run ends, with `hold` once its rate has fallen; 0 for
        never
    max_skipped: steps in a row that are skipped because the gradient is not finite; one more ends the run
    hang_s: seconds without progress, once training has begun, after which the run ends and leaves the stacks of all
        ranks; 0 for never
    stop_signals: save at a step that all ranks agree on, then exit with code 85
    """

    steps: int = 100_000
    global_batch: int = 1_024
    seed: int = 0
    ema_decay: float = 0.9999
    log_every: int = 50
    rank_logs: bool = False
    validate_every: int = 1_000
    save_every: int = 1_000
    keep: int = 2
    keep_every: int = 0
    patience: int = 0
    max_skipped: int = 3
    hang_s: float = 900.0
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "log_every", "validate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep_every", "patience", "max_skipped", "hang_s"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name}={getattr(self, name)} can't be negative")
        for name in self.stop_signals:
            signal_named(name)
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
    watch: Watch | None = None,
    requests: Requests | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Train to `config.steps`, from the last whole checkpoint in `run_dir` if there is one; returns validation metrics.

    Collective: every rank calls it with its own loader.

    Raises: Stopped where that was asked from outside, InputError where training or saving can't go on; on all ranks.
    """
    watch, requests = watch or Watch(world), requests or Requests(run_dir, (), world)
    ema, meter = EMA(engine, config.ema_decay), meter or Meter(world)
    # skipped: steps in a row; stale: validations since the best; end: the last step, sooner where patience ran out;
    # unvalidated: the validation that is due at this step is still to be made; all of it the same on every rank
    step, skipped, stale, best, metrics, unvalidated = 0, 0, 0, math.inf, dict[str, float](), False
    end = config.steps
    state = checkpoint.resume(run_dir / "checkpoints", engine, ema, world)
    if state is not None:
        loader.load_state(state["loader"])
        step, skipped, stale = state["step"], state["skipped"], state["stale"]
        meter.load_state(state["meter"])
        unvalidated = state["unvalidated"]
        if state["end"] is not None and config.patience:
            if config.patience <= state["patience"]:
                end = state["end"]
            else:  # more patience goes on from where less ran out
                stale = min(stale, state["patience"])
        best = math.inf if state["best"] is None else state["best"]
        metrics = {key: math.nan if value is None else value for key, value in state["validation"].items()}

    saver = Saver(run_dir, engine, ema, world, config.keep, config.keep_every)

    asked = Asked()

    def hear() -> None:
        """What is asked by now; a save that is under way goes on, too. Collective."""
        nonlocal asked
        asked = requests.end()
        saver.advance(asked.save_failed, asked.save_unfinished)

    def is_stopped() -> bool:
        requests.begin(saver.failed, saver.unfinished)
        hear()
        return asked.stop > 0

    with Progress(name, config.steps, "steps", done=step, shown=world.is_first) as bar, saver:
        ends = not unvalidated and step >= end
        while not ends:
            requests.begin(saver.failed, saver.unfinished)
            if not unvalidated:  # else this run was stopped while it validated, and goes on there
                watch.mark(f"waits for the cells of step {step}")
                batches = meter.wait_for(loader)
                losses = []
                for k, batch in enumerate(batches):
                    watch.mark(f"computes micro-batch {k} of step {step}")
                    batch = batch.to(world.device)
                    loss, parts = stage.loss(engine.model, batch, Draws(config.seed, step, batch.positions_B))
                    engine.backward(loss / batch.n_cells)
                    parts = {"loss": loss, **parts, "cells": batch.weight_B.sum()}
                    losses.append({key: value.detach() for key, value in parts.items()})
                watch.mark(f"updates the weights in step {step}")
                lr = learning_rate(optim, step, config.steps, end)
                grad_norm = engine.step(lr)
                if math.isfinite(grad_norm):
                    ema.update()
                    meter.add(losses)
                    skipped = 0
                else:  # the engine left the weights as they were, on all ranks
                    skipped += 1
                    culprits = nonfinite.find_culprits(stage, engine, batches, losses, config.seed, step, world)
                    told = nonfinite.told(step, culprits)
                    if world.is_first:
                        nonfinite.note(run_dir, step, culprits)
                        print(f"scldm: {told}; the step is skipped", file=sys.stderr, flush=True)
                    if skipped > config.max_skipped:
                        saver.finish()
                        raise InputError(f"{told}; {skipped} steps in a row, train.max_skipped={config.max_skipped}")
                step += 1

                if (step % config.log_every == 0 or step == end) and meter.n_steps:
                    row, own = meter.read()
                    row |= {"lr": lr, "grad_norm": grad_norm}
                    if config.rank_logs:
                        note_rank(run_dir, world.rank, step, own)
                    tracker.log(step, row, cells_seen=step * config.global_batch)
                    bar.advance(0, f"loss {row['loss']:.4g}, {row['cells_per_s']:,.0f} cells/s")
                bar.advance()
                unvalidated = step % config.validate_every == 0 or step == end

            watch.mark(f"hears what is asked after step {step}")
            hear()
            is_best = False
            if unvalidated and not asked.stop:
                with meter.paused():
                    found = validate(stage, engine, ema, validation, config.seed, world, watch, is_stopped)
                if found is not None:
                    metrics, unvalidated = found, False
                    tracker.log(step, metrics, split="validation", cells_seen=step * config.global_batch)
                    better = metrics[stage.validation_metric] < best
                    is_best = better and not skipped
                    best = metrics[stage.validation_metric] if is_best else best
                    stale = 0 if better else stale + 1
                    if end == config.steps and 0 < config.patience <= stale:
                        end = early_end(optim, step, config.steps)
                        if world.is_first and end < config.steps:
                            print(
                                f"scldm: {stale} validations without a better one: ends at step {end}", file=sys.stderr
                            )
            ends = not unvalidated and step == end

            # none of itself while steps are skipped: if that ends the run, it is resumed from before the trouble began
            due = step % config.save_every == 0 and not skipped
            if due or is_best or ends or asked.save or asked.stop:
                watch.mark(f"saves step {step}")
                at = {"step": step, "skipped": skipped, "stale": stale, "unvalidated": unvalidated}
                at |= {"end": None if end == config.steps else end, "patience": config.patience}
                with meter.paused():
                    saver.begin(
                        {**at, **_json(best, metrics), "loader": loader.state(), "meter": meter.state()}, is_best
                    )
            if asked.save or asked.stop:
                saver.finish()
                if world.is_first:
                    print(f"scldm: saved step {step}, asked by {asked.reason}", file=sys.stderr, flush=True)
                requests.done(asked, more=not ends)
        saver.finish()
    return metrics


def _json(best: float, metrics: dict[str, float]) -> dict[str, Any]:
    """As JSON has no word for what is not finite."""
    found = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return {"best": best if math.isfinite(best) else None, "validation": found}


@torch.no_grad()
def validate(
    stage: Stage,
    engine: Engine,
    ema: EMA,
    loader: Loader,
    seed: int,
    world: World,
    watch: Watch,
    is_stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Means over the validation cells, with averaged weights and the same draws every time; none where all ranks heard,
    after some batch, that they are to stop. Collective."""
    engine.module.eval()
    sums: dict[str, torch.Tensor] = {}
    n_cells, stopped = torch.zeros((), device=world.device), False
    with ema.applied():
        # keyed by the batch's number, as no two batches of a pass may share their draws
        for number, batches in enumerate(loader.one_pass()):
            watch.mark(f"validates batch {number}")
            for batch in batches:
                batch = batch.to(world.device)
                parts = stage.validation(engine.model, batch, Draws(seed + 1, number, batch.positions_B))
                n_cells += batch.weight_B.sum()
                for key, value in parts.items():
                    sums[key] = sums.get(key, torch.zeros((), device=world.device)) + value
            watch.mark(f"hears what is asked after validation batch {number}")
            if stopped := is_stopped():
                break
    engine.module.train()
    if stopped:
        return None
    totals = world.sum({**{key: float(value) for key, value in sums.items()}, "n_cells": float(n_cells)})
    n = totals.pop("n_cells")
    return {key: value / n for key, value in totals.items()}
