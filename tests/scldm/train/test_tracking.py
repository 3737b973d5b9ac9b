"""Tracking: the file first, MLflow behind it, and no failure that reaches training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scldm.errors import InputError
from scldm.train import mlflow_run, sending
from scldm.train.mlflow_run import database_of, database_uri
from scldm.train.sending import replay
from scldm.train.tracked import followed_alone, read_note, stamp_of, unsent
from scldm.train.tracking import PARENT, Tracker, TrackingConfig, begin_note, read_metrics

OFF = TrackingConfig(enabled=False)


def run_id_of(folder: Path) -> str:
    return json.loads((folder / "mlflow_run.json").read_text())["run_id"]


def noted_status(folder: Path) -> str:
    note = read_note(folder)
    assert note is not None
    return note["status"]


def wait_until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def has_all(folder: Path) -> bool:
    return (folder / "mlflow_run.json").is_file() and not unsent(folder)


def test_rows_are_in_the_file_at_once_and_a_torn_row_is_dropped_on_resume(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFF)
    tracker.log(1, {"loss": 2.5, "bad": float("nan")}, cells_seen=128)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # before any close
    assert row == {"step": 1, "cells_seen": 128, "time": row["time"], "split": "train", "loss": 2.5, "bad": None}
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed while writing
    with Tracker(tmp_path, OFF) as tracker:
        tracker.log(1, {"loss": 2.0})  # the resumed run repeats a step
        tracker.log(2, {"loss": 1.5})
        tracker.log(2, {"nll": 7.0}, split="validation")
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path, "train")] == [(1, 2.0), (2, 1.5)]
    assert [r["nll"] for r in read_metrics(tmp_path, "validation")] == [7.0]
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.heavy
def test_lines_that_are_no_rows_are_passed_over_and_the_rows_around_them_are_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from mlflow import MlflowClient

    with Tracker(tmp_path, OFF) as tracker:
        tracker.log(1, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:  # as a machine that went down leaves them
        file.write(b"\0" * 40 + b"\n" + b'{"step": 2, "lo{"step": 3}\n' + b"7\n" + b'{"step": 2, "loss": 1.0}\n\xff\n')
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with Tracker(tmp_path, TrackingConfig(uri=uri)) as tracker:
        tracker.log(3, {"loss": 1.0})
    run_id = run_id_of(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert [m.step for m in MlflowClient(uri).get_metric_history(run_id, "train/loss")] == [1, 3]
    assert capsys.readouterr().err.count("has lines that are no rows") == 1


def test_a_local_store_is_waited_for_a_server_for_a_time_and_who_was_stopped_hurries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whoever stopped it kills what has not ended half a minute later, and the exit code with it
    monkeypatch.setattr(sending, "HURRY_S", 0.2)
    waits: list[float | None] = []
    monkeypatch.setattr(sending.Forwarder, "run", lambda self: self.closing.wait(60))
    monkeypatch.setattr(sending.Forwarder, "join", lambda self, timeout=None: waits.append(timeout))
    for uri in ("", "http://127.0.0.1:1"):
        for status in ("FINISHED", "FAILED", "KILLED"):
            Tracker(tmp_path, TrackingConfig(uri=uri, close_s=9.0)).close(status)
    assert waits == [sending.DATABASE_S, 0.2, 0.2, 9.0, 0.2, 0.2]


@pytest.mark.slow
def test_a_slow_start_of_mlflow_loses_nothing_of_a_run_in_a_local_store(tmp_path: Path) -> None:
    """As where its import and its tables take longer than the run: no wait of ours may end first."""
    from mlflow import MlflowClient

    code = SLOW_START.format(folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "not everything" not in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(run_id_of(tmp_path / "child"))
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)
    assert run.data.tags["mlflow.parentRunId"] == run_id_of(tmp_path)
    assert [of.path for of in client.list_artifacts(run.info.run_id)] == ["config.json"]
    assert client.get_run(run_id_of(tmp_path)).info.status == "FINISHED"


SLOW_START = """
import time
from pathlib import Path
from scldm.train import mlflow_run
from scldm.train.tracking import Tracker, TrackingConfig

real = mlflow_run._client
def slow(uri):
    time.sleep(8)
    return real(uri)
mlflow_run._client = slow

folder = Path('{folder}')
(folder / "config.json").write_text("1")
with Tracker(folder, TrackingConfig(close_s=0.5), stage="quickstart"):
    with Tracker(folder / "child", TrackingConfig(parent=str(folder), close_s=0.5)) as child:
        child.log(1, {{"loss": 1.0}})
        child.log_artifact(folder / "config.json")
"""


def test_a_rank_that_is_not_active_writes_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", TrackingConfig(), active=False, params={"a": 1}) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.log_artifact(tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_no_half_row_and_does_not_raise(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tracker = Tracker(tmp_path, OFF)
    tracker.log(1, {"loss": 1.0})
    file = tracker._file
    assert file is not None

    class HalfFull:
        def __getattr__(self, name: str):
            return getattr(file, name)

        def write(self, data: bytes) -> int:
            return file.write(data[:10])

    tracker._file = HalfFull()  # type: ignore[assignment]
    tracker.log(2, {"loss": 2.0})
    tracker.log(3, {"loss": 3.0})
    tracker._file = file
    tracker.log(4, {"loss": 4.0})
    tracker.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 4]
    assert capsys.readouterr().err.count("writing") == 1


def test_a_server_that_is_not_there_costs_no_time_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = TrackingConfig(uri=f"http://user:secret@127.0.0.1:{free_port()}", every_s=0.05, close_s=20.0, system_s=0)
    start = time.monotonic()
    tracker = Tracker(tmp_path, cfg)
    for step in range(200):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 2.0
    tracker.close()
    assert time.monotonic() - start < 30.0
    assert len(read_metrics(tmp_path)) == 200
    said = capsys.readouterr().err
    assert said.count(" failed: connection refused: no server listens there") == 1
    assert said.count("not everything reached") == 1
    assert f"`scldm track replay {tmp_path}` sends the rest" in said
    assert "it lacks 200 rows" in said
    assert "secret" not in said


@pytest.mark.parametrize("given, above, named", [("", "", "env"), ("", "parent", "parent"), ("own", "parent", "own")])
def test_the_experiment_is_its_own_or_its_parents_or_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, above: str, named: str
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "env")
    if above:
        begin_note(tmp_path, TrackingConfig(experiment=above), "quickstart", {})
    cfg = TrackingConfig(experiment=given, parent=str(tmp_path) if above else "")
    assert begin_note(tmp_path / "vae", cfg, "train vae", {})["experiment"] == named


@pytest.mark.heavy
def test_sqlite_runs_are_nested_and_a_resume_goes_on_in_the_same_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    figure = tmp_path / "figure.txt"
    figure.write_text("here")
    parent = Tracker(tmp_path, TrackingConfig(experiment="mine"), stage="quickstart")
    cfg = TrackingConfig(parent=str(tmp_path), every_s=0.1)
    with Tracker(tmp_path / "vae", cfg, stage="train vae", params={"ranks": 2, "optim": {"lr": 0.1}}) as tracker:
        tracker.log(1, {"loss": 3.0, "odd name %": 1.0, "inf": float("inf")}, cells_seen=64)
        tracker.log_artifact(figure, "figures")
        tracker.log_on_parent({"w2": 0.5}, "test")
    first_id, client = run_id_of(tmp_path / "vae"), MlflowClient(uri)
    with Tracker(tmp_path / "vae", cfg, params={"ranks": 4, "new": 1}) as tracker:
        tracker.log(2, {"loss": 2.0}, cells_seen=128)
        wait_until(lambda: client.get_run(first_id).info.status == "RUNNING")
        tracker.close("KILLED")
    parent.close()
    parent_id = run_id_of(tmp_path)
    assert client.get_run(parent_id).data.metrics["test/w2"] == 0.5
    experiment = client.get_experiment(client.get_run(first_id).info.experiment_id)
    assert (experiment.name, experiment.tags["mlflow.experimentKind"]) == ("mine", "custom_model_development")

    run = client.get_run(first_id)
    assert run.info.status == "KILLED"
    assert run.info.run_name == "train vae"
    assert run.data.tags["mlflow.source.name"] == "scldm train vae"
    assert Path(sys.argv[0]).name in run.data.tags["command"]
    assert run.data.tags["mlflow.parentRunId"] == parent_id
    assert client.get_run(parent_id).info.status == "FINISHED"
    assert run.data.params == {"ranks": "2", "optim.lr": "0.1", "new": "1"}
    assert run.data.tags["resumed.ranks"] == "4"
    assert [(m.step, m.value) for m in client.get_metric_history(first_id, "train/loss")] == [(1, 3.0), (2, 2.0)]
    assert "train/odd name _" in run.data.metrics
    assert [a.path for a in client.list_artifacts(first_id, "figures")] == ["figures/figure.txt"]
    assert list((tmp_path / "mlflow_artifacts").rglob("figure.txt"))

    # what was noted as sent is not sent again
    state_file = tmp_path / "vae" / "mlflow_run.json"
    with Tracker(tmp_path / "vae", OFF) as tracker:
        tracker.log(3, {"loss": 1.0})
    sent = {"sent": {"metrics.jsonl": (tmp_path / "vae" / "metrics.jsonl").stat().st_size}}
    state = json.loads(state_file.read_text()) | sent
    state_file.write_text(json.dumps(state))
    Tracker(tmp_path / "vae", cfg).close()
    assert run_id_of(tmp_path / "vae") == first_id
    assert len(client.get_metric_history(first_id, "train/loss")) == 2

    # the store no longer has the run: a new one there, with every row
    state_file.write_text(json.dumps(state | {"run_id": "0" * 32}))
    Tracker(tmp_path / "vae", cfg).close()
    second_id = run_id_of(tmp_path / "vae")
    assert second_id not in ("", first_id)
    assert len(client.get_metric_history(second_id, "train/loss")) == 3


@pytest.mark.heavy
def test_a_pipeline_that_no_process_follows_is_what_its_stages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv(PARENT, str(tmp_path))
    begin_note(tmp_path, TrackingConfig(experiment="mine"), "pipeline", {"vae": "words"}, closed_by="evaluate")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def status() -> str:
        return client.get_run(run_id_of(tmp_path)).info.status

    Tracker(tmp_path / "vae", TrackingConfig(), stage="train vae").close("FAILED")
    wait_until(lambda: has_all(tmp_path) and status() == "FAILED")
    with Tracker(tmp_path / "vae", TrackingConfig(), stage="train vae"):  # it goes on
        wait_until(lambda: status() == "RUNNING")
    assert status() == "RUNNING", "the other stages are to come"
    with Tracker(tmp_path / "evaluation", TrackingConfig(), stage="evaluate") as tracker:
        tracker.log_on_parent({"w2": 0.5}, "test")
    run = client.get_run(run_id_of(tmp_path))
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "pipeline", {"vae": "words"})
    assert run.data.metrics["test/w2"] == 0.5
    assert "mlflow.parentRunId" not in run.data.tags
    for child in ("vae", "evaluation"):
        of = client.get_run(run_id_of(tmp_path / child))
        assert of.data.tags["mlflow.parentRunId"] == run.info.run_id
        assert of.info.experiment_id == run.info.experiment_id
    assert "has all" in replay(tmp_path)


CUT = """
import os, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from scldm.train.tracking import Tracker, TrackingConfig

made = 0

@event.listens_for(Engine, "before_cursor_execute")
def cut(connection, cursor, statement, *_):
    global made
    made += "CREATE TABLE" in statement
    if made == 40:
        os._exit(85)

tracker = Tracker(Path(sys.argv[1]), TrackingConfig())
tracker.log(1, {"loss": 2.0})
tracker.close()
"""


@pytest.mark.heavy
def test_a_run_that_was_stopped_while_mlflow_made_its_tables_goes_on_there(tmp_path: Path) -> None:
    """Of which it needs a second, or on a busy file system many."""
    from mlflow import MlflowClient

    done = subprocess.run([sys.executable, "-c", CUT, tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 85, done.stderr
    there = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert there == {"metrics.jsonl", "tracked.json"}
    with Tracker(tmp_path, TrackingConfig()) as tracker:
        tracker.log(2, {"loss": 1.0})
    run_id = run_id_of(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_an_exception_leaves_the_run_failed_and_an_interrupt_killed(tmp_path: Path, monkeypatch) -> None:
    statuses: list[str] = []
    monkeypatch.setattr(Tracker, "close", lambda self, status="FINISHED": statuses.append(status))
    for error in (None, ValueError(), KeyboardInterrupt(), SystemExit(85)):
        tracker = Tracker(tmp_path, OFF, active=False)
        tracker.__exit__(type(error) if error else None, error, None)
    assert statuses == ["FINISHED", "FAILED", "KILLED", "KILLED"]


def test_importing_it_does_not_import_mlflow() -> None:
    code = "import sys, scldm.train.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_what_a_killed_server_missed_is_there_once_after_it_is_back(tmp_path: Path, capsys) -> None:
    from mlflow import MlflowClient

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    try:
        tracker = Tracker(tmp_path / "run", TrackingConfig(uri=uri, every_s=0.2, close_s=60.0), params={"a": 1})
        wait_until(lambda: has_all(tmp_path / "run"))
        run_id = run_id_of(tmp_path / "run")
        for step in range(300):
            tracker.log(step, {"loss": step / 2, "lr": 0.1})
            if step == 100:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            if step > 100:
                time.sleep(0.02)  # rows go on while the server is away
        server = start_server(tmp_path, port)
        tracker.close()
        client = MlflowClient(uri)
        history = client.get_metric_history(run_id, "train/loss")
        assert sorted((m.step, m.value) for m in history) == [(s, s / 2) for s in range(300)]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert capsys.readouterr().err.count(" failed: ") == 1

        # killed between sending and noting how far: the rows are sent again and stay one
        state = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
        (tmp_path / "run" / "mlflow_run.json").write_text(json.dumps(state | {"sent": {}}))
        with Tracker(tmp_path / "run", TrackingConfig(uri=uri)) as tracker:
            tracker.log(300, {"loss": 150.0})
        assert len(client.get_metric_history(run_id, "train/loss")) == 301
    finally:
        stop_server(server)


@pytest.mark.slow
def test_what_a_server_missed_that_came_back_after_the_end_is_sent_by_a_replay(tmp_path: Path, capsys) -> None:
    from mlflow import MlflowClient

    port = free_port()
    server = start_server(tmp_path, port)
    run, figure = tmp_path / "run", tmp_path / "figure.txt"
    figure.write_text("here")
    try:
        cfg = TrackingConfig(uri=f"http://127.0.0.1:{port}", every_s=0.2, close_s=1.0, system_s=0)
        tracker = Tracker(run, cfg)
        tracker.log(0, {"loss": 0.0})
        wait_until(lambda: has_all(run))
        stop_server(server)
        for step in range(1, 200):
            tracker.log(step, {"loss": float(step)})
        tracker.log_artifact(figure)
        tracker.close()
        assert "it lacks 199 rows, 1 artifact, its status). All is in" in capsys.readouterr().err
        with pytest.raises(Exception, match="refused|timed out|Max retries"):
            replay(run)  # and nothing is lost by that
        server = start_server(tmp_path, port)
        assert "sent 199 rows, 1 artifact, its status to" in replay(run)
        assert "has all" in replay(run)
        client = MlflowClient(cfg.uri)
        of = client.get_run(run_id_of(run))
        assert of.info.status == "FINISHED"
        assert of.info.end_time < (run / "mlflow_run.json").stat().st_mtime_ns / 1e6 - 1_000, "it ended before"
        assert len(client.get_metric_history(of.info.run_id, "train/loss")) == 200
        assert [a.path for a in client.list_artifacts(of.info.run_id)] == ["figure.txt"]
    finally:
        stop_server(server)


@pytest.mark.heavy
def test_a_run_that_begins_while_a_replay_is_not_done_is_followed_all_the_same(tmp_path: Path) -> None:
    with followed_alone(tmp_path):
        tracker = Tracker(tmp_path, TrackingConfig(system_s=0))
        tracker.log(1, {"loss": 1.0})
        time.sleep(1.0)
        assert unsent(tmp_path)
    wait_until(lambda: has_all(tmp_path))
    tracker.close()
    assert has_all(tmp_path)


@pytest.mark.heavy
def test_what_a_child_could_not_send_is_sent_by_its_parent_at_the_end(tmp_path: Path, monkeypatch) -> None:
    from mlflow import MlflowClient

    with Tracker(tmp_path, TrackingConfig(every_s=0.1), stage="quickstart"):
        monkeypatch.setattr(sending.Forwarder, "start", lambda self: None)
        monkeypatch.setattr(sending.Forwarder, "join", lambda self, timeout=None: None)
        with Tracker(tmp_path / "vae", TrackingConfig(parent=str(tmp_path)), stage="train vae") as child:
            child.log(1, {"loss": 1.0})
        monkeypatch.undo()
    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run_id_of(tmp_path / "vae"))
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)


@pytest.mark.heavy
def test_a_child_whose_process_is_gone_is_killed_at_its_parents_end(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with Tracker(tmp_path, TrackingConfig(every_s=0.1), stage="quickstart"):
        for name in ("gone", "alive"):
            begin_note(tmp_path / name, TrackingConfig(parent=str(tmp_path)), name, {})
        alive = followed_alone(tmp_path / "alive")
        alive.__enter__()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(run_id_of(tmp_path / "gone")).info.status == "KILLED"
    assert not (tmp_path / "alive" / "mlflow_run.json").exists()
    assert noted_status(tmp_path / "alive") == "RUNNING"
    alive.__exit__(None, None, None)


@pytest.mark.heavy
def test_a_replayed_child_that_was_killed_fails_its_pipeline(tmp_path: Path) -> None:
    begin_note(tmp_path, TrackingConfig(), "pipeline", {}, closed_by="evaluate")
    begin_note(tmp_path / "vae", TrackingConfig(parent=str(tmp_path)), "train vae", {})
    assert "its status" in replay(tmp_path / "vae")
    assert [noted_status(of) for of in (tmp_path / "vae", tmp_path)] == ["KILLED", "FAILED"]


def test_a_process_that_was_killed_leaves_a_run_that_a_replay_ends(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    code = "import os, sys; from scldm.train.tracking import *; t = Tracker(sys.argv[1], TrackingConfig());"
    code += "t.log(1, {'loss': 1.0}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 9
    with followed_alone(tmp_path), pytest.raises(InputError, match="its own process still follows it"):
        replay(tmp_path)
    assert "sent 1 row" in replay(tmp_path)
    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run_id_of(tmp_path))
    assert (run.info.status, run.data.metrics["train/loss"]) == ("KILLED", 1.0)


# --- what a server refuses -----------------------------------------------------------------------------------------


def test_a_refused_name_alone_is_missing_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from mlflow import MlflowClient

    bad = "x" * 300
    with Tracker(tmp_path, TrackingConfig(system_s=0), params={"good": 1, "p" * 300: 2}) as tracker:
        for step in range(50):
            tracker.log(step, {"loss": 1.0, bad: 2.0, "nll": 3.0})
    client, run_id = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}"), run_id_of(tmp_path)
    for name in ("loss", "nll", "cells_seen"):
        assert len(client.get_metric_history(run_id, f"train/{name}")) == 50
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"good": "1"})
    said = capsys.readouterr().err
    assert said.count(f"refuses metric train/{bad}") == 1
    assert said.count(f"refuses param {'p' * 300}") == 1
    assert json.loads((tmp_path / "mlflow_run.json").read_text())["refused"][f"metrics train/{bad}"] == mlflow_run.SURE


def test_a_deleted_run_is_begun_anew_and_a_deleted_experiment_is_told_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from mlflow import MlflowClient

    cfg = TrackingConfig(experiment="mine", every_s=0.1, system_s=0)
    tracker = Tracker(tmp_path, cfg)
    tracker.log(1, {"loss": 1.0})
    wait_until(lambda: has_all(tmp_path))
    client, first = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}"), run_id_of(tmp_path)
    client.delete_run(first)
    tracker.log(2, {"loss": 2.0})
    wait_until(lambda: run_id_of(tmp_path) != first and has_all(tmp_path))
    tracker.close()
    second = run_id_of(tmp_path)
    assert [m.step for m in client.get_metric_history(second, "train/loss")] == [1, 2]

    number = client.get_run(second).info.experiment_id
    client.delete_experiment(number)
    with Tracker(tmp_path, cfg) as tracker:
        tracker.log(3, {"loss": 3.0})
    said = capsys.readouterr().err
    assert f"experiment 'mine' is deleted in MLflow: `mlflow experiments restore -x {number}` brings it back" in said
    client.restore_experiment(number)
    assert "sent 1 row" in replay(tmp_path)
    assert run_id_of(tmp_path) == second


class Front(BaseHTTPRequestHandler):
    """Stands before a real server, and fails as others do."""

    behind, mode, seen = "", "", list[str]()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(self.path)
        if self.mode == "never":
            time.sleep(30)
        elif self.mode == "500" or (self.mode == "500 of rows" and b'"metrics"' in body):
            self.reply(500, b'{"error_code": "INTERNAL_ERROR", "message": "disk full"}')
        elif self.mode == "auth" and self.headers.get("Authorization") != "Basic YW5uOmdlaGVpbQ==":  # ann:geheim
            self.reply(401, b"You are not authenticated.")
        elif self.mode == "500 characters" and any(
            len(p["value"]) > 500 for p in (json.loads(body or b"{}").get("params") or [])
        ):
            self.reply(400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "length exceeds 500"}')
        else:
            headers = {k: v for k, v in self.headers.items() if k in ("Content-Type", "Accept")}
            asked = urllib.request.Request(self.behind + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(asked, timeout=30) as got:
                    self.reply(got.status, got.read(), got.headers.get("Content-Type"))
            except urllib.error.HTTPError as error:
                self.reply(error.code, error.read())

    do_GET = do_POST = do_PUT = do_PATCH = answer

    def reply(self, code: int, body: bytes, kind: str | None = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind or "")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the front of a real server."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    server = start_server(folder, port)
    Front.behind = f"http://127.0.0.1:{port}"
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    stub.daemon_threads = True
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{stub.server_port}"
    stub.shutdown()
    stub.server_close()
    stop_server(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, said",
    [
        ("500", "failed: HTTP 500, an error of the server. Its log says more"),
        ("500 of rows", "failed: HTTP 500, an error of the server. Its log says more"),
        ("never", "failed: timed out: no answer within 3 s"),
        ("auth", "failed: HTTP 401, not logged in. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_server_that_fails_is_told_apart_and_gets_all_when_it_works(
    front: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, mode: str, said: str
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(Front, "mode", mode)
    start = time.monotonic()
    with Tracker(tmp_path, TrackingConfig(uri=front, close_s=15.0, system_s=0), params={"a": 1}) as tracker:
        for step in range(100):
            tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 25
    error = capsys.readouterr().err
    assert said in error
    assert "track replay" in error
    if mode == "auth":  # by the environment alone
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheim")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front)
    else:
        monkeypatch.setattr(Front, "mode", "")
    assert "sent" in replay(tmp_path)
    run = MlflowClient(Front.behind).get_run(run_id_of(tmp_path))
    assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1"})
    assert len(MlflowClient(Front.behind).get_metric_history(run.info.run_id, "train/loss")) == 100


@pytest.mark.slow
def test_an_older_server_gets_long_values_cut_and_that_is_said(front: str, tmp_path: Path, capsys, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(Front, "mode", "500 characters")
    Tracker(tmp_path, TrackingConfig(uri=front, system_s=0), params={"a": 1, "long": "x" * 700}).close()
    assert "refuses long of 700 characters, and gets 500 of them" in capsys.readouterr().err
    run = MlflowClient(Front.behind).get_run(run_id_of(tmp_path))
    assert run.data.params == {"a": "1", "long": "x" * 500}
    assert "has all" in replay(tmp_path)


def stop_server(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """A real MLflow server on the loopback, answering; the database in the folder outlives it."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    alone = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else eight more processes
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=alone, start_new_session=True)
    for _ in range(120):
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()
    raise TimeoutError((folder / "server.log").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("name", ["plain", "a b", "a?x=1", "pct%20x", "100%", "a#b"])
def test_a_run_folders_name_is_no_part_of_a_uri(name: str, tmp_path: Path) -> None:
    from sqlalchemy import make_url

    database = tmp_path / name / "mlflow.db"
    uri = database_uri(database)
    assert make_url(uri).database == str(database)
    assert database_of(uri) == database


@pytest.mark.parametrize("name", ["gone", "n" * 5_000, "a\0b", "."])
def test_what_can_be_no_file_has_no_stamp(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    assert stamp_of(tmp_path / "file") is not None
    assert stamp_of(tmp_path / name) is None
