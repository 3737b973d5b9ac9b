"""Early stop: training ends after so many validations without a better metric, counted over every resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scldm.train import loop
from scldm.train.tracking import read_metrics
from tests.scldm.train.small_runs import Finished, small_run, stored

# what validations find, one every other step; as good as the best is not better
NLL = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.2, 2.9, 2.8]
STALE_AT = {1: 3, 2: 6, 3: 7}  # patience -> the number of the validation at which it ends


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda stage, engine, ema, *_: {"nll": NLL[ema.n_updates // 2 - 1]})


def run(run_dir: Path, patience: int, **more: Any) -> Finished:
    return small_run("vae", run_dir, steps=18, validate_every=2, patience=patience, **{"save_every": 50, **more})


def validated(run_dir: Path) -> list[int]:
    return [row["step"] // 2 for row in read_metrics(run_dir, "validation")]


@pytest.mark.parametrize("patience", STALE_AT)
def test_a_run_ends_when_its_patience_does_and_not_before(tmp_path: Path, patience: int) -> None:
    last = STALE_AT[patience]
    finished = run(tmp_path, patience)
    assert validated(tmp_path) == list(range(1, last + 1))
    assert finished.metrics == {"nll": NLL[last - 1]}
    assert stored(tmp_path)[0]["step"] == 2 * last  # saved, whatever save_every says
    assert stored(tmp_path, "best")[0]["validation"] == {"nll": min(NLL[:last])}
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
