"""Where a run stands: the few numbers that a resume needs besides tensors and the loader's place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a run's validations that judged as many cells as the last one, as it may be continued with others."""
    return [row for row in rows if row.get("cells") == rows[-1].get("cells")]


@dataclass
class RunState:
    """The same on every rank. Every checkpoint holds it as JSON.

    steps, patience: of the config
    early_end: the step at which the run ends where patience ran out before `steps`
    step: optimizer steps made, skipped ones included
    cells_seen: in these steps, those of an epoch's last batch as if it were full
    skipped: how many of the last steps were skipped in a row
    unvalidated: the validation that is due at this step is still to be made
    stale: validations since the best one
    best: its metric
    validation: metrics of the last validation, and `cells`, how many were judged
    """

    steps: int
    patience: int
    early_end: int | None = None
    step: int = 0
    cells_seen: int = 0
    skipped: int = 0
    unvalidated: bool = False
    stale: int = 0
    best: float = math.inf
    validation: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_json(cls, found: dict[str, Any], steps: int, patience: int) -> RunState:
        """As a checkpoint has it, with the steps and the patience of this start. Another number of steps, or more
        patience, resumes where it ran out."""
        state = cls(**{f.name: found[f.name] for f in fields(cls)})
        state.best = math.inf if state.best is None else state.best
        state.validation = {key: math.nan if value is None else value for key, value in state.validation.items()}
        if state.steps != steps:
            state.early_end, state.stale = None, 0
        if state.early_end is not None and not 0 < patience <= state.patience:
            state.early_end = None
            state.stale = min(state.stale, state.patience) if patience else state.stale
        state.steps, state.patience = steps, patience
        return state

    def to_json(self) -> dict[str, Any]:
        """What is not finite is null, for which JSON has no word."""
        metrics = {key: value if math.isfinite(value) else None for key, value in self.validation.items()}
        return {**asdict(self), "best": self.best if math.isfinite(self.best) else None, "validation": metrics}

    @property
    def end(self) -> int:
        return self.steps if self.early_end is None else self.early_end

    @property
    def is_over(self) -> bool:
        return self.step >= self.end and not self.unvalidated

    def is_due(self, every: int) -> bool:
        """Whether to do, after this step, what is done every so many steps and at the end."""
        return self.step % every == 0 or self.step == self.end

    def judged_others(self, metrics: dict[str, float]) -> bool:
        """Whether the last validation was of other cells, as far as is known, as in a run that goes on otherwise."""
        return bool(self.validation) and metrics["cells"] != self.validation.get("cells")

    def validated(self, metrics: dict[str, float], judged_by: str) -> bool:
        """Take note of a validation. Returns whether its checkpoint is the best.

        It is never while steps are skipped: the run may end by that, and must then resume from before the trouble.
        One of other cells than the last is compared with none before it.
        """
        if self.judged_others(metrics):
            self.best, self.stale = math.inf, 0
        better = metrics[judged_by] < self.best
        is_best = better and not self.skipped
        self.validation, self.unvalidated = metrics, False
        self.stale = 0 if better else self.stale + 1
        if is_best:
            self.best = metrics[judged_by]
        return is_best
