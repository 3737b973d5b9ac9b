"""A save that ends in the middle, by kill -9 or by a full disk, loses nothing that was saved before."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from scldm.errors import InputError
from scldm.train import steps
from tests.scldm.train.small_runs import small_run, stored

pytestmark = pytest.mark.heavy

STEPS, KILLS = 40, 10


def assert_same_end(run: Path, other: Path) -> None:
    (state, tensors), (expected, others) = stored(run), stored(other)
    assert state == expected
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def save_slowly(run_dir: str, output: str) -> None:
    """A checkpoint every step, each so slow at every point of its way to the disk that most of the time is saving."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rmdir")}

    def slow(name: str):
        def do(*arguments, **more):
            time.sleep(0.008)
            return real[name](*arguments, **more)

        return do

    for name in real:
        setattr(os, name, slow(name))
    torch.set_num_threads(1)
    (Path(run_dir).parent / "begun").touch()
    small_run("vae", Path(run_dir), steps=STEPS, save_every=1)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_of_saving(tmp_path: Path) -> None:
    small_run("vae", tmp_path / "whole", steps=STEPS, save_every=1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    moments, cut_short, run_dir = random.Random(0), 0, tmp_path / "killed" / "run"
    run_dir.mkdir(parents=True)
    for _ in range(KILLS):
        (run_dir.parent / "begun").unlink(missing_ok=True)
        process = context.Process(target=save_slowly, args=(str(run_dir), str(tmp_path / "output.txt")))
        process.start()
        end = time.monotonic() + 60
        # from the moment that something is written in this attempt
        while not ((run_dir.parent / "begun").exists() and list(run_dir.glob("checkpoints/*.partial"))):
            assert time.monotonic() < end
            assert process.exitcode is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        cut_short += bool(list(run_dir.rglob("*.partial")))
        if steps.pointed(run_dir / "checkpoints" / "latest") is not None:
            stored(run_dir)  # whole, to the last byte
    assert cut_short >= KILLS / 5, "the kills were meant to fall into saves"  # most do, and fewer on a busy machine
    small_run("vae", run_dir, steps=STEPS, save_every=1)
    assert_same_end(run_dir, tmp_path / "whole")
    assert not list(run_dir.rglob("*.partial"))
    assert not list(run_dir.rglob("*.broken"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own with 400 kB; remounted larger by the function that it yields."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "scldm-test", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a full disk takes the right to mount a small one: {mounted.stderr.strip()}")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_names_what_could_not_be_written_and_costs_nothing(small_disk, tmp_path: Path) -> None:
    place, enlarge = small_disk
    small_run("vae", tmp_path / "whole", save_every=3, keep=9)
    with pytest.raises(
        InputError, match=r"could not be written \(rank 0: OSError: .*No space left on device\)"
    ) as error:
        small_run("vae", place / "run", save_every=3, keep=9)
    last = steps.pointed(place / "run" / "checkpoints" / "latest")
    assert last is not None
    assert f"The last whole checkpoint is {last.name}" in str(error.value)
    assert not list(place.rglob("*.partial"))  # what was begun is gone: it would fill the disk further
    enlarge()
    small_run("vae", place / "run", save_every=3, keep=9)
    assert_same_end(place / "run", tmp_path / "whole")
