"""A preview at a validation: the EMA's, within its share of the time, and the same run to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scldm.train import previews
from scldm.train.previews import FIRST_S, Check, Make, Preview, Previews
from scldm.train.tracked import read_note
from scldm.train.tracking import Tracker, TrackingConfig, read_metrics
from tests.scldm.train.small_runs import small_run, stored
from tests.scldm.train.test_resume import rows

EVERY: dict[str, Any] = {"steps": 12, "validate_every": 4, "save_every": 4}


def numpys_state() -> bytes:
    """Of the generator that libraries share, its place included."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return state["state"]["key"].tobytes() + bytes(str(state["state"]["pos"]), "ascii")


def made(step: int, check: Check) -> Preview:
    return Preview({"of_step": float(step)}, b"png")


@pytest.mark.heavy
def test_a_preview_changes_nothing_of_the_run_and_sees_the_ema(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def preview(module: torch.nn.Module) -> Make:
        def make(step: int, check: Check) -> Preview:
            assert not module.training
            seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
            drawn = torch.randn(5).sum() + np.random.rand() + random.random()  # noqa: NPY002
            return Preview({"drawn": float(drawn)}, b"png")

        return make

    before = numpys_state(), random.getstate()
    torch.manual_seed(0)
    plain = small_run("ldm", tmp_path / "plain", **EVERY)
    after = torch.get_rng_state()
    looked = small_run("ldm", tmp_path / "looked", preview=preview, **EVERY)
    assert torch.equal(torch.get_rng_state(), after)
    assert (numpys_state(), random.getstate()) == before
    assert looked.loader.read == plain.loader.read
    (state, tensors), (state_other, tensors_other) = stored(tmp_path / "plain"), stored(tmp_path / "looked")
    assert state == state_other
    assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors)
    assert rows(tmp_path / "plain") == [row for row in rows(tmp_path / "looked") if row["split"] != "preview"]
    assert [row["step"] for row in read_metrics(tmp_path / "looked", "preview")] == [4, 8, 12]
    assert sorted(path.name for path in (tmp_path / "looked" / "previews").iterdir()) == [
        f"step-{step:08d}.png" for step in (4, 8, 12)
    ]
    for name, weight in seen[-1].items():
        assert torch.equal(weight, tensors[f"ema/{name}"]), name
    assert any(not torch.equal(weight, tensors[f"weight/{name}"]) for name, weight in seen[-1].items())


@pytest.mark.parametrize("error", [ValueError("no\ncells"), torch.OutOfMemoryError("out of memory"), KeyError()])
def test_one_that_fails_is_a_line_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture, error: Exception) -> None:
    tried: list[int] = []

    def preview(module: torch.nn.Module) -> Make:
        def make(step: int, check: Check) -> Preview:
            tried.append(step)
            raise error

        return make

    run = small_run("vae", tmp_path, preview=preview, **EVERY)
    assert run.metrics["nll"] > 0
    assert tried == [4]
    why = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    assert f"scldm: no more previews, as that of step 4 failed: {why}\n" in capsys.readouterr().err
    assert not (tmp_path / "previews").exists()
    assert not read_metrics(tmp_path, "preview")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(previews.time, "monotonic", lambda: self.now)


def test_all_previews_together_keep_to_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def slow(step: int, check: Check) -> Preview:
        clock.now += 5
        return made(step, check)

    with Tracker(tmp_path, TrackingConfig(enabled=False)) as tracker:
        of = Previews(tmp_path, tracker, slow, 0.01)
        for step in range(1, 101):
            clock.now += 100
            of.at(step, step)
    steps = [row["step"] for row in read_metrics(tmp_path, "preview")]
    assert steps[0] == FIRST_S / 0.01 / 100  # and those before were too early
    assert len(steps) * 5 <= 0.01 * (clock.now - 1_000)
    assert len(steps) > 0.008 * (clock.now - 1_000) / 5


def test_none_is_made_for_a_share_of_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(enabled=False)) as tracker:
        for make, share in ((made, 0.0), (None, 1.0)):
            of = Previews(tmp_path, tracker, make, share)
            of.at(1, 1)
            assert not of.is_due
    assert not (tmp_path / "previews").exists()


def test_one_that_would_look_like_a_hang_is_given_up(tmp_path: Path, monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)

    def endless(step: int, check: Check) -> Preview:
        for _ in range(1_000):
            clock.now += 1
            check()
        return made(step, check)

    with Tracker(tmp_path, TrackingConfig(enabled=False)) as tracker:
        of = Previews(tmp_path, tracker, endless, 1.0, limit_s=20.0)
        of.at(3, 3)
        assert clock.now == 1_021
        said = "scldm: no preview of step 3: it took more than 20 s. The next one waits longer\n"
        assert capsys.readouterr().err == said
        of.at(4, 4)  # imports and compilations were the first one's
        of.at(5, 5)
    assert clock.now == 1_042
    assert capsys.readouterr().err == said.replace("step 3", "step 4").replace(
        "The next one waits longer", "There are no more previews"
    )


def test_a_run_that_is_to_stop_does_not_wait_for_one(tmp_path: Path, monkeypatch, capsys) -> None:
    clock, asked = Clock(monkeypatch), []

    def long(step: int, check: Check) -> Preview:
        clock.now += 1
        asked.extend([step] * (step == 3))
        check()
        return made(step, check)

    with Tracker(tmp_path, TrackingConfig(enabled=False)) as tracker:
        of = Previews(tmp_path, tracker, long, 1.0, is_asked_to_stop=lambda: bool(asked))
        of.at(3, 3)
        assert capsys.readouterr().err == ""
        asked.clear()
        of.at(4, 4)
    assert [row["step"] for row in read_metrics(tmp_path, "preview")] == [4]


def test_an_error_of_ours_has_its_kind(tmp_path: Path, capsys) -> None:
    def wrong(step: int, check: Check) -> Preview:
        raise KeyError("tissue")

    with Tracker(tmp_path, TrackingConfig(enabled=False)) as tracker:
        Previews(tmp_path, tracker, wrong, 1.0).at(3, 3)
    assert "that of step 3 failed: KeyError: 'tissue'" in capsys.readouterr().err


def test_mlflow_is_to_get_figures_and_rows(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(uri="http://127.0.0.1:9", close_s=0.0)) as tracker:
        Previews(tmp_path, tracker, made, 1.0).at(7, 70)
    note = read_note(tmp_path)
    assert note is not None
    assert note["artifacts"] == [["previews/step-00000007.png", "previews"]]
    (row,) = read_metrics(tmp_path, "preview")
    assert (row["step"], row["cells_seen"], row["of_step"]) == (7, 70, 7.0)
