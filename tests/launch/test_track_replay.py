"""`scldm track replay`, and verbs that are followed as stages of something larger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.followed import dataset_of
from scldm.train.tracked import NOTE, STATE, stamp_of
from scldm.train.tracking import PARENT, Tracker, TrackingConfig, begin_note
from tests.launch.small_verbs import write_cells
from tests.scldm.train.test_tracking import free_port, run_id_of

pytestmark = pytest.mark.heavy


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def test_what_was_left_is_sent_of_several_folders_and_of_a_pipelines(tmp_path: Path, capsys) -> None:
    place = tmp_path / "place"
    for name in ("a", "b/vae", "b/ldm"):  # as processes that were killed leave them
        begin_note(tmp_path / name, TrackingConfig(uri=f"sqlite:///{place}/mlflow.db"), name, {"a": 1})
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "time": 1.5, "split": "train", "loss": 2.0}\n')
    assert main(["track", "replay", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3
    assert all("sent 1 row, params, tags, its status to sqlite" in line for line in told)
    for name in ("a", "b/vae", "b/ldm"):
        run = client_of(place).get_run(run_id_of(tmp_path / name))
        assert (run.info.status, run.data.metrics, run.data.params) == ("KILLED", {"train/loss": 2.0}, {"a": "1"})
    before = (place / "mlflow.db").read_bytes()
    assert main(["track", "replay", str(tmp_path)]) == 0  # again, as cron does
    assert capsys.readouterr().out.count("has all") == 3
    assert (place / "mlflow.db").read_bytes() == before


def test_what_can_not_be_sent_is_told_and_is_exit_code_1(tmp_path: Path, capsys) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    Tracker(tmp_path / "run", TrackingConfig(uri=uri, close_s=10.0)).close()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["track", "replay", str(tmp_path / "run")])
    assert end.value.code == 1
    assert f"{tmp_path}/run: MLflow at {uri} failed: connection refused" in capsys.readouterr().err
    begin_note(tmp_path / "b", TrackingConfig(), "b", {})
    for words, code in ((["nothing"], 1), (["nothing", "b"], 1), (["b"], 0)):
        try:
            got = main(["track", "replay", *(str(tmp_path / word) for word in words)])
        except SystemExit as error:
            got = error.code
        assert got == code, words
        out, err = capsys.readouterr()
        assert ("no run there is followed in MLflow" in err) == ("nothing" in words)
        assert (f"{tmp_path}/b: " in out) == ("b" in words), "the others are sent"
    assert main(["track", "replay"]) == 2


def replayed(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    """Exit code, and what was told."""
    try:
        code = main(["track", "replay", *words])
    except SystemExit as end:
        code = int(str(end.code))
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("by_link", [False, True])
@pytest.mark.parametrize("forged", [False, True])
def test_a_run_of_somebody_else_has_no_other_files_sent(tmp_path: Path, by_link: bool, forged: bool, capsys) -> None:
    store, run = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "shared" / "run"
    note = begin_note(run, TrackingConfig(uri=store), "vae", {})
    (tmp_path / "key").write_text("mine")
    (run / "plan.json").symlink_to(tmp_path / "key")
    (tmp_path / "shared" / "scores.png").write_text("a page beside the run, as of an evaluation")
    note["artifacts"] = [["plan.json" if by_link else "../../key", ""], ["../scores.png", ""]]
    (run / NOTE).write_text(json.dumps(note))
    if forged:  # another store has the file, says a state that lies beside the note
        stamp = stamp_of(tmp_path / "key")
        state = {"uri": "sqlite:///other.db", "artifacts": {note["artifacts"][0][0]: stamp}}
        (run / STATE).write_text(json.dumps(state))
    begin_note(run / "child", TrackingConfig(uri=store, parent=str(run)), "child", {})
    code, told = replayed(capsys, str(run.parent))
    assert code == 1
    assert told.count(f"{run}: it is to send {tmp_path}/key, which is in no folder that was given. Where") == 2
    assert not list(tmp_path.rglob("artifacts/*"))
    assert replayed(capsys, str(run), "outside=true")[0] == 0
    assert {path.name for path in tmp_path.rglob("artifacts/*")} == {Path(note["artifacts"][0][0]).name, "scores.png"}


@pytest.mark.parametrize("secret", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH", ".mlflow/credentials"])
@pytest.mark.parametrize("scheme", ["http://", "HTTP://", " http://", "plugin-http://"])
def test_a_password_goes_to_the_server_that_the_user_names(
    tmp_path: Path, monkeypatch, capsys, scheme: str, secret: str
) -> None:
    uri = f"{scheme}127.0.0.1:{free_port()}"
    note = begin_note(tmp_path / "run", TrackingConfig(uri="http://127.0.0.1"), "vae", {})
    (tmp_path / "run" / NOTE).write_text(json.dumps(note | {"uri": uri}))
    monkeypatch.setenv("HOME", str(tmp_path))
    if secret.startswith("."):
        (tmp_path / secret).parent.mkdir()
        (tmp_path / secret).write_text("[mlflow]")
    else:
        monkeypatch.setenv(secret, "hidden")
    for named in ("", "http://127.0.0.1:1", f"{uri.strip()}0"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
        code, told = replayed(capsys, str(tmp_path))
        assert code == 1
        assert f"its server is {uri}. Set MLFLOW_TRACKING_URI={uri} where it may have " in told
        assert secret in told
    for named in (uri, uri.replace("//", "//me:hidden@")) if scheme == "http://" else ():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
        assert f"MLflow at {uri} failed: " in replayed(capsys, str(tmp_path))[1]  # nobody listens there


def test_files_of_any_folder_that_is_given_are_sent_in_that_order(tmp_path: Path, capsys) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for name in ("b", "a"):
        note = begin_note(tmp_path / name, TrackingConfig(uri=store), name, {})
        (tmp_path / name / "page.txt").write_text(name)
        note["artifacts"] = [["../a/page.txt", ""], ["../b/page.txt", ""]]
        (tmp_path / name / NOTE).write_text(json.dumps(note))
    code, told = replayed(capsys, str(tmp_path / "b"), str(tmp_path / "a"))
    assert code == 0
    assert [line.partition(":")[0] for line in told.splitlines() if "sent" in line] == [
        f"{tmp_path}/b",
        f"{tmp_path}/a",
    ]


def test_the_command_that_is_told_sends_what_lies_beside_a_run(tmp_path: Path, capsys) -> None:
    """As of an evaluation, whose page lies beside its run's folder."""
    (tmp_path / "report.html").write_text("a page")
    with Tracker(tmp_path / "run", TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", close_s=0.1)) as tracker:
        tracker.log_artifact(tmp_path / "report.html")
    told = capsys.readouterr().err
    assert f"`scldm track replay {tmp_path}/run outside=true` sends the rest" in told


def test_a_run_goes_by_nothing_that_somebody_else_noted(tmp_path: Path, monkeypatch, capsys) -> None:
    """Neither in its own folder, nor in those below."""
    store, run = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    (tmp_path / "key").write_text("mine")
    for folder in (run, run / "below"):
        note = begin_note(folder, TrackingConfig(uri=store), "vae", {}) | {"status": "FINISHED", "ended": 1.0}
        note["artifacts"] = [[os.path.relpath(tmp_path / "key", folder), ""]]
        (folder / NOTE).write_text(json.dumps(note))
    with Tracker(run, TrackingConfig(uri=store)) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert f"{run}/below: it is to send {tmp_path}/key, which is in no folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("artifacts/*"))


def test_a_verb_that_makes_something_is_a_run_of_its_parent(tmp_path: Path, monkeypatch, capsys) -> None:
    write_cells(tmp_path / "cells.h5ad")
    words = ["shards", "write", f"source.paths={tmp_path}/cells.h5ad", f"out={tmp_path}/shards", "block_cells=32"]
    assert main([*words, "split.validation=2"]) == 2  # refused before it begins
    with Tracker(tmp_path / "all", TrackingConfig(), stage="pipeline"):
        monkeypatch.setenv(PARENT, str(tmp_path / "all"))
        assert main([*words, "split.validation=0.2"]) == 0
        assert main(["shards", "info", f"path={tmp_path}/shards"]) == 0  # which makes nothing
    folder = tmp_path / "all" / "tracking"
    assert [path.name for path in folder.iterdir()] == ["shards-write"]
    run = client_of(tmp_path / "all").get_run(run_id_of(folder / "shards-write"))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "shards write")
    assert run.data.params["split.validation"] == "0.2"
    assert run.data.tags["out.manifest"] == dataset_of(str(tmp_path / "shards"), "output")["digest"]
    assert run.data.tags["mlflow.parentRunId"] == run_id_of(tmp_path / "all")
    assert json.loads((folder / "shards-write" / "tracked.json").read_text())["status"] == "FINISHED"


@pytest.mark.parametrize(
    "words",
    [
        "evaluate generated={0}/none.h5ad shards={0}/none out={0}/out",  # before its packages are imported
        f"evaluate generated={__file__} real={{0}}/none.h5ad out={{0}}/out",
        "train vae run_dir={0}/out",  # no data.shards
        "encode vae={0}/none out={0}/out",
    ],
)
def test_a_stage_that_fails_before_its_run_begins_fails_the_pipeline(tmp_path: Path, monkeypatch, words: str) -> None:
    begin_note(tmp_path, TrackingConfig(), "pipeline", {}, closed_by="evaluate")
    monkeypatch.setenv(PARENT, str(tmp_path))
    assert main(words.format(tmp_path).split()) == 2
    assert client_of(tmp_path).get_run(run_id_of(tmp_path)).info.status == "FAILED"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["shards info path={0}/none", "status bogus=1", "plan vae/tinyy", "track replay a=1"])
def test_a_verb_that_only_looks_fails_no_pipeline(tmp_path: Path, monkeypatch, words: str) -> None:
    begin_note(tmp_path, TrackingConfig(), "pipeline", {}, closed_by="evaluate")
    monkeypatch.setenv(PARENT, str(tmp_path))
    assert main(words.format(tmp_path).split()) == 2
    assert not (tmp_path / "mlflow.db").exists()


def test_a_damaged_note_of_the_pipeline_hides_no_refusal(tmp_path: Path, monkeypatch, capsys) -> None:
    begin_note(tmp_path, TrackingConfig(), "pipeline", {}, closed_by="evaluate")
    (tmp_path / NOTE).write_text("{")
    monkeypatch.setenv(PARENT, str(tmp_path))
    assert main(["encode", f"vae={tmp_path}/none", f"out={tmp_path}/out"]) == 2
    assert "scldm encode: error: shards must be given" in capsys.readouterr().err
