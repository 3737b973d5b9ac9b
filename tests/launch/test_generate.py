"""Cells from the command line: the same for any number of ranks and interruptions; refused before they are begun."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scldm
from data_pipeline import write_cells
from launch import generate as verb
from launch.cli import main
from launch.config import compose
from launch.evaluation.cells import cells_of_shards, labels_of_split
from launch.generate import GenerateConfig, wanted_cells
from launch.train_ldm import described
from scldm import networks as networks_module
from scldm.errors import InputError
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.model_folder import save_pretrained
from scldm.pretrained import Pretrained
from scldm.vocab import ConditionVocab, GeneVocab
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.scldm.small_model import CONDITIONS, GENES, library_sizes, networks

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parent.parent.parent
FEW = "sampler.n_steps=2"
# Of means made with sums in another order. A step of the flow changes them by 1e-1, and a fault in one by as much; each
# of some 40 layers rounds sums of 64 numbers, to 40 x 64 / 2^24 = 1.5e-4 at worst, and a decoder's exponential passes
# on what its argument of size 1 to 10 is off
NEAR = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "model"
    vae, dit = networks()
    save_pretrained(path, vae, dit, GENES, CONDITIONS, library_sizes(), {})
    return path


@pytest.fixture
def several_threads() -> Iterator[None]:
    """For a test that changes their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generate(*words: str) -> Any:
    """The file, read."""
    assert main(["generate", *words]) == 0
    return ad.read_h5ad(next(word for word in words if word.startswith("out=")).removeprefix("out="))


def test_the_file_is_what_the_model_generates(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(write_cells, "PART_CELLS", 64)
    (tmp_path / "wanted.csv").write_text("type,n_cells\nT cell,100\nB cell,41\n")
    words = [f"model={model}", f"conditions={tmp_path}/wanted.csv", "seed=4", FEW]
    made = generate(*words, f"out={tmp_path}/all.h5ad")
    table = pd.DataFrame({"type": ["T cell"] * 100 + ["B cell"] * 41})
    expected: Any = scldm.load(model).generate(table, seed=4, sampler=SamplerConfig(n_steps=2))
    assert (made.X != expected.X).nnz == 0
    pd.testing.assert_frame_equal(made.obs, expected.obs)
    assert list(made.var_names) == list(GENES.ids)
    uns = made.uns["scldm"]
    assert (uns["model"], uns["seed"]) == (scldm.load(model).hash, 4)
    assert json.loads(uns["sampler"])["n_steps"] == 2
    assert expected.uns["scldm"].items() <= uns.items()
    assert uns["n_evaluations"] == expected.uns["scldm"]["n_evaluations"] == 141 * 4
    assert "141 cells x 30 genes, 564 network evaluations (4 a cell)" in capsys.readouterr().out
    # chosen genes in another order are the same draws; means are what they are drawn from
    some = [GENES.ids[k] for k in (9, 3, 20)]
    few = generate(*words, f"out={tmp_path}/few.h5ad", f"genes={','.join(some)}")
    assert (few.X != made[:, some].X).nnz == 0
    means = generate(*words, f"out={tmp_path}/means.h5ad", "kind=means", f"genes={','.join(some)}")
    assert (means.X.dtype, means.X.format, list(means.var_names)) == (np.float32, "csr", some)
    assert np.corrcoef(means.X.toarray().ravel(), few.X.toarray().ravel())[0, 1] > 0.5


def test_as_many_cells_as_a_file_has_of_each_combination(model: Path, tmp_path: Path) -> None:
    obs = pd.DataFrame(
        {"type": pd.Categorical(["T cell"] * 5), "donor": ["d1"] * 5, "other": range(5)},
        index=pd.Index([f"c{k}" for k in range(5)]),
    )
    ad.AnnData(np.ones((5, 2), np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    words = [f"model={model}", f"like={tmp_path}/cells.h5ad", f"out={tmp_path}/made.h5ad", FEW]
    made = generate(*words, "by=type,donor")
    assert [tuple(row) for row in made.obs[["type", "donor"]].itertuples(index=False)] == [("T cell", "d1")] * 5


def test_as_many_cells_as_a_split_has_of_each_combination(tmp_path: Path) -> None:
    write_set(tmp_path / "shards", known_cells(n_train=64, n_validation=32, n_genes=700))
    url = f"{tmp_path}/shards"
    for names in (["type"], ["donor", "type"]):
        (read,) = cells_of_shards(url, names, splits=["validation"])
        wanted = labels_of_split(url, "validation", names)
        assert {name: list(wanted[name]) for name in wanted} == {name: list(of) for name, of in read.labels.items()}
    assert list(labels_of_split(url, "validation")) == ["type", "donor"]
    for words, said in (
        (["by=dose"], "has no condition='dose'. It has type, donor"),
        ([], "split 'test' is not in the shard set"),
        (["n=3"], "give exactly one of conditions, like, shards and n. Given: shards, n"),
    ):
        with pytest.raises(InputError, match=said):
            verb.wanted_cells(compose(verb.GenerateConfig, ["model=-", f"shards={url}", "out=made.h5ad", *words]))


def test_a_finished_file_is_left_as_it_is_and_others_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "made.h5ad"
    words = ["generate", f"model={model}", "n=3", f"out={out}", FEW]
    assert main(words) == 0
    before = out.stat()
    assert main(words) == 0
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert "made.h5ad is there" in capsys.readouterr().out
    assert main([*words, "seed=1"]) == 2
    assert "holds other cells: seed was 0, now 1. Remove it, or choose another out" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == before.st_mtime_ns


def test_what_is_there_needs_no_space(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished file none; where all parts are there and not joined yet, that of the file alone."""
    monkeypatch.setattr(write_cells, "PART_CELLS", 64)
    words = ["generate", f"model={model}", "n=200", f"out={tmp_path}/made.h5ad", "kind=means", FEW]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(write_cells.CellWriter, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(words)
    free = 200 * (30 * 4 + 100) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))
    assert main(words) == 2
    free += 1
    assert main(words) == 0
    free = 0
    assert main(words) == 0


def test_the_threads_of_a_process_decide_nothing_but_the_key_does(
    tmp_path: Path, capsys: pytest.CaptureFixture, several_threads: None
) -> None:
    """Alone, a process has as many threads as there are cores, under torchrun one."""
    torch.manual_seed(0)
    vae, dit = VAE(VAEConfig(64, 8, 16, 1, 4, 1), 1_500), DiT(DiTConfig(64, 2, 4), 8, 16, {})
    for name, parameter in [*vae.named_parameters(), *dit.named_parameters()]:
        if "log_theta" not in name:
            parameter.data.normal_(std=0.08)
    genes = GeneVocab(tuple(f"g{k}" for k in range(1_500)), "symbol")
    sizes = LibrarySizeModel((), {(): {(): LogNormal(20, 8.0, 0.2)}})
    save_pretrained(tmp_path / "model", vae, dit, genes, ConditionVocab({}), sizes, {})
    words = [f"model={tmp_path}/model", "n=16", "kind=means", FEW]
    made = []
    for k, before in enumerate((1, 2)):
        torch.set_num_threads(before)
        made.append(generate(*words, "batch=16", f"out={tmp_path}/{k}.h5ad").X)
    assert (made[0] != made[1]).nnz == 0
    other = generate(*words, "batch=16", f"out={tmp_path}/two.h5ad", "threads=2")
    # with another number of threads, sums may be taken in another order (on some processors they are not)
    np.testing.assert_allclose(other.X.toarray(), made[0].toarray(), rtol=NEAR)
    # what may change bits is kept, and may not change in between
    kept = json.loads(other.uns["scldm"]["config"])
    assert (kept["threads"], kept["device"].split()[0]) == (2, "cpu")
    for threads, change, told in (
        (1, "batch=16", "config.threads was 2, now 1"),
        (2, "batch=32", "batch was 16, now 32"),
        (2, "precision=bfloat16", "precision was float32, now bfloat16"),
    ):
        assert main(["generate", *words, f"out={tmp_path}/two.h5ad", f"threads={threads}", change]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_another_kind_of_processor_generates_nearly_the_same_cells(model: Path, tmp_path: Path) -> None:
    """It is told apart, and refused to go on with cells of another. Means differ in their last digits; a count, where
    its random number lies between the two probabilities."""
    other = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | other
    words = [f"model={model}", "n=500", "sampler.n_steps=8"]
    for kind in ("means", "counts"):
        out = f"out={tmp_path}/{kind}-there.h5ad"
        subprocess.run(command(1, *words, f"kind={kind}", out), env=environment, check=True, capture_output=True)
        there: Any = ad.read_h5ad(out.removeprefix("out="))
        here = generate(*words, f"kind={kind}", f"out={tmp_path}/{kind}.h5ad")
        devices = [json.loads(made.uns["scldm"]["config"])["device"] for made in (here, there)]
        assert devices[1].endswith(("DEFAULT", "NO AVX"))
        if kind == "means":
            np.testing.assert_allclose(there.X.toarray(), here.X.toarray(), rtol=NEAR)
        else:
            assert (there.X != here.X).nnz < 1e-3 * 500 * 30
        if devices[0] != devices[1]:
            assert main(["generate", *words, f"kind={kind}", out]) == 2


@pytest.mark.parametrize("key", ["batch", "threads"])
def test_no_cells_at_once_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, key: str) -> None:
    assert main(["generate", f"model={model}", "n=2", f"out={tmp_path}/x.h5ad", f"{key}=0"]) == 2
    assert f"{key}=0 must be at least 1" in capsys.readouterr().err


def test_parts_hold_whole_batches(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every part would make a batch of more cells than it has, and keep a part of it."""
    made: list[int] = []
    really = networks_module.generate_latents

    def counting(*words: Any) -> Any:
        made.append(len(words[2]))
        return really(*words)

    monkeypatch.setattr(networks_module, "generate_latents", counting)
    generate(f"model={model}", "n=1500", "batch=1000", f"out={tmp_path}/x.h5ad", "sampler.method=euler", FEW)
    assert made == [1_000, 1_000]


def test_what_can_not_be_made_is_said_before_a_device_is_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(*_: object) -> None:
        raise AssertionError("a device was used")

    really_load, really_to = scldm.load, Pretrained.to

    def load(*words: Any, **more: Any) -> Pretrained:
        """It puts the model on the CPU itself."""
        with monkeypatch.context() as loading:
            loading.setattr(Pretrained, "to", really_to)
            return really_load(*words, **more)

    monkeypatch.setattr(scldm, "load", load)
    monkeypatch.setattr(Pretrained, "to", used)
    monkeypatch.setattr(verb, "world_of_environment", used)
    (tmp_path / "nk.csv").write_text("type\nNK\n")
    (tmp_path / "typo.csv").write_text("type\nT-cell\n")
    (tmp_path / "column.csv").write_text("celltype\nT cell\n")
    (tmp_path / "zero.csv").write_text("type,n_cells\nT cell,0\n")
    out = f"out={tmp_path}/x.h5ad"
    for words, said in (
        ([f"conditions={tmp_path}/typo.csv", out], "condition 'type' has no label 'T-cell'. It has 'T cell'"),
        ([f"conditions={tmp_path}/column.csv", out], "condition 'celltype' is unknown. The model knows type, donor"),
        ([f"conditions={tmp_path}/zero.csv", out], "there are no cells to generate"),
        (["n=0", out], "n=0 must be at least 1"),
        (["n=2", "by=type", out], "by=type names columns of like"),
        (["n=2", out, "device=cuda:99"], "device=cuda:99"),
        (["n=2", f"out={tmp_path}/x.loom"], "must end in .h5ad, .zarr, .soma"),
        (["n=2", out, "kind=medians"], "kind"),
        (["n=2", f"out={tmp_path}/nk.csv/x.h5ad"], "nk.csv"),
    ):
        assert main(["generate", f"model={model}", *words]) == 2, said
        told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(told) == 1
        assert said in told[0], told
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    assert main(["generate", f"model={model}", "n=50", out]) == 2
    assert "1 kB free. Ask for fewer cells" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["column.csv", "nk.csv", "typo.csv", "zero.csv"]
    # what can be made uses one: first the world of ranks, then the model is moved
    monkeypatch.undo()
    monkeypatch.setattr(scldm, "load", load)
    monkeypatch.setattr(Pretrained, "to", used)
    with pytest.raises(AssertionError, match="a device was used"):
        main(["generate", f"model={model}", "n=2", out])


# --- kills and ranks -----------------------------------------------------------------------------------------------


def command(ranks: int, *words: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", "launch.cli", "generate", *words]


@pytest.mark.slow
def test_kills_and_ranks_change_no_bit(model: Path, tmp_path: Path) -> None:
    """kill -9 of two ranks, then of one, then one to the end: what one process generates at once. Alone, a process
    starts with a thread for each core."""
    words = [f"model={model}", "n=2700", "sampler.n_steps=80", "kind=means"]  # 6 parts
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environment["OMP_NUM_THREADS"]
    out = tmp_path / "cells.h5ad"
    parts = tmp_path / "cells.h5ad.parts"
    for ranks, until in ((2, 1), (1, 4)):
        process = subprocess.Popen(
            command(ranks, *words, f"out={out}"),
            env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list(parts.glob("*.npz"))) < until:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        assert until <= len(list(parts.glob("*.npz"))) < 6
    done = subprocess.run(
        command(1, *words, f"out={out}"), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]
    torch.set_num_threads(1)
    at_once: Any = scldm.load(model).generate(
        pd.DataFrame(index=range(2_700)), seed=0, sampler=SamplerConfig(n_steps=80), kind="means"
    )
    made: Any = ad.read_h5ad(out)
    assert (made.X != at_once.X).nnz == 0
    pd.testing.assert_frame_equal(made.obs, at_once.obs)


# --- transform -----------------------------------------------------------------------------------------------------


def test_cells_of_a_file_are_taken_to_another_condition(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    obs = pd.DataFrame({"type": ["T cell", "B cell"] * 2}, index=pd.Index([f"c{k}" for k in range(4)]))
    source = ad.AnnData(np.full((4, 30), 3.0, np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(GENES.ids)))
    source.write_h5ad(tmp_path / "cells.h5ad")
    words = ["transform", f"model={model}", f"h5ad={tmp_path}/cells.h5ad", FEW]
    assert main([*words, "to=type=NK", "alphas=0,1", f"out={tmp_path}/made.h5ad"]) == 0
    made: Any = ad.read_h5ad(tmp_path / "made.h5ad")
    assert list(made.obs_names) == [*(f"c{k}-0" for k in range(4)), *(f"c{k}-1" for k in range(4))]
    assert list(made.obs["type"]) == ["T cell", "B cell"] * 2 + ["NK"] * 4
    for more, said in (
        (["to=NK", f"out={tmp_path}/x.h5ad"], "to=NK must be CONDITION=LABEL"),
        (["to=type=NKT", f"out={tmp_path}/x.h5ad"], "has no label 'NKT'"),
        (["to=type=NK", f"out={tmp_path}/x.zarr"], "must end in .h5ad"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad", "made.h5ad"]


@pytest.mark.parametrize("ending", ["zip", "gz", "xz", "zst", "tar"])
def test_a_table_that_is_not_packed_as_it_says_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"wanted.csv.{ending}"
    path.write_bytes(gzip.compress(b"type,n_cells\nT,3\n" * 99)[:-12] if ending == "gz" else b"type\nT\n")
    with pytest.raises(InputError, match=rf"^conditions={path}: not a readable CSV file: \S"):
        wanted_cells(GenerateConfig(model="m", out=f"{tmp_path}/o.h5ad", conditions=str(path)))
    with pytest.raises(InputError, match=rf"^label_embeddings.type={path}: not a readable CSV file: \S"):
        described(ConditionVocab({"type": ("T",)}), {"type": str(path)})


@pytest.mark.parametrize(
    "number, said", [("1e12", "are needed for 1,000,000,000,000 cells"), ("2.5", "whole numbers"), ("inf", "whole")]
)
def test_a_number_of_cells_may_be_written_as_a_float(tmp_path: Path, number: str, said: str) -> None:
    """As pandas writes a column of floats. What is too much meets the check of the disk."""
    (tmp_path / "wanted.csv").write_text(f"type,n_cells\nT,{number}\n")
    config = GenerateConfig(model="m", out=f"{tmp_path}/o.h5ad", conditions=f"{tmp_path}/wanted.csv")
    with pytest.raises(InputError, match=said):
        wanted_cells(config)
    (tmp_path / "wanted.csv").write_text("type,n_cells\nT,3.0\nB,1e1\n")
    assert len(wanted_cells(config)) == 13
