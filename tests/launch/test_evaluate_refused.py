"""The verb refuses keys that it would ignore, takes `none` for no condition, and shows labels as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.cli import main
from launch.evaluation import of_generated as evaluate_generated
from launch.evaluation.config import EvaluateVerbConfig
from launch.evaluation.of_generated import judged_conditions
from launch.judged import TAKES, refuse_unused
from scldm.evaluate import map_of_cells
from tests.launch.test_evaluate import FEW, treated, write

GENERATED = "generated=g.h5ad out=out "
VAE = "vae=run shards=set "
EMBEDDING = "embedding=e.h5ad label=kind "


@pytest.mark.parametrize(
    "words, message",
    [
        (GENERATED + "real=r.h5ad published=hlca", "published=hlca has no effect with generated="),
        (GENERATED + "real=r.h5ad label=kind", "label=kind has no effect with generated="),
        (
            GENERATED + "real=r.h5ad precision=bfloat16",
            "precision=bfloat16 has no effect with generated= without model=",
        ),
        (GENERATED + "real=r.h5ad cache_folder=c", "cache_folder=c has no effect with generated= without shards="),
        (GENERATED + "shards=set split=part", "split=part has no effect with generated= without real="),
        (VAE + "protocol=cfgen", "protocol=cfgen has no effect with vae="),
        (VAE + "control.drug=x", "control.drug=x has no effect with vae="),
        (VAE + "real=r.h5ad", "real=r.h5ad has no effect with vae="),
        (VAE + "evaluate.n_draws=3", "evaluate.n_draws=3 has no effect with vae="),
        (VAE + "tracking.uri=here", "tracking.uri=here has no effect with vae="),
        (VAE + "model=m", "vae and model are judged apart"),
        (EMBEDDING + "vae=run", "vae=run has no effect with embedding="),
        (EMBEDDING + "split=part", "split=part has no effect with embedding="),
        (EMBEDDING + "evaluate.max_cells=500", "evaluate.max_cells=500 has no effect with embedding="),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("g.h5ad", "e.h5ad"):
        (tmp_path / name).touch()
    assert main(["evaluate", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.h5ad", "g.h5ad"]


@pytest.mark.parametrize("words", [VAE + "evaluate.seed=3 tracking.enabled=false", EMBEDDING + "evaluate.seed=3"])
def test_a_key_that_is_used_is_not_refused(tmp_path: Path, monkeypatch: Any, capsys: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *words.split()]) == 2  # its files are not there
    assert "has no effect" not in capsys.readouterr().err


def test_the_table_of_keys_names_keys_alone() -> None:
    every = EvaluateVerbConfig()
    for mode, taken in TAKES.items():
        for key in taken:
            value: Any = every
            for part in key.split("."):
                value = getattr(value, part)
        refuse_unused(replace(every, **{mode: mode}), mode)  # a default is no key that was given


def test_none_stands_for_no_condition_unless_one_has_that_name(monkeypatch: Any) -> None:
    model: Any = SimpleNamespace(dit=SimpleNamespace(n_labels={"kind": 2}))
    config = EvaluateVerbConfig(generated="g", shards="set", conditions=("none",))
    monkeypatch.setattr(evaluate_generated, "conditions_of_shards", lambda *_: ("kind",))
    assert judged_conditions(config, model) == judged_conditions(config, None) == ()
    monkeypatch.setattr(evaluate_generated, "conditions_of_shards", lambda *_: ("kind", "none"))
    assert judged_conditions(config, model) == ("none",)
    monkeypatch.setattr(evaluate_generated, "obs_columns", lambda _: {"kind"})
    assert judged_conditions(EvaluateVerbConfig(generated="g", real="r", conditions=("none",)), model) == ()
    assert judged_conditions(EvaluateVerbConfig(generated="g", shards="set"), model) == ("kind",)


@pytest.mark.heavy
def test_labels_are_shown_as_text_and_every_table_names_its_protocol(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(map_of_cells, "umap_coordinates", lambda components, seed: components[:, :2])
    monkeypatch.setattr(evaluate_generated, "write_report", lambda _, out: [out / "evaluation.json"])
    note = "x[/b] y and CD4 [mem] :cat: are left out"
    really = evaluate_generated.compare
    monkeypatch.setattr(evaluate_generated, "compare", lambda *words: {**really(*words), "notes": [note]})
    monkeypatch.chdir(tmp_path)
    for name, seed in (("real", 0), ("generated", 1)):
        counts, obs = treated(seed, 700)
        obs["kind"] = obs["kind"].cat.rename_categories({"T cell": "x[/b] y", "B cell": "CD4 [mem] :cat:"})
        obs["drug"] = obs["drug"].cat.rename_categories({"dmso": "ctrl [a]", "x": "stim[/b]"})
        write(tmp_path / f"{name}.h5ad", counts, obs.rename(columns={"drug": "drug [mM]"}))
    words = ["generated=generated.h5ad", "real=real.h5ad", "split=part", "out=out", "tracking.enabled=false"]
    words += ["conditions=kind,drug [mM]", *FEW]
    assert main(["evaluate", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "response to drug [mM] (control: ctrl [a]), the same under every protocol" in shown
    assert f"memorisation, protocol {found['protocol']['title']}" in shown
    assert note in shown
