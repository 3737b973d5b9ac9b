"""Early stop: training ends after so many validations without a better metric, counted over every resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scldm.train import loop
from scldm.train.optim import OptimConfig, early_end, learning_rate
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import Finished, small_run, stored

pytestmark = pytest.mark.heavy

# what validations find, one every other step; as good as the best is not better
NLL = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.2, 2.9, 2.8]
CELLS = {"cells": 9.0}
STALE_AT = {1: 3, 2: 6, 3: 7}  # patience -> the number of the validation at which it ends


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda stage, engine, ema, *_: {"nll": NLL[ema.n_updates // 2 - 1], **CELLS})


def run(run_dir: Path, patience: int, **more: Any) -> Finished:
    with_defaults = {"save_every": 50, "optim": OptimConfig(lr=3e-3, decay=0.0), **more}
    return small_run("vae", run_dir, steps=18, validate_every=2, patience=patience, **with_defaults)


def validated(run_dir: Path) -> list[int]:
    return [row["step"] // 2 for row in read_metrics(run_dir, "validation")]


@pytest.mark.parametrize("patience", STALE_AT)
def test_a_run_ends_when_its_patience_does_and_not_before(tmp_path: Path, patience: int) -> None:
    last = STALE_AT[patience]
    finished = run(tmp_path, patience)
    assert validated(tmp_path) == list(range(1, last + 1))
    assert finished.metrics == {"nll": NLL[last - 1], **CELLS}
    assert stored(tmp_path)[0]["step"] == 2 * last  # saved, whatever save_every says
    assert stored(tmp_path, "best")[0]["validation"] == {"nll": min(NLL[:last]), **CELLS}
    again = run(tmp_path, patience)  # it has ended: nothing is trained again
    assert again.loader.read == []
    assert again.metrics == finished.metrics


def test_a_resume_goes_on_counting(tmp_path: Path) -> None:
    """Stopped after the first of three stale validations, and again after the second."""
    for stop in (11, 13):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, 3, fail_at=stop, save_every=1)
    run(tmp_path, 3)
    assert validated(tmp_path) == list(range(1, 8))


def test_more_patience_goes_on_where_less_ended(tmp_path: Path) -> None:
    run(tmp_path, 1)
    run(tmp_path, 3)
    assert validated(tmp_path)[-1] == STALE_AT[3]
    run(tmp_path, 0)
    assert validated(tmp_path)[-1] == len(NLL)


def rates(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["lr"] for row in read_metrics(run_dir, "train")}


def test_the_rate_falls_before_an_early_end(tmp_path: Path) -> None:
    """Patience 1 runs out at step 6; a third of 18 steps later the rate has fallen to 0, also over a resume."""
    falling = OptimConfig(lr=3e-3, warmup=0.0, decay=1 / 3)
    run(tmp_path / "whole", 1, optim=falling, log_every=1)
    found = rates(tmp_path / "whole")
    assert list(found) == list(range(1, 13))
    assert [round(found[step] / 3e-3, 6) for step in (6, 7, 8, 12)] == [1, 1, round(5 / 6, 6), round(1 / 6, 6)]
    assert stored(tmp_path / "whole")[0]["step"] == 12
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 1, optim=falling, log_every=1, fail_at=9, save_every=1)
    run(tmp_path / "cut", 1, optim=falling, log_every=1)
    assert rates(tmp_path / "cut") == found
    # more patience goes on as if the rate had never fallen
    run(tmp_path / "whole", 3, optim=falling, log_every=1)
    assert rates(tmp_path / "whole")[13] == learning_rate(falling, 12, 18)


@pytest.mark.parametrize("schedule, decay, end", [("hold", 0.25, 65), ("hold", 0.0, 40), ("cosine", 0.25, 40)])
def test_where_an_early_end_is(schedule: Any, decay: float, end: int) -> None:
    assert early_end(OptimConfig(schedule=schedule, decay=decay), 40, 100) == end
    assert early_end(OptimConfig(schedule=schedule, decay=decay), 90, 100) <= 100
