"""A password in `tracking.uri` reaches the server, and no file: not of the run, the job, the model, nor of MLflow."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.config import compose, public, public_words
from launch.train_vae import CONFIG
from scldm.environment import describe, without_passwords
from scldm.errors import InputError
from scldm.train.mlflow_run import with_password
from scldm.train.tracking import Tracker, TrackingConfig
from tests.launch.fake_slurm import train
from tests.launch.small_verbs import VAE, write_cells

WORD = "geheim"
SERVER = f"https://ann:{WORD}@mlflow.lab:5000/x"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # and as it was afterwards


def holding(folder: Path) -> list[str]:
    """Files below a folder that hold the password."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path.relative_to(folder)) for path in files if WORD.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "text, without",
    [
        (SERVER, "https://mlflow.lab:5000/x"),
        (f"postgresql+psycopg://ann:{WORD}@db/x", "postgresql+psycopg://db/x"),
        (f"postgresql://db/x?user=ann&password={WORD}", "postgresql://db/x?user=ann&password=..."),
        (f"https://blob/x?sv=1&sig={WORD}&se=2", "https://blob/x?sv=1&sig=...&se=2"),
        (f"scldm train 'tracking.uri={SERVER}' a=b@c", "scldm train 'tracking.uri=https://mlflow.lab:5000/x' a=b@c"),
        ("https://mlflow.lab:5000/a:b@c", "https://c"),
        ("s3://bucket/a?b=c", "s3://bucket/a?b=c"),
        ("donor:1@2", "donor:1@2"),
        (f"http://ann:p@ss{WORD}@host", "http://host"),
        (f"http://ann:'{WORD}\"@host?a=b@c", "http://c"),
        (f"https://{WORD}@host/x", "https://host/x"),
        (f"s3://AKIA:{WORD}@bucket/x", "s3://bucket/x"),
        ("abfs://container@account.net/x", "abfs://container@account.net/x"),
        (f"abfs://a:{WORD}@account.net/x", "abfs://account.net/x"),
        *((f"{kind}://name@place/x", f"{kind}://name@place/x") for kind in ("az", "oci", "webhdfs", "ftp", "sftp")),
        (f"git+https://{WORD}@host/x", "git+https://host/x"),
        ("https://host/set?partition_key=3&monkey=1", "https://host/set?partition_key=3&monkey=1"),
        *(
            (f"https://host/x?{name}={WORD}&a=b", f"https://host/x?{name}=...&a=b")
            for name in (
                *("api_key", "apikey", "key", "access_key", "AWSAccessKeyId", "account_key", "pwd", "PWD", "token"),
                *("access_token", "client_secret", "X-Amz-Credential", "X-Amz-Signature", "X-Amz-Security-Token"),
            )
        ),
        (f"https://host/x#token={WORD}", "https://host/x#token=..."),
        (f"mssql://db?Database=x;Pwd={WORD}", "mssql://db?Database=x;Pwd=..."),
        (f"mssql+pyodbc:///?odbc_connect=UID%3Da%3BPWD%3D{WORD}", "mssql+pyodbc:///?odbc_connect=..."),
        *((f"http://ann:x{bare}{WORD}@host/y z@b", "http://host/y z@b") for bare in "/?#"),
        *(
            (f"{kind}://{who}:{before}{WORD}{after}@host:80/y z@b", f"{kind}://host:80/y z@b")
            for kind in ("http", "HTTPS", "postgresql+psycopg", "s3")
            for who in ("ann", "ann@lab.org", "")
            for before, after in (("p@", ""), ("p@ss/", ""), ("p/ss@", "?"), ("12/", "#@"), ("12?", ""), ("@", ":/?#@"))
        ),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        (f"no answer of 'https://host/x?token={WORD}' yet", "no answer of 'https://host/x?token=...' yet"),
    ],
)
def test_what_is_taken_out(text: str, without: str) -> None:
    assert without_passwords(text) == without


def test_the_config_has_none_and_the_tracker_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"tracking: {{uri: '{SERVER}'}}\n")
    for words in ([f"tracking.uri={SERVER}"], ["--tracking.uri", SERVER], [str(preset)]):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        config = compose(CONFIG, [*words, "data.shards=a", "run_dir=b"])
        assert WORD not in repr(config)
        assert os.environ["MLFLOW_TRACKING_URI"] == SERVER
        assert config.tracking.uri == "https://mlflow.lab:5000/x"
        assert with_password(config.tracking.uri) == SERVER
    monkeypatch.setattr(sys, "argv", ["scldm", "train", "vae", f"tracking.uri={SERVER}"])
    assert describe()["command"] == "scldm train vae tracking.uri=https://mlflow.lab:5000/x"


@pytest.mark.parametrize("word", [f"12/a,b{WORD}", f'12?"{WORD}', f"12#'{WORD}", WORD * 800])
@pytest.mark.parametrize("key", ["data.shards", "tracking.uri"])
@pytest.mark.parametrize(
    "before", ["s3://ann", "s3://ann@corp", "s3://a[b", "s3://[ab]", "simplecache::s3://ann", " s3://ann"]
)
def test_no_password_that_was_not_found_is_kept(key: str, word: str, before: str) -> None:
    with pytest.raises(InputError, match=f"{key}: ") as refusal:
        public(key, f"{before}:{word}@host/set")
    assert WORD not in str(refusal.value)


@pytest.mark.parametrize("bare", ["x/", "x?", "x#", "5000/", "a@b/", "x "])
def test_a_password_that_can_not_be_told_from_the_rest_is_refused(
    bare: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://ann:{bare}{WORD}@host"
    said = "an `@` stands after a `/`, .* space as %20"
    assert main(["train", "vae", "data.shards=x", f"run_dir={tmp_path}/run", f"tracking.uri={uri}"]) == 2
    assert main(["submit", *train(tmp_path), "--tracking.uri", uri]) == 2
    told = capsys.readouterr().err
    assert len(re.findall(f"tracking.uri: {said}", told)) == 2
    assert WORD not in told
    with pytest.raises(InputError, match=f"tracking.uri: {said}"):
        TrackingConfig(uri=uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=f"MLFLOW_TRACKING_URI: {said}"):
        Tracker(tmp_path / "run", TrackingConfig())
    assert holding(tmp_path) == []
    for fine in (
        f"http://ann:x%2F{WORD}%40@host/a",
        "sqlite:////data/ann@lab/mlflow.db",
        "http://host:5000/a",
        "mlruns@1",
    ):
        TrackingConfig(uri=fine)


def test_a_password_with_no_place_outside_the_config_is_refused(capsys: pytest.CaptureFixture) -> None:
    words = ["train", "vae", f"data.shards=https://ann:{WORD}@host/set", "run_dir=b"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "data.shards=https://host/set: a password in it would be kept in files" in said
    assert WORD not in said
    with pytest.raises(InputError, match="data.shards"):
        public_words(words)
    for bare in ("@", "@/", "/", "12/", "?", "#", " ", "12 ", "\t@"):  # and no part of it is told
        assert main(["train", "vae", f"data.shards=https://ann:a{bare}{WORD}@host/set", "run_dir=b"]) == 2
        assert main(["train", "vae", f"data.shards=s3://ann:{bare}{WORD}@host/set", "run_dir=b"]) == 2
        said = capsys.readouterr().err
        assert said.count("data.shards") == 2
        assert WORD not in said
    assert main(["train", "vae", f"tracking.url={SERVER}"]) == 2  # a mistake is told without it
    assert WORD not in capsys.readouterr().err


def test_a_job_gets_it_from_the_environment_it_was_submitted_in(fake: Path, tmp_path: Path, capsys) -> None:
    for words in ([f"tracking.uri={SERVER}"], ["--tracking.uri", SERVER]):
        assert main(["submit", *train(tmp_path), *words]) == 0
        assert holding(tmp_path) == []
        assert "https://mlflow.lab:5000/x" in next(tmp_path.rglob("job.sbatch")).read_text()
        assert os.environ.pop("MLFLOW_TRACKING_URI") == SERVER
    assert WORD not in "".join(capsys.readouterr())


def test_a_word_with_a_line_break_is_no_line_of_a_job(fake: Path, tmp_path: Path, capsys) -> None:
    for word in ("init_from=a\ntouch owned", "init_from=a\rb", "init_from=a\x00b"):
        assert main(["submit", *train(tmp_path), word]) == 2
        assert "can't hold line breaks" in capsys.readouterr().err
    assert main(["submit", *train(tmp_path), "--", "--comment=a\n#SBATCH -p x"]) == 2
    assert not (tmp_path / "my runs").exists()


@pytest.mark.slow
def test_no_file_of_a_run_and_nothing_in_mlflow_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The store is SQLite by a URI, whose query may say anything; from cells to an exported model, and on a resume."""
    database = tmp_path / "store" / "mlflow.db"
    database.parent.mkdir()
    uri = f"sqlite:///file:{database}?uri=true&password={WORD}"
    write_cells(tmp_path / "cells.h5ad")
    words = ["shards", "write", f"source.paths={tmp_path}/cells.h5ad", f"out={tmp_path}/shards", "split.validation=0.2"]
    assert main([*words, "block_cells=32", "shard_cells=128"]) == 0
    small = [*VAE, "tracking.enabled=true", "train.validate_every=2", "tracking.close_s=120"]
    for steps in (2, 4):
        words = ["train", "vae", f"data.shards={tmp_path}/shards", f"run_dir={tmp_path}/run", *small]
        words += [f"train.steps={steps}", f"tracking.uri={uri}"]
        monkeypatch.setattr(sys, "argv", ["scldm", *words])
        monkeypatch.setattr("launch.training.FREE_ON_RESUME", ("train",))
        assert main(words) == 0
    assert main(["export", f"vae={tmp_path}/run", f"out={tmp_path}/model"]) == 0
    with sqlite3.connect(database) as store:
        rows = dict(store.execute("select key, value from params"))
        metrics = {key for (key,) in store.execute("select distinct key from metrics")}
    assert rows["tracking.uri"] == without_passwords(uri)
    assert "train/loss" in metrics
    assert holding(tmp_path) == []
    assert WORD not in "".join(capfd.readouterr())
