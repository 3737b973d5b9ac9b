"""What a training run keeps of its data, and what it can't train on."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launch.config import compose, shipped
from launch.run_data import keep_data
from launch.train_ldm import TrainLDMConfig
from launch.train_vae import TrainVAEConfig, genes_of
from launch.training import FREE_ON_RESUME, check_has_validation, whole_cells
from scldm.errors import InputError, Stopped
from scldm.files import flat
from scldm.parallel.deepspeed_json import check_overrides
from scldm.parallel.dist import close_world
from scldm.parallel.engine import HardwareConfig
from scldm.train.tracking import Tracker, TrackingConfig
from scldm.vocab import ConditionVocab, GeneVocab
from tests.launch import faulty


def manifest_of(genes: tuple[str, ...], **more: Any) -> Any:
    statistics = SimpleNamespace(library_sizes=())
    conditions = ConditionVocab({"cell_type": ("B", "T")})
    common = {"kind": "cells", "conditions": conditions, "statistics": statistics, "query": {}, "extra": {}}
    return SimpleNamespace(genes=GeneVocab(genes, "symbol"), **{**common, **more})


@pytest.mark.parametrize("preset", sorted(path.stem for path in (shipped("configs") / "vae").glob("*.yaml")))
def test_one_key_gives_all_genes_whatever_the_preset_says(preset: str) -> None:
    words = [f"vae/{preset}", "data.shards=x", "run_dir=y"]
    some, every = (compose(TrainVAEConfig, [*words, *more]) for more in ([], ["data.given.share=1"]))
    assert genes_of(some.data, 36_130)[0] < 36_130 / 2
    assert genes_of(every.data, 36_130) == (36_130, 36_130)
    few = compose(TrainVAEConfig, [*words, "data.given.n_genes=100"])
    assert genes_of(few.data, 36_130) == (100, 100)


def test_a_run_keeps_its_vocabulary_whatever_it_is_resumed_on(tmp_path: Path) -> None:
    # else the weights of one gene would be exported under the name of another
    keep_data(tmp_path, manifest_of(("CD3D", "MS4A1")))
    keep_data(tmp_path, manifest_of(("CD3D", "MS4A1")))
    with pytest.raises(InputError, match="on other data: data.shards has the same genes in another order .genes.json."):
        keep_data(tmp_path, manifest_of(("MS4A1", "CD3D")))
    assert GeneVocab.load(tmp_path / "genes.json").ids == ("CD3D", "MS4A1")


def test_latents_of_another_autoencoder_do_not_take_over_a_run(tmp_path: Path) -> None:
    latents = manifest_of(("CD3D",), kind="latents", extra={"vae": "a"})
    keep_data(tmp_path, latents)
    with pytest.raises(InputError, match=r"latents\.json"):
        keep_data(tmp_path, manifest_of(("CD3D",), kind="latents", extra={"vae": "b"}))


@pytest.mark.parametrize("splits", [[], [("validation", 0)], [("train", 5), ("test", 5)]])
def test_without_validation_cells_nothing_starts(splits: list[tuple[str, int]]) -> None:
    entries = tuple(SimpleNamespace(name=name, n_cells=n) for name, n in splits)
    with pytest.raises(InputError, match="split.validation above 0"):
        check_has_validation(manifest_of(("CD3D",), splits=entries), "shards")


@pytest.mark.parametrize("n_genes, cells", [(2_000, 4), (30_000, 64), (60_000, 128)])
def test_validation_on_all_genes_takes_no_more_memory_than_training(n_genes: int, cells: int) -> None:
    assert whole_cells(128, n_genes, 60_000) == cells
    assert whole_cells(1, n_genes, 60_000) == 1


def test_the_outcome_is_noted_before_the_tracker_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, seen = Tracker.close, list[tuple[str, int]]()

    def closed(self: Tracker, *status: Any) -> None:
        outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
        seen.append((outcome["state"], outcome["exit_code"]))
        os.kill(os.getpid(), signal.SIGTERM)  # of who finds that it takes long: it must not change the exit code
        close(self, *status)

    monkeypatch.setattr(Tracker, "close", closed)
    config = faulty.SmallConfig(str(tmp_path / "run"), hardware=HardwareConfig("plain", 16))
    with pytest.raises(Stopped) as stopped:
        faulty.train(config, faulty.Fault("SIGTERM", 0))
    assert stopped.value.exit_code == 85
    assert seen == [("stopped", 85)]


@pytest.mark.heavy
def test_an_exchange_must_wait_longer_than_a_hang_takes_to_be_found() -> None:
    given = ["run_dir=a", "data.shards=b", "train.hang_s=900"]
    for config in (TrainVAEConfig, TrainLDMConfig):
        with pytest.raises(InputError, match=r"hardware.collective_timeout_s=959 must be at least 960"):
            compose(config, [*given, "hardware.collective_timeout_s=959"])
        compose(config, [*given, "hardware.collective_timeout_s=960"])
        compose(config, ["run_dir=a", "data.shards=b", "train.hang_s=0", "hardware.collective_timeout_s=10"])


def test_presets_of_hardware_change_no_result() -> None:
    """Each is a legal config whose DeepSpeed keys are accepted, and all that it sets may change on a resume."""
    for path in sorted(shipped("configs").glob("hardware/*.yaml")):
        config = compose(TrainVAEConfig, [str(path), "run_dir=a", "data.shards=b"])
        check_overrides(config.deepspeed)
        text = path.read_text()
        assert "Not measured" in text or path.stem == "cpu", path
        for key, _ in flat(yaml.safe_load(text)):
            free = any(f"{key}.".startswith(f"{name}.") for name in FREE_ON_RESUME)
            assert free or key == "hardware.precision", f"{path.name}: {key} is not free"


def test_another_deepspeed_is_refused_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scldm.parallel.engine.DEEPSPEED", "0.20.1")
    config = faulty.SmallConfig(str(tmp_path / "run"), hardware=HardwareConfig("deepspeed", micro_batch=4))
    with pytest.raises(InputError, match=r"deepspeed is \S+, and scldm reads private parts of 0.20.1"):
        faulty.train(config)
    close_world()
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
def test_how_the_code_differed_and_what_was_attached_are_kept_and_sent(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "plan.json").write_text("{}")
    run = tmp_path / "run"
    of = {"uri": "http://127.0.0.1:9", "close_s": 0.0, "attach": [str(tmp_path / "plan.json")]}
    config = faulty.SmallConfig(str(run), tracking=TrackingConfig(**of), hardware=HardwareConfig("plain", 16))
    for diff in ("- one\n", "", "- two\n"):
        monkeypatch.setattr("launch.training.git_diff", lambda diff=diff: diff)
        faulty.train(config)
    starts = json.loads((run / "environment.json").read_text())
    names = [start.get("diff") for start in starts]
    assert names[1] is None
    assert [(run / name).read_text() for name in names if name] == ["- one\n", "- two\n"]
    sent = json.loads((run / "tracked.json").read_text())["artifacts"]
    assert [entry for entry in sent if entry[1] == "diffs"] == [[names[0], "diffs"], [names[2], "diffs"]]
    assert ["../plan.json", "attached"] in sent
    with pytest.raises(InputError, match=r"tracking\.attach=nowhere: no such file"):
        faulty.train(replace(config, run_dir=str(tmp_path / "new"), tracking=TrackingConfig(attach=["nowhere"])))
    assert not (tmp_path / "new").exists()
    faulty.train(replace(config, tracking=replace(config.tracking, attach=["nowhere"])))  # it has begun, and goes on
    assert "tracking.attach=nowhere: gone since the run began" in capfd.readouterr().err
    with pytest.raises(InputError, match="two files of one name"):
        TrackingConfig(attach=["a/plan.json", "b/plan.json"])
