"""A loss or gradient that is no number: which rank and which cells it came from.

The norm of the gradient is summed over all ranks, so that all know of it without another message, and none of them
applies the step. Only then is it asked where it came from.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scldm.files import outlived
from scldm.parallel.dist import World
from scldm.parallel.surface import Engine
from scldm.train.losses import Draws, Stage

FILE = "nonfinite.jsonl"


@dataclass(frozen=True)
class Culprit:
    """A micro-batch whose loss, or whose gradient by a finite loss, is not finite.

    what: `loss nan` or `gradient of NAME`. cells: (source, row) of each. shown: the first of them as text
    """

    rank: int
    what: str
    shown: str
    cells: list[list[int]]


def report(
    stage: Stage,
    engine: Engine,
    batches: list[Any],
    losses: list[dict[str, Tensor]],
    seed: int,
    step: int,
    world: World,
    run_dir: Path,
) -> str:
    """Find where a skipped step went wrong, print it and note all cells in the run's folder. Returns what is printed.
    Collective.

    Where every loss is finite, all are computed again for their gradients. Nothing is found where those are finite too,
    and their sum alone is not.
    """
    found = [
        _culprit(world, f"loss {parts['loss'].item()}", batch)
        for batch, parts in zip(batches, losses, strict=True)
        if not torch.isfinite(parts["loss"])
    ]
    culprits = list(chain.from_iterable(world.gather(found)))
    for batch in () if culprits else batches:
        here = batch.to(world.device)
        loss, _ = stage.loss(engine.bare, here, Draws(seed, step, here.positions_B))
        bad = [name for name, g in engine.gradients(loss).items() if not torch.isfinite(g).all()]
        if bad:
            found.append(_culprit(world, f"gradient of {bad[0]}", batch))
    culprits = culprits or list(chain.from_iterable(world.gather(found)))
    line = told(step, culprits)
    if world.is_first:
        note(run_dir, step, culprits)
        print(f"scldm: {line}. The step is skipped", file=sys.stderr, flush=True)
    return line


def told(step: int, culprits: list[Culprit]) -> str:
    """One line for a person."""
    where = "; ".join(f"rank {c.rank}: {c.what} on cells (source:row) {c.shown}" for c in culprits[:4])
    return f"step {step}: {where or 'the gradient is not finite, and no single micro-batch is found to be why'}"


def note(run_dir: Path, step: int, culprits: list[Culprit]) -> None:
    """All cells, into the run's folder."""
    with outlived(run_dir / FILE), (run_dir / FILE).open("a") as file:
        for culprit in culprits:
            file.write(json.dumps({"step": step, **asdict(culprit)}) + "\n")


def _culprit(world: World, what: str, batch: Any) -> Culprit:
    cells = batch.cell_ids_B2.tolist()
    shown = ", ".join(f"{source}:{row}" for source, row in cells[:8])
    return Culprit(world.rank, what, shown + (f" and {len(cells) - 8} more" if len(cells) > 8 else ""), cells)
