"""Shards and atlases in an S3: the right result if it fails for a while, one line if it fails for ever."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import pytest
import s3fs
import torch

from data_pipeline.format import read_shards
from launch.cli import main
from scldm.errors import LOST, REFUSED
from tests.data_pipeline.atlases import digest
from tests.launch.object_store import BUCKET, ObjectStore, credentials
from tests.launch.small_verbs import VAE, write_cells
from tests.scldm.train.small_runs import stored

pytestmark = pytest.mark.slow
FEW = ["train.steps=4", "train.validate_every=2"]
WRITE = ["conditions=type", "block_cells=8", "shard_cells=64", "split.validation=0.2", "split.test=0.2"]
SET, SOMA = f"s3://{BUCKET}/set", f"s3://{BUCKET}/soma"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(store).items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own tries: two, so that ours are met
        patch.setattr(s3fs.S3FileSystem, "retries", 2)
        patch.setattr(read_shards, "BACK_OFF_S", 0.01)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield store
        s3fs.S3FileSystem.clear_instance_cache()
    store.close()


@pytest.fixture
def calm(store: ObjectStore) -> Iterator[ObjectStore]:
    """The store, without faults before and after."""
    store.meet("")
    yield store
    store.meet("")


def scldm(*words: str) -> None:
    assert main(list(words)) == 0, words


@pytest.fixture(scope="module")
def made(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells as h5ad and SOMA, and what the verbs make of them on a local disk; the same set and SOMA in the store."""
    at = tmp_path_factory.mktemp("made")
    write_cells(at / "cells.h5ad")
    scldm("shards", "write", f"source.paths={at}/cells.h5ad", f"out={at}/set", *WRITE)
    scldm("train", "vae", f"data.shards={at}/set", f"run_dir={at}/vae", *VAE, *FEW)
    scldm("encode", f"vae={at}/vae", f"shards={at}/set", f"out={at}/latents")
    generated = ad.read_h5ad(at / "cells.h5ad")[:40]
    generated.write_h5ad(at / "generated.h5ad")
    scldm("soma", "write", f"h5ad={at}/cells.h5ad", f"out={at}/soma")
    fs = s3fs.S3FileSystem()
    fs.put(f"{at}/soma", f"{BUCKET}/soma", recursive=True)
    fs.put(f"{at}/set", f"{BUCKET}/set", recursive=True)
    return at


@pytest.mark.parametrize("kind", ("busy", "slow", "cut"))
def test_a_set_is_written_and_verified_whatever_a_store_does_for_a_while(
    kind: str, calm: ObjectStore, made: Path, tmp_path: Path
) -> None:
    out = f"s3://{BUCKET}/written-{kind}"
    # a HEAD has no body that says SlowDown: the client does not try it again without AWS_MAX_ATTEMPTS
    calm.meet(kind, every=3, times=4, method="GET" if kind == "cut" else "PUT")
    scldm("shards", "write", f"source.paths={made}/cells.h5ad", f"out={out}", f"work={tmp_path}/work", *WRITE)
    assert calm.faults
    calm.meet(kind, every=3, times=8)
    scldm("shards", "info", f"path={out}")
    scldm("shards", "verify", f"path={out}")
    assert len(calm.faults) == 8
    calm.meet("")
    s3fs.S3FileSystem().get(out, f"{tmp_path}/set", recursive=True)
    assert digest(tmp_path / "set") == digest(made / "set")


@pytest.mark.parametrize("kind", ("busy", "slow", "cut", "damaged"))
def test_cells_of_a_store_are_trained_on_encoded_and_judged_as_those_of_a_disk(
    kind: str, calm: ObjectStore, made: Path, tmp_path: Path
) -> None:
    cache = f"cache_folder={tmp_path}/cache"
    calm.meet(kind, every=2, times=6, path="/set/")
    scldm("train", "vae", f"data.shards={SET}", f"data.{cache}", f"run_dir={tmp_path}/vae", *VAE, *FEW)
    assert len(calm.faults) == 6
    (_, tensors), (_, expected) = stored(tmp_path / "vae"), stored(made / "vae")
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    calm.meet(kind, every=2, times=6, path="/set/")
    scldm("encode", f"vae={made}/vae", f"shards={SET}", f"out={tmp_path}/latents", f"cache_folder={tmp_path}/another")
    assert len(calm.faults) == 6
    found, expected = digest(tmp_path / "latents"), digest(made / "latents")
    assert found.keys() == expected.keys()
    differing = {name for name in found if found[name] != expected[name]}
    assert differing == {"encoded_from.json"}, "which names the autoencoder from where it lies"


def test_an_autoencoder_is_judged_by_cells_of_a_store(calm: ObjectStore, made: Path, tmp_path: Path) -> None:
    for shards, name in ((f"{made}/set", "disk"), (SET, "store")):
        calm.meet("busy", every=2, times=6)
        cache = f"cache_folder={tmp_path}/cache"
        scldm("evaluate", f"vae={made}/vae", f"shards={shards}", cache, f"out={tmp_path}/{name}")
    assert calm.faults
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("disk", "store"))
    different = {key: (a[key], b[key]) for key in a if a[key] != b[key]}
    assert set(different) <= {"shards", "made_with"}, different


@pytest.mark.parametrize("kind", ("busy", "slow", "cut"))
def test_a_census_in_a_store_is_read_with_ones_own_credentials(
    kind: str, calm: ObjectStore, made: Path, tmp_path: Path
) -> None:
    """A private copy: cellxgene_census itself would ask anonymously."""
    words = ["shards", "write", *WRITE]
    scldm(*words, f"source.paths={made}/soma", f"out={tmp_path}/local")
    calm.meet(kind, every=7, times=6)
    scldm(*words, f"source.paths={SOMA}", f"out={tmp_path}/set")
    assert len(calm.faults) == 6
    assert digest(tmp_path / "set").keys() == digest(tmp_path / "local").keys()
    assert {k: v for k, v in digest(tmp_path / "set").items() if k != "manifest.json"} == {
        k: v
        for k, v in digest(tmp_path / "local").items()
        if k != "manifest.json"  # which names the source
    }


def verbs(made: Path, at: Path, name: str) -> dict[str, list[str]]:
    cache = f"cache_folder={at}/cache"
    return {
        "write": ["shards", "write", f"source.paths={made}/cells.h5ad", f"out=s3://{BUCKET}/{name}", f"work={at}/work",
                  *WRITE],
        "info": ["shards", "info", f"path={SET}", f"html={at}/page.html"],
        "verify": ["shards", "verify", f"path={SET}"],
        "train": ["train", "vae", f"data.shards={SET}", f"data.{cache}", f"run_dir={at}/run", *VAE, *FEW],
        "encode": ["encode", f"vae={made}/vae", f"shards={SET}", f"out={at}/latents", cache],
        "evaluate": ["evaluate", f"generated={made}/generated.h5ad", f"shards={SET}", f"out={at}/evaluation", cache],
        "plan": ["plan", "vae", f"data.shards={SET}", *VAE, "hardware.gpus_per_node=1", "hardware.engine=deepspeed"],
        "soma": ["shards", "write", f"source.paths={SOMA}", f"out={at}/set", *WRITE],
    }  # fmt: skip


def one_line(words: list[str], capsys: pytest.CaptureFixture, code: int) -> str:
    capsys.readouterr()
    assert main(words) == code, words
    errors = capsys.readouterr().err.splitlines()
    (line,) = [line for line in errors if "error:" in line]
    assert line == errors[-1]
    assert f"s3://{BUCKET}/" in line
    assert len(line) < 400
    return line


@pytest.mark.parametrize("verb", verbs(Path(), Path(), ""))
def test_wrong_credentials_are_one_line_at_once(
    verb: str, calm: ObjectStore, made: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    monkeypatch.setattr(read_shards, "BACK_OFF_S", 30.0)  # a second try would be noticed
    s3fs.S3FileSystem.clear_instance_cache()
    line = one_line(verbs(made, tmp_path, "denied")[verb], capsys, REFUSED)
    assert ("InvalidAccessKeyId" if verb == "soma" else "refuses access (PermissionError: ") in line
    s3fs.S3FileSystem.clear_instance_cache()


FOR_EVER = [
    (verb, kind, code)
    for verb in verbs(Path(), Path(), "")
    for kind, code in (("busy", LOST), ("cut", LOST), ("forbidden", REFUSED))
    # of an answer to a PUT nothing is read that could be cut; TileDB's client tries 100 times where it is to slow down
    if (verb, kind) not in (("write", "cut"), ("soma", "busy"))
]


@pytest.mark.parametrize("verb, kind, code", FOR_EVER)
def test_a_store_that_fails_for_ever_is_one_line_and_the_exit_code_says_whether_to_start_again(
    verb: str, kind: str, code: int, calm: ObjectStore, made: Path, tmp_path: Path, capsys
) -> None:
    """Whatever part of a set it is: each verb meets it at the first object that it reads or writes there."""
    calm.meet(kind, method="PUT" if verb == "write" else "GET", path="/__fragments/" if verb == "soma" else "")
    # TileDB does not say why an array can't be opened
    one_line(verbs(made, tmp_path, f"failed-{kind}")[verb], capsys, REFUSED if verb == "soma" else code)
    assert calm.faults
    # and in the middle of things
    calm.meet(kind, method="GET", path="/shards/train-000001.tar")
    if verb in ("verify", "train", "encode", "evaluate"):
        assert "train-000001.tar" in one_line(verbs(made, tmp_path, "")[verb], capsys, code)
        assert calm.faults


@pytest.mark.parametrize("kind", ("busy", "forbidden"))
def test_a_write_that_failed_goes_on(kind: str, calm: ObjectStore, made: Path, tmp_path: Path, capsys) -> None:
    words = verbs(made, tmp_path, f"again-{kind}")["write"]
    calm.meet(kind, method="PUT", path="/shards/train-000001.tar")
    one_line(words, capsys, LOST if kind == "busy" else REFUSED)
    calm.meet("")
    scldm(*words)
    s3fs.S3FileSystem().get(f"{BUCKET}/again-{kind}", f"{tmp_path}/set", recursive=True)
    assert digest(tmp_path / "set") == digest(made / "set")


def test_a_mistyped_bucket_is_not_made(calm: ObjectStore, made: Path, tmp_path: Path, capsys) -> None:
    words = ["shards", "write", f"source.paths={made}/cells.h5ad", f"work={tmp_path}/work", *WRITE]
    assert main([*words, "out=s3://atlantis/set"]) == REFUSED
    assert "s3://atlantis/set: there is no bucket 'atlantis'" in capsys.readouterr().err
    assert s3fs.S3FileSystem().ls("") == [BUCKET]
    assert not list(tmp_path.iterdir())  # nothing was read for it


def test_an_h5ad_in_a_store_is_to_be_copied(calm: ObjectStore, tmp_path: Path, capsys) -> None:
    words = ["shards", "write", f"source.paths=s3://{BUCKET}/cells.h5ad", f"out={tmp_path}/set"]
    assert "read from a local disk. Copy it" in one_line(words, capsys, REFUSED)
