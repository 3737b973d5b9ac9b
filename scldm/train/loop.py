"""One training loop for both stages. What happens every n steps is written in it, in the order in which it happens.

Reading order: TrainConfig, train, log_row, end_early, validate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scldm.checked import SEEDS, Checked, checked
from scldm.errors import Diverged
from scldm.parallel.dist import World
from scldm.parallel.surface import Engine
from scldm.parallel.watch import Watch
from scldm.progress import Progress
from scldm.train import checkpoint, nonfinite, steps
from scldm.train.ema import EMA
from scldm.train.losses import Draws, Stage
from scldm.train.optim import OptimConfig, early_end, learning_rate
from scldm.train.previews import Previews
from scldm.train.profile import StepProfile
from scldm.train.requests import Requests, signal_named
from scldm.train.run_state import RunState
from scldm.train.saver import Saver
from scldm.train.supervisor import Supervisor
from scldm.train.throughput import Meter, note_rank
from scldm.train.tracking import Tracker


@dataclass(frozen=True)
class TrainConfig(Checked):
    """The course of a training run.

    steps: optimizer steps
    global_batch: cells per optimizer step, over all ranks
    seed: of weights and of every draw
    ema_decay: of the exponential moving average (EMA) of the weights, which is validated, exported and sampled
    log_every: steps between two rows of training metrics
    rank_logs: also keep a file for each rank, ranks/K.jsonl: its own cells/s, waiting and memory
    validate_every: steps between two passes over validation cells
    validation_cells: most cells of such a pass, in whole global batches: the first ones of the shards. 0 for all
    preview_share: most of the run's time that previews may take: at a validation the first rank draws how held-out
        cells are reconstructed or generated, while the others wait. The first one is due once 20 s are that share. 0
        for never, 1 for one at each validation
    save_every: steps between two checkpoints
    keep: checkpoints kept, besides the best
    keep_every: those of every so many steps are kept too. 0 keeps none of these
    patience: validations without a better metric after which the run ends, with `hold` once its rate has fallen. 0 for
        never
    max_skipped: steps in a row that are skipped because the gradient is not finite. One more ends the run
    hang_s: seconds without progress, once training has begun, after which the run ends and leaves the stacks of all
        ranks. 0 for never
    stop_signals: save at a step that all ranks agree on, then exit with code 85
    """

    steps: int = checked(100_000, at_least=1)
    global_batch: int = checked(1_024, at_least=1)
    seed: int = checked(0, at_least=0, below=SEEDS)
    ema_decay: float = checked(0.9999, at_least=0, below=1)
    log_every: int = checked(50, at_least=1)
    rank_logs: bool = False
    validate_every: int = checked(1_000, at_least=1)
    validation_cells: int = checked(20_000, at_least=0)
    preview_share: float = checked(0.01, at_least=0, at_most=1)
    save_every: int = checked(1_000, at_least=1)
    keep: int = checked(2, at_least=1)
    keep_every: int = checked(0, at_least=0)
    patience: int = checked(0, at_least=0)
    max_skipped: int = checked(3, at_least=0)
    hang_s: float = checked(900.0, at_least=0)
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.stop_signals:
            signal_named(name)


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
    previews: Previews | None = None,
) -> dict[str, float]:
    """Train to `config.steps`, from the last whole checkpoint in `run_dir` if there is one. Returns validation metrics.

    Collective: every rank calls it with its own loader.

    Raises, on all ranks: Stopped where that was asked from outside, Diverged or InputError where training or saving
        can't go on.
    """
    ema, meter = EMA(engine, config.ema_decay), meter or Meter(world)
    state = RunState(config.steps, config.patience)
    if (found := checkpoint.resume(run_dir / "checkpoints", engine, ema, world)) is not None:
        state = RunState.of_json(found, config.steps, config.patience)
        loader.load_state(found["loader"])
        meter.load_state(found["meter"])
        if world.of_first(steps.pointed(run_dir / "checkpoints" / "best") is None):
            state.best, state.stale = math.inf, 0  # of a branch whose parent's best one until then is gone
    saver = Saver(run_dir, engine, ema, world, config.keep, config.keep_every)
    profile = StepProfile(run_dir, world, tracker)
    supervisor = Supervisor(watch or Watch(world), requests or Requests(run_dir, (), world), saver, profile)

    with Progress(name, config.steps, "steps", done=state.step, shown=world.is_first) as bar, supervisor:
        while not state.is_over:
            supervisor.begin(state.step)
            if not state.unvalidated:  # else the run was stopped while it validated, and resumes there
                supervisor.mark(f"waits for the cells of step {state.step}")
                batches, losses = meter.wait_for(loader), list[dict[str, Tensor]]()
                for k, batch in enumerate(batches):
                    supervisor.mark(f"computes micro-batch {k} of step {state.step}")
                    batch = batch.to(world.device)
                    draws = Draws(config.seed, state.step, batch.positions_B)
                    loss, parts = stage.loss(engine.model, batch, draws)
                    supervisor.mark(f"computes gradients, micro-batch {k} of step {state.step}")
                    engine.backward(loss / batch.n_cells)
                    parts = {"loss": loss, **parts, "cells": batch.weight_B.sum()}
                    losses.append({key: value.detach() for key, value in parts.items()})

                supervisor.mark(f"updates the weights in step {state.step}")
                lr = learning_rate(optim, state.step, config.steps, state.end)
                grad_norm = engine.step(lr)
                if math.isfinite(grad_norm):
                    ema.update()
                    meter.add(losses)
                    state.skipped = 0
                else:  # the engine left the weights as they were, on all ranks
                    state.skipped += 1
                    problem = nonfinite.report(stage, engine, batches, losses, config.seed, state.step, world, run_dir)
                    if state.skipped > config.max_skipped:
                        supervisor.finish()
                        limit = f"{state.skipped} steps in a row, train.max_skipped={config.max_skipped}"
                        raise Diverged(f"{problem}: {limit}")
                state.step += 1
                state.cells_seen += config.global_batch

                if state.is_due(config.log_every) and meter.n_steps:
                    row = log_row(meter, tracker, state, config, {"lr": lr, "grad_norm": grad_norm}, run_dir)
                    bar.advance(0, f"loss {row['loss']:.4g}, {row['cells_per_s']:,.0f} cells/s")
                bar.advance()
                state.unvalidated = state.is_due(config.validate_every)

            supervisor.agree(f"step {state.step}")
            is_best = False
            if state.unvalidated and not supervisor.asked.stop:
                preview = partial(previews.at, state.step, state.cells_seen) if previews else None
                with meter.paused():
                    metrics = validate(stage, engine, ema, validation, config.seed, world, supervisor, preview)
                if metrics is not None:  # else the run was asked to stop meanwhile
                    tracker.log(state.step, metrics, split="validation", cells_seen=state.cells_seen)
                    if world.is_first and state.judged_others(metrics):
                        told = f"validation is of {metrics['cells']:,.0f} cells, not as noted of the last one"
                        print(f"scldm: {told}: the best checkpoint is chosen anew", file=sys.stderr)
                    is_best = state.validated(metrics, stage.validation_metric)
                    end_early(state, config, optim, world)

            # not while steps are skipped: the run may end by that, and must then resume from before the trouble
            due = state.step % config.save_every == 0 and not state.skipped
            if due or is_best or state.is_over or supervisor.wants_save:
                with meter.paused():
                    places = {"loader": loader.state(), "meter": meter.state()}
                    supervisor.save({**state.to_json(), **places}, is_best)
            supervisor.answer(state.step, more=not state.is_over)
        supervisor.finish()
    return state.validation


def log_row(
    meter: Meter, tracker: Tracker, state: RunState, config: TrainConfig, more: dict[str, float], run_dir: Path
) -> dict[str, float]:
    """Write the training metrics since the last row. Returns them. Collective."""
    row, own = meter.read()
    row |= more
    if config.rank_logs:
        note_rank(run_dir, meter.world.rank, state.step, own)
    tracker.log(state.step, row, cells_seen=state.cells_seen)
    return row


def end_early(state: RunState, config: TrainConfig, optim: OptimConfig, world: World) -> None:
    """Bring the run's end forward where patience has run out."""
    if state.early_end is None and 0 < config.patience <= state.stale:
        end = early_end(optim, state.step, config.steps)
        if end < config.steps:
            state.early_end = end
            if world.is_first:
                print(f"scldm: {state.stale} validations without a better one: ends at step {end}", file=sys.stderr)


@torch.no_grad()
def validate(
    stage: Stage,
    engine: Engine,
    ema: EMA,
    loader: Loader,
    seed: int,
    world: World,
    supervisor: Supervisor,
    preview: Callable[[], None] | None = None,
) -> dict[str, float] | None:
    """Means over validation cells, with the EMA and the same draws every time, and `cells`, their number. Collective.

    preview: what the first rank does afterwards with the EMA, and the others not at all. They wait for it where the
        engine goes back to the weights that are trained

    None where all ranks agreed, after some batch, that they are to stop.
    """
    engine.module.eval()
    sums: dict[str, Tensor] = {}
    n_cells, stopped = torch.zeros((), device=world.device), False
    with ema.applied():
        # keyed by the batch's number, as no two batches of a pass may share their draws
        for number, batches in enumerate(loader.one_pass()):
            supervisor.mark(f"validates batch {number}")
            for batch in batches:
                batch = batch.to(world.device)
                parts = stage.validation(engine.model, batch, Draws(seed + 1, number, batch.positions_B))
                n_cells += batch.weight_B.sum()
                for key, value in parts.items():
                    sums[key] = sums.get(key, torch.zeros((), device=world.device)) + value
            if stopped := supervisor.is_stopped(f"validation batch {number}"):
                break
        if preview is not None and not stopped:
            supervisor.mark("makes a preview")
            preview()
            supervisor.mark("waits for the first rank's preview")  # which alone is behind, should it hang
    engine.module.train()
    if stopped:
        return None
    totals = world.sum({**{key: float(value) for key, value in sums.items()}, "cells": float(n_cells)})
    n = totals.pop("cells")
    return {**{key: value / n for key, value in totals.items()}, "cells": n}
