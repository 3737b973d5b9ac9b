"""Verbs that are killed, frozen, starved, doubled or robbed of input: they end as undisturbed ones, or say why not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
import torch

from launch.cli import main
from scldm.errors import LOST, REFUSED
from scldm.model_folder import save_pretrained
from tests.data_pipeline.atlases import digest
from tests.launch.small_verbs import LDM, VAE, write_cells
from tests.scldm.small_model import CONDITIONS, GENES, library_sizes, networks
from tests.scldm.train.small_runs import stored

pytestmark = pytest.mark.slow
FEW, MANY = 3, 40
STEPS = ["train.steps=60", "train.validate_every=20", "train.save_every=4", "train.log_every=10"]
WRITE = ["conditions=type", "block_cells=8", "shard_cells=16", "split.validation=0.2", "split.test=0.2"]
VERBS = ("write", "train", "encode", "generate")
CONVERT = ("safetensors", "dcp")
AFTER = ("export", "evaluate", "report", "embed", *CONVERT)


def exhaustive(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases]


def words_of(verb: str, made: Path, out: Path) -> list[str]:
    return {
        "write": ["shards", "write", f"source.paths={made}/cells.h5ad", f"out={out}", *WRITE],
        "train": ["train", "vae", f"data.shards={made}/set", f"run_dir={out}", *VAE, *STEPS],
        "encode": ["encode", f"vae={made}/vae", f"shards={made}/set", f"out={out}", "batch=4"],
        "generate": ["generate", f"model={made}/model", "n=2700", "sampler.n_steps=20", f"out={out}.h5ad"],
        "export": ["export", f"vae={made}/vae", f"ldm={made}/ldm", f"out={out}"],
        "evaluate": ["evaluate", f"generated={made}/generated.h5ad", f"shards={made}/set", f"out={out}"],
        "embed": ["embed", f"model={made}/trained", f"h5ad={made}/cells.h5ad", f"out={out}.h5ad"],
        "report": ["report", f"{made}/vae", f"out={out}.html"],
        **{to: ["checkpoint", "convert", f"at={made}/vae", f"to={to}", f"out={out}"] for to in CONVERT},
    }[verb]


def result(verb: str, out: Path) -> Any:
    """What a verb made, to be compared."""
    if verb == "generate":
        cells: Any = ad.read_h5ad(f"{out}.h5ad")
        return cells.X.toarray().tolist(), cells.obs.to_dict(), cells.var.to_dict()
    if verb == "embed":
        return ad.read_h5ad(f"{out}.h5ad").obsm["X_scldm"].tolist()
    if verb == "evaluate":
        told = json.loads((out / "evaluation.json").read_text())
        return told["pooled"], sorted(path.name for path in out.iterdir())
    if verb in CONVERT:
        files = [path for path in [*out.rglob("*"), out] if path.is_file()]
        return sorted(path.read_bytes() for path in files if path.name != ".metadata")  # which names its place
    if verb == "report":
        return len(Path(f"{out}.html").read_text()) > 1_000
    if verb == "train":
        state, tensors = stored(out)
        return state["step"], {key: value.tolist() for key, value in tensors.items()}
    apart = {"export": "config.json", "encode": "encoded_from.json"}  # they name other places
    return {name: found for name, found in digest(out).items() if name != apart.get(verb)}


@dataclass
class Started:
    process: Any
    output: Path

    def end(self, timeout: float = 240) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"does not end: {self.output.read_text()}"
        return self.process.exitcode

    @property
    def error(self) -> str:
        """The one line that it was refused with."""
        (line,) = [line for line in self.output.read_text().splitlines() if ": error: " in line]
        assert "Traceback" not in self.output.read_text()
        return line


def in_process(words: list[str], output: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.exit(main(words))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Started]:
    """Starts a command line from a process that has imported everything."""
    folder, context = tmp_path_factory.mktemp("outputs"), multiprocessing.get_context("forkserver")
    # imported once, for all processes
    verbs = [f"launch.{verb}" for verb in ("encode", "evaluate", "generate", "train_vae")]
    context.set_forkserver_preload([__name__, *verbs])

    def begin(words: list[str]) -> Started:
        begin.n += 1
        output = folder / f"{begin.n}.txt"
        process = context.Process(target=in_process, args=(words, str(output)))
        process.start()
        return Started(process, output)

    begin.n = 0
    assert begin(["--version"]).end() == 0  # the imports, which are no part of what is timed below
    return begin


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verbs take."""
    at = tmp_path_factory.mktemp("disturbed")
    write_cells(at / "cells.h5ad")
    assert main(words_of("write", at, at / "set")) == 0
    assert main([*words_of("train", at, at / "vae"), "train.steps=4", "train.validate_every=2"]) == 0
    save_pretrained(at / "model", *networks(), GENES, CONDITIONS, library_sizes(), {})
    return at


@pytest.fixture(scope="module")
def whole(start: Callable, made: Path) -> Callable[[str], tuple[Any, float]]:
    """The result of a verb that nothing disturbs, and the seconds that it took."""
    known: dict[str, tuple[Any, float]] = {}

    def of(verb: str) -> tuple[Any, float]:
        if verb not in known:
            out, began = made / f"whole-{verb}", time.monotonic()
            assert start(words_of(verb, made, out)).end() == 0
            took = time.monotonic() - began
            known[verb] = result(verb, out), took
        return known[verb]

    return of


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def assert_left_clean(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".broken", ".parts")]


@pytest.mark.parametrize(
    "verb, kills",
    [
        *((verb, FEW) for verb in VERBS),
        *exhaustive((verb, MANY) for verb in VERBS),
        *exhaustive((verb, FEW) for verb in AFTER),
    ],
)
@pytest.mark.usefixtures("made_for")
def test_killed_at_random_moments(
    verb: str, kills: int, start: Callable, whole: Callable, made: Path, tmp_path: Path
) -> None:
    expected, took = whole(verb)
    words, moments = words_of(verb, made, tmp_path / "out"), random.Random(kills)
    killed = 0
    for _ in range(kills):
        started = start(words)
        started.process.join(moments.uniform(0, 0.8 * took))
        started.process.kill()
        if started.end() == 0:  # it was faster than the undisturbed one: begin anew
            assert result(verb, tmp_path / "out") == expected
            remove_all(tmp_path)
        else:
            killed += 1
    assert killed
    assert start(words).end() == 0
    assert result(verb, tmp_path / "out") == expected
    assert_left_clean(tmp_path)


def test_what_a_kill_leaves_of_a_file_goes(start: Callable, whole: Callable, made: Path, tmp_path: Path) -> None:
    """In any of the folders that encoding writes to, at whatever file it was."""
    words, out = words_of("encode", made, tmp_path / "out"), tmp_path / "out"
    started = start(words)
    while not list(out.glob("shards/*.tar")) and started.process.exitcode is None:
        time.sleep(0.001)
    started.process.kill()
    assert started.end() != 0
    for folder in (out, out / "parts", out / "shards", out / "index"):
        folder.mkdir(exist_ok=True)
        (folder / ".blocks.npy.0123456789ab.partial").touch()
    assert start(words).end() == 0
    assert_left_clean(tmp_path)
    assert result("encode", out) == whole("encode")[0]


@pytest.mark.parametrize("verb", VERBS)
def test_frozen_for_a_while(verb: str, start: Callable, whole: Callable, made: Path, tmp_path: Path) -> None:
    expected, took = whole(verb)
    started = start(words_of(verb, made, tmp_path / "out"))
    time.sleep(took / 3)
    os.kill(started.process.pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(started.process.pid, signal.SIGCONT)
    assert started.end() == 0
    assert result(verb, tmp_path / "out") == expected


@pytest.mark.parametrize("verb", VERBS)
def test_two_at_once(verb: str, start: Callable, whole: Callable, made: Path, tmp_path: Path) -> None:
    """One of them does the work; the other is told so, or finds it done."""
    expected, _ = whole(verb)
    both = [start(words_of(verb, made, tmp_path / "out")) for _ in range(2)]
    codes = sorted(started.end() for started in both)
    assert codes[0] == 0, [started.output.read_text() for started in both]
    for started in both:
        if started.process.exitcode:
            assert started.process.exitcode in (REFUSED, LOST)
            assert "another process" in started.error
    assert result(verb, tmp_path / "out") == expected
    assert_left_clean(tmp_path)


@contextmanager
def disk(place: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "scldm-test", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a full disk takes the right to mount a small one: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def made_for(verb: str, made: Path) -> None:
    """What the verbs after training take."""
    if verb in VERBS or (made / "ldm").exists():
        return
    for words in (
        ["encode", f"vae={made}/vae", f"shards={made}/set", f"out={made}/latents", "batch=4"],
        ["train", "ldm", f"data.shards={made}/latents", f"run_dir={made}/ldm", *LDM],
        ["export", f"vae={made}/vae", f"ldm={made}/ldm", f"out={made}/trained"],
        ["generate", f"model={made}/trained", f"shards={made}/set", f"out={made}/generated.h5ad", "sampler.n_steps=5"],
    ):
        assert main(words) == 0, words


@pytest.mark.parametrize("verb", [*VERBS, *exhaustive((verb,) for verb in AFTER)])
@pytest.mark.usefixtures("made_for")
def test_a_disk_that_fills_up(verb: str, start: Callable, whole: Callable, made: Path, tmp_path: Path) -> None:
    """Whatever it was at. With room again, the same command goes on."""
    expected, _ = whole(verb)
    with disk(tmp_path / "disk") as place:
        words, full = words_of(verb, made, place / "out"), 0
        for room in (0, 8192, 40_000, 120_000):
            left = shutil.disk_usage(place).free - room
            with open(place / "filler", "wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, max(left, 1))
            started = start(words)
            if started.end():
                full += 1
                assert started.process.exitcode == REFUSED, started.output.read_text()
                assert "no space left" in started.error.lower() or "are needed for" in started.error, started.error
                assert str(place) in started.error
            (place / "filler").unlink()
        assert full
        assert start(words).end() == 0
        assert result(verb, place / "out") == expected
        assert_left_clean(place)


@pytest.mark.parametrize("how", ["deleted", "changed", "cut short"])
@pytest.mark.parametrize("verb", ["write", "train", "encode"])
def test_input_that_goes_in_mid_run(
    verb: str, how: str, start: Callable, whole: Callable, made: Path, tmp_path: Path
) -> None:
    """What was read by then is right; else the file is named. Encoding has read one of 14 shards."""
    expected, _ = whole(verb)
    begun = {"write": "out/.work/plan", "train": "out/outcome.json", "encode": "out/shards/*.tar"}[verb]
    for name in ("set", "vae"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / "cells.h5ad", tmp_path)
    started = start(words_of(verb, tmp_path, tmp_path / "out"))
    while not list(tmp_path.glob(begun)) and started.process.exitcode is None:
        time.sleep(0.001)
    os.kill(started.process.pid, signal.SIGSTOP)
    for path in [tmp_path / "cells.h5ad"] if verb == "write" else sorted((tmp_path / "set/shards").iterdir()):
        if how == "deleted":
            path.unlink()
        elif how == "cut short":
            os.truncate(path, path.stat().st_size // 2)
        else:
            data = bytearray(path.read_bytes())
            for k in range(1024, len(data), 64):
                data[k] ^= 255
            path.write_bytes(data)
    os.kill(started.process.pid, signal.SIGCONT)
    if started.end():
        assert started.process.exitcode == REFUSED, started.output.read_text()
        assert str(tmp_path) in started.error
    else:
        assert verb != "encode"
        assert verb == "write" or result(verb, tmp_path / "out") == expected
