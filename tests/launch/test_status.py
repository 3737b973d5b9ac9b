"""`scldm status` and `scldm logs` from files alone; on a real Slurm in tests/slurm."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.cli import main
from launch.cluster import commands as slurm
from launch.cluster import logs
from launch.cluster.status import duration, seconds_per_step
from scldm.environment import describe
from scldm.train import changes
from scldm.train.run_folder import locked


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 250 of 1,000."""
    folder = tmp_path / "my run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "errors").mkdir()
    (folder / "config.json").write_text(json.dumps({"train": {"steps": 1_000, "global_batch": 64, "hang_s": 900.0}}))
    row = {
        "step": 250,
        "cells_seen": 16_000,
        "time": time.time() - 65,
        "split": "train",
        "loss": 1.5,
        "cells_per_s": 8.0,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "checkpoints" / "latest").write_text("step-00000200")
    (folder / "errors" / "rank-10.txt").write_text("2026-01-01 00:00:00 rank 10\nTraceback\nValueError: no cells\n")
    (folder / "errors" / "rank-9.txt").write_text("2026-01-01 00:00:00 rank 9\nscldm: rank 9 stops: rank 10 failed\n")
    return folder


def note(notes: Path, state: str, reason: str = "", job: str = "7") -> Path:
    notes.mkdir(parents=True)
    (notes / "job.json").write_text(json.dumps({"id": job, "name": notes.name, "words": []}))
    if state:
        (notes / "state").write_text(f"{state}\t{job}\t2026-01-01 00:00:00\t0\t{reason}\n")
    (notes / "log.txt").write_text(f"log of {notes.name}\n")
    return notes


def told(capsys: pytest.CaptureFixture, *words: str) -> list[tuple[str, str]]:
    assert main(list(words)) == 0
    return [tuple(line.split(maxsplit=1)) for line in capsys.readouterr().out.splitlines()]


def test_how_far_a_run_is(run: Path, capsys: pytest.CaptureFixture) -> None:
    note(run / "slurm", "FAILED", "no progress since the last requeue (still at 200)")
    (run / "slurm" / "bad_nodes").write_text("n3\t2026-01-01 00:00:00\tslow\n")
    lines = told(capsys, "status", str(run))
    assert dict(lines) == {
        "state": "FAILED, job 7: no progress since the last requeue (still at 200)",
        "bad": "node    n3: slow (2026-01-01 00:00:00)",
        "step": "250 of 1,000 (25.0 %), loss 1.5",
        "cells/s": "8, 1 min ago",
        "time": "left   1 h 40 min",  # 750 steps of 64 cells, 8 a second
        "checkpoint": "step 200, 0 s ago",
        "rank-9": "scldm: rank 9 stops: rank 10 failed (0 s ago)",
        "rank-10": "ValueError: no cells (0 s ago)",
    }
    assert [name for name, _ in lines][-2:] == ["rank-9", "rank-10"]


def test_the_time_that_a_step_takes_has_validation_and_saves_in_it_but_no_time_in_the_queue() -> None:
    times = {10: 0.0, 20: 10.0, 30: 1_000.0, 40: 1_010.0, 50: 1_060.0}  # it was started again at 999, validated at 40
    rows = [{"step": step, "time": at} for step, at in times.items()]
    assert seconds_per_step(rows, 999.0) == 3.0
    assert seconds_per_step(rows, 1_050.0) is None
    assert seconds_per_step([], 0.0) is None


def test_what_changed_its_course_is_shown(run: Path, capsys: pytest.CaptureFixture) -> None:
    changes.note(run, 100, {}, Path("/runs/vae"))
    changes.note(run, 200, {"optim.lr": (0.001, 0.0003)})
    shown = told(capsys, "status", str(run))
    assert shown[1][0] == "step"  # what is noted of the run is no note of a job
    lines = [text for name, text in shown if name == "changed"]
    assert lines == ["at step 100: branched from /runs/vae", "at step 200: optim.lr was 0.001, is 0.0003"]


def test_a_run_without_a_job_has_a_status_too(run: Path, capsys: pytest.CaptureFixture) -> None:
    then = time.time() - 7_300
    for path in (run / "config.json", run / "metrics.jsonl", run / "checkpoints" / "latest"):
        os.utime(path, (then, then))
    lines = told(capsys, "status", str(run))
    killed = "KILLED: no process trains in it, and the last one left no word of its end. It last wrote 2 h 2 min ago"
    assert lines[:2] == [("state", killed), ("step", "250 of 1,000 (25.0 %), loss 1.5")]
    assert lines[-1][0] == "rank-10"
    (run / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": ""}))
    os.utime(run / "lock", (then, then))
    state = told(capsys, "status", str(run))[0][1]
    assert state.startswith("KILLED"), "it is silent for longer than a hang may last"
    os.utime(run / "metrics.jsonl", (time.time() - 1_200, time.time() - 1_200))  # it opens its data, say
    state = told(capsys, "status", str(run))[0][1]
    assert state.startswith("RUNNING or killed: it is trained on elsewhere, whose locks this host may not see")
    (run / "lock").unlink()
    with locked(run):
        assert told(capsys, "status", str(run))[0] == ("state", "RUNNING")
    (run / "outcome.json").write_text(json.dumps({"state": "stopped", "exit_code": 85, "reason": "SIGTERM"}))
    assert told(capsys, "status", str(run))[0] == ("state", "STOPPED, exit code 85: SIGTERM")
    # what a start before the last one left is over
    (run / "environment.json").write_text(json.dumps([describe() | {"time": datetime.now(UTC).isoformat()}]))
    assert not any(name.startswith("rank") for name, _ in told(capsys, "status", str(run)))


def test_notes_that_are_no_text_are_passed_over_and_a_damaged_pointer_is_named(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    note(run / "slurm", "FAILED", "exit code 1")
    (run / "slurm" / "state-1").write_bytes(b"\xff\xfe\t\t\n")
    (run / "slurm" / "bad_nodes").write_bytes(b"\xff\n")
    (run / "errors" / "rank-x.txt").write_bytes(b"\xff no cells\n")
    lines = told(capsys, "status", str(run))
    assert lines[0] == ("state", "FAILED, job 7: exit code 1")
    assert dict(lines)["rank-x"].endswith(" no cells (0 s ago)")
    (run / "checkpoints" / "latest").write_text("none")
    assert main(["status", str(run)]) == 2
    assert "checkpoints/latest is damaged: it holds 'none', must be a checkpoint" in capsys.readouterr().err


def test_a_job_that_sbatch_submitted_has_a_status_too(run: Path, capsys: pytest.CaptureFixture) -> None:
    note(run / "slurm", "FAILED", "exit code 1", job="9")
    (run / "slurm" / "job.json").unlink()
    (run / "slurm" / "history").write_text("start\t9\t0\t0\n")
    assert told(capsys, "status", str(run))[0] == ("state", "FAILED, job 9: exit code 1")


def test_a_chain_names_what_will_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = tmp_path / "all" / "slurm"
    links = [note(notes / "vae", "DONE", job="1"), note(notes / "encode", "FAILED", "exit code 2", "2")]
    links.append(note(notes / "ldm", "", job="3"))
    (notes / "chain.json").write_text(json.dumps([str(folder) for folder in links]))
    first, second, third = told(capsys, "status", str(tmp_path / "all"))
    assert first[1].split() == ["DONE", "job", "1"]
    assert second[1].split(maxsplit=3) == ["FAILED", "job", "2", "exit code 2"]
    assert third[1].endswith("it depends on encode, which ended as FAILED")
    assert main(["logs", str(tmp_path / "all"), "follow=false"]) == 0
    assert capsys.readouterr().out == "log of vae\nlog of encode\nlog of ldm\n"


def test_an_array_is_as_good_as_its_worst_task(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = note(tmp_path / "shards.slurm", "")
    for task, state in enumerate(("DONE", "FAILED", "DONE")):
        (notes / f"state.{task}").write_text(f"{state}\t{task}\t2026-01-01 00:00:00\t0\treason {task}\n")
    assert told(capsys, "status", str(tmp_path / "shards")) == [("state", "FAILED, job 7: reason 1")]


def test_a_job_that_left_no_word_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    note(tmp_path / "latents.slurm", "RUNNING", "on n1")
    ((_, state),) = told(capsys, "status", str(tmp_path / "latents"))
    assert state.startswith("LOST, job 7: Slurm no longer knows the job")


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's command, which prints this file, or fails where there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text(
        f'#!/bin/bash\nif ! read -r line 2>/dev/null <"{tmp_path}/jobs"; then exit 1; fi\necho "$line"\n'
    )
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path / "jobs"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("state", [*slurm.ENDED])
def test_the_log_ends_with_a_job_that_could_say_no_last_word(
    state: str, tmp_path: Path, squeue: Path, capsys: pytest.CaptureFixture
) -> None:
    note(tmp_path / "run" / "slurm", "RUNNING", "on n1")
    squeue.write_text(f"{state}|None\n")
    assert main(["logs", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == "log of slurm\n"


def test_the_log_goes_on_while_slurm_gives_no_answer(
    tmp_path: Path, squeue: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = note(tmp_path / "run" / "slurm", "RUNNING", "on n1")
    assert told(capsys, "status", str(tmp_path / "run"))[0][1].startswith("UNKNOWN, job 7: squeue: exit code 1")
    answers = iter(["PENDING|BeginTime", "RUNNING|None", "NODE_FAIL|None"])

    def later(seconds: float) -> None:
        squeue.write_text(next(answers) + "\n")
        with (notes / "log.txt").open("a") as file:
            file.write("more\n")

    monkeypatch.setattr(logs, "ASK_SLURM_EVERY_S", -1.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=later, monotonic=time.monotonic))
    assert main(["logs", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == "log of slurm\n" + 3 * "more\n"


def test_the_log_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = note(tmp_path / "run" / "slurm", "DONE")
    (notes / "log.txt").write_text("job 7: RUNNING\n 1: one\n11: eleven\n 1:   two: 1: \n 1: its last")
    assert main(["logs", str(tmp_path / "run"), "rank=1"]) == 0
    assert capsys.readouterr().out == "one\n  two: 1: \nits last\n"


@pytest.mark.parametrize(
    "tasks, shown",
    [
        ("COMPLETED|0:0\\nOUT_OF_MEMORY|0:125\\n", "OUT_OF_MEMORY, job 7: by Slurm's accounting, exit code 0:125. Its"),
        ("CANCELLED by 0|0:0\\n", "CANCELLED, job 7: by Slurm's accounting, exit code 0:0. Its script"),
        ("RUNNING|0:0\\n", "LOST, job 7: "),
    ],
)
def test_slurms_accounting_knows_a_job_that_its_controller_has_forgotten(
    tasks: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture, squeue: Path
) -> None:
    (squeue.parent / "bin" / "squeue").write_text(
        "#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n"
    )
    sacct = squeue.parent / "bin" / "sacct"
    sacct.write_text(f"#!/bin/bash\n[[ $* == *--jobs=7* ]] && printf '{tasks}'\n")
    sacct.chmod(0o755)
    note(tmp_path / "run" / "slurm", "RUNNING", "on n1")
    assert told(capsys, "status", str(tmp_path / "run"))[0][1].startswith(shown)


def test_no_job_no_status(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for verb in ("status", "logs"):
        assert main([verb, str(tmp_path)]) == 2
        assert "no job was submitted for it" in capsys.readouterr().err
        assert main([verb]) == 2
        assert "run must be given" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(s) for s in (0, 29, 60, 3_700, 3 * 86_400 + 3_700)] == [
        *("0 s", "29 s", "1 min", "1 h 2 min", "3 d 1 h 2 min"),
    ]
