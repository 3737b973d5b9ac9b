"""A run folder belongs to one config: another is refused with the dotted keys that differ."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from scldm.errors import Busy, InputError, Stopped
from scldm.train import nonfinite, run_folder
from scldm.train.branch import Branch
from scldm.train.run_folder import locked, open_run_folder, outcome_noted, read_config
from scldm.train.throughput import note_rank

CONFIG = {"run_dir": "a", "optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "train": {"steps": 5, "keep": 2}, "data": {}}
FREE = ("run_dir", "hardware", "train.keep")


def opened(run_dir: Path, config: dict, free: tuple[str, ...]) -> None:
    with open_run_folder(run_dir, config, free):
        pass


def changed(**groups: dict) -> dict:
    return {**CONFIG, **{group: {**CONFIG.get(group, {}), **values} for group, values in groups.items()}}


def test_the_same_command_opens_the_folder_again_and_every_start_is_noted(tmp_path: Path) -> None:
    for _ in range(2):
        opened(tmp_path / "run", CONFIG, FREE)
    assert read_config(tmp_path / "run")["optim"] == {"lr": 1e-3, "betas": [0.9, 0.95]}
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(starts) == 2
    assert {"versions", "git", "command"} <= starts[0].keys()


def test_how_a_start_computes_is_kept_with_its_environment(tmp_path: Path) -> None:
    for way in ("factorised", "fused"):
        with open_run_folder(tmp_path, CONFIG, FREE, {"attention": way}):
            pass
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["attention"] for start in starts] == ["factorised", "fused"]


def test_what_is_free_may_change_and_is_noted(tmp_path: Path) -> None:
    opened(tmp_path, CONFIG, FREE)
    opened(tmp_path, {**changed(train={"keep": 9}), "run_dir": "b", "hardware": {"threads": 4}}, FREE)
    assert read_config(tmp_path)["train"]["keep"] == 9


@pytest.mark.parametrize(
    "config, said",
    [
        (changed(optim={"lr": 2e-3}), "optim.lr was 0.001, now 0.002. Choose another run_dir"),
        (changed(train={"steps": 6}, optim={"betas": (0.8, 0.9)}), r"optim.betas was .*; train.steps was 5, now 6"),
        (changed(train={"keeper": 1}), "train.keeper was None, now 1"),
        (changed(data={"select": {"type": ["b"]}}), "data.select.type was None"),
    ],
)
def test_another_config_is_refused_and_nothing_is_touched(tmp_path: Path, config: dict, said: str) -> None:
    opened(tmp_path, CONFIG, FREE)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=said):
        opened(tmp_path, config, FREE)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and not a run folder"):
        opened(tmp_path, CONFIG, FREE)
    branch = Branch(tmp_path / "parent", 5, tmp_path / "parent" / "step", None, CONFIG)
    with (
        pytest.raises(InputError, match="not empty and not a run folder"),
        open_run_folder(tmp_path, CONFIG, FREE, branch=branch),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="not a run folder: it has no config.json"):
        read_config(tmp_path)


def test_a_start_that_died_before_its_first_file_was_whole_can_start_again(tmp_path: Path) -> None:
    (tmp_path / ".config.json.0123456789ab.partial").write_text('{"run')
    opened(tmp_path, CONFIG, FREE)
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_a_run_whose_config_lacks_a_key_is_another_run(tmp_path: Path) -> None:
    opened(tmp_path, CONFIG, FREE)
    with pytest.raises(InputError, match="holds another run: model.library_size was None, now False"):
        opened(tmp_path, {**CONFIG, "model": {"library_size": False}}, FREE)


def test_what_killed_starts_left_goes_from_the_folders_of_training(tmp_path: Path) -> None:
    """In others a verb or a job may be writing."""
    opened(tmp_path, CONFIG, FREE)
    for folder in ("diffs", "previews", ".profiles.0123456789ab.partial", "slurm", "samples"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".one.0123456789ab.partial").write_text("ha")
    opened(tmp_path, CONFIG, FREE)
    assert sorted(p.parent.name for p in tmp_path.rglob("*.partial")) == ["samples", "slurm"]


def test_a_file_that_only_ends_as_ours_do_is_left(tmp_path: Path) -> None:
    opened(tmp_path, CONFIG, FREE)
    (tmp_path / "notes.partial").write_text("mine")
    opened(tmp_path, CONFIG, FREE)
    assert (tmp_path / "notes.partial").read_text() == "mine"


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"run')
    for use in (lambda: read_config(tmp_path), lambda: opened(tmp_path, CONFIG, FREE)):
        with pytest.raises(InputError, match=r"config.json is damaged"):
            use()


def test_what_can_not_be_read_of_earlier_starts_does_not_keep_a_run_from_its_next(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    opened(tmp_path, CONFIG, FREE)
    for held, aside in (("", "environment.json.broken"), ('[{"time": 3}]', "environment.json.broken1")):
        (tmp_path / "environment.json").write_text(held)
        opened(tmp_path, CONFIG, FREE)
        assert re.search(f"environment.json.*begun again, .* now .*/{aside}\n", capsys.readouterr().err)
        assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
        assert (tmp_path / aside).read_text() == held
    assert (tmp_path / "environment.json.broken").read_text() == ""


def test_a_config_is_durable_before_it_has_its_name_and_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    opened(tmp_path, CONFIG, FREE)
    assert done == ["fsync", "replace", "fsync"] * 2  # bytes, name, folder
    before = (tmp_path / "config.json").stat().st_ino
    opened(tmp_path, CONFIG, FREE)
    assert (tmp_path / "config.json").stat().st_ino == before


@pytest.mark.parametrize("error", [InputError("the cause"), Stopped(85, "SIGTERM"), None])
def test_a_full_disk_hides_no_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)

    def run() -> None:
        with outcome_noted(tmp_path) as note_cause:
            note_cause("another thread's", 87)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error), match="the cause" if isinstance(error, InputError) else None) as raised:
            run()
        assert raised.value is error
    assert capsys.readouterr().err.count("No space left") == 1


def test_numbers_of_a_rank_and_of_a_skipped_step_are_worth_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "ranks").touch()  # where a folder should be, and a folder where a file should be
    (tmp_path / "nonfinite.jsonl").mkdir()
    for step in (1, 2):
        note_rank(tmp_path, 0, step, {"cells_per_s": 1.0})
        nonfinite.note(tmp_path, step, [nonfinite.Culprit(0, "loss nan", "0:1", [[0, 1]])])
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" failed ")[0] for line in told] == [
        f"scldm: writing {tmp_path / 'ranks' / '0.jsonl'}",
        f"scldm: writing {tmp_path / 'nonfinite.jsonl'}",
    ]


def test_a_job_that_was_put_back_into_the_queue_is_not_ended_for_good_by_what_it_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path), pytest.raises(Busy, match=f"process {os.getpid()} on") as refusal, locked(tmp_path):
        pass
    assert refusal.value.exit_code == 87


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_of_the_file_system_a_file_keeps_others_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="another process is training in it"), locked(tmp_path):
        pass
    assert "is on a file system without locks" in capsys.readouterr().err
    assert not (tmp_path / "lock.owner").exists()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "owner, free",
    [
        ({"host": socket.gethostname(), "pid": 2**22 + 1, "job": ""}, True),  # no such process
        ({"host": socket.gethostname(), "pid": 1, "job": ""}, False),
        ({"host": "elsewhere", "pid": 2**22 + 1, "job": ""}, False),
        ({"host": "elsewhere", "pid": 1, "job": "77"}, True),  # this job, before it was requeued
        ({"host": "elsewhere", "pid": 1, "job": "78"}, False),
    ],
)
def test_a_file_of_a_process_that_is_known_to_have_ended_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: dict, free: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / "lock.owner").write_text(json.dumps(owner))
    with nullcontext() if free else pytest.raises(InputError, match="another process"), locked(tmp_path):
        pass


@pytest.mark.heavy
def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path) -> None:
    # as after a kill -9 of torchrun, whose ranks train on for a while
    opened(tmp_path, CONFIG, FREE)
    hold = "import sys, pathlib; from scldm.train.run_folder import locked\n"
    hold += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="another process is training in it"):
        opened(tmp_path, {**CONFIG, "run_dir": "b"}, FREE)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    other.kill()
    other.communicate()
    with locked(tmp_path):
        pass
