"""A run folder belongs to one config: another is refused with the dotted keys that differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scldm.errors import InputError
from scldm.train.run_folder import locked, open_run_folder, read_config

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


def test_what_is_free_may_change_and_is_noted(tmp_path: Path) -> None:
    opened(tmp_path, CONFIG, FREE)
    opened(tmp_path, {**changed(train={"keep": 9}), "run_dir": "b", "hardware": {"threads": 4}}, FREE)
    assert read_config(tmp_path)["train"]["keep"] == 9


@pytest.mark.parametrize(
    "config, said",
    [
        (changed(optim={"lr": 2e-3}), "optim.lr was 0.001, now 0.002; choose another run_dir"),
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
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="not a run folder: it has no config.json"):
        read_config(tmp_path)


def test_a_start_that_died_before_its_first_file_was_whole_can_start_again(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_text('{"run')
    opened(tmp_path, CONFIG, FREE)
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"run')
    for use in (lambda: read_config(tmp_path), lambda: opened(tmp_path, CONFIG, FREE)):
        with pytest.raises(InputError, match=r"config.json is damaged"):
            use()


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
