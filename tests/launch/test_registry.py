"""A model in MLflow's registry: loaded by mlflow alone, from its own code, it makes the cells that `scldm` makes."""

from __future__ import annotations

import os
import reprlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import scldm
from launch import registry
from launch.cli import main
from launch.registry import register, requirements
from scldm.errors import Busy, InputError
from scldm.model_folder import save_pretrained
from scldm.served import _load_pyfunc
from scldm.train.mlflow_run import MLFLOW_ENVIRONMENT
from scldm.train.tracking import Tracker, TrackingConfig, begin_note
from tests.launch.test_track_replay import client_of
from tests.scldm.small_model import CONDITIONS, GENES, library_sizes, networks
from tests.scldm.train.test_tracking import free_port

pytestmark = pytest.mark.heavy

LOAD = """
import sys
import mlflow, numpy as np, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
table = pd.read_csv(sys.argv[3], dtype={"type": str, "donor": str})
made = model.predict(table, params={"seed": 3})
assert made.equals(model.predict(table, params={"seed": np.int64(3)}))
made.to_csv(sys.argv[4], index=False)
model.predict(table.drop(columns="library_size"))
import scldm
assert "/artifacts/model-" in scldm.__file__, scldm.__file__
unwanted = {"deepspeed", "tiledbsoma", "launch", "data_pipeline"} & {name.split(".")[0] for name in sys.modules}
assert not unwanted, unwanted
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    save_pretrained(folder, *networks(), GENES, CONDITIONS, library_sizes(), {"from": "a test"})
    return folder


def test_a_registered_model_gives_cells_to_who_has_mlflow_alone(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "ldm"
    Tracker(run, TrackingConfig(), stage="train ldm").close()
    assert register(folder, run, "small", "champion") == "models:/small/1"
    vae, dit = networks()
    torch.nn.init.zeros_(next(dit.parameters()))
    save_pretrained(tmp_path / "other", vae, dit, GENES, CONDITIONS, library_sizes(), {"from": "a test"})
    assert register(tmp_path / "other", run, "small") == "models:/small/2", "and the first stays what it was"
    store = client_of(run)
    assert str(store.get_model_version_by_alias("small", "champion").version) == "1"
    store.set_registered_model_alias("small", "champion", "2")
    register(folder, run, "small", "champion")
    assert str(store.get_model_version_by_alias("small", "champion").version) == "3"
    first: dict[str, Any] = {name: [CONDITIONS.labels[name][0]] * 3 for name in CONDITIONS.names}
    table = pd.DataFrame({**first, "library_size": [9000.0] * 3})
    table.to_csv(tmp_path / "wanted.csv", index=False)
    words = [f"sqlite:///{run}/mlflow.db", "models:/small/1", tmp_path / "wanted.csv", tmp_path / "made.csv"]
    command = [sys.executable, "-P", "-c", LOAD, *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    made, expected = pd.read_csv(tmp_path / "made.csv"), scldm.load(folder).generate(table, seed=3)
    assert list(made.columns) == list(expected.var_names)
    assert (made.to_numpy() == expected.X.toarray()).all()  # type: ignore[union-attr]


def test_only_a_table_and_a_seed_are_taken(folder: Path) -> None:
    model, table = _load_pyfunc(str(folder)), pd.DataFrame({"type": ["T cell"]})
    wrong: Any
    for wrong in (None, [table], {"type": ["T cell"]}, np.zeros((1, 1)), "T cell"):
        with pytest.raises(InputError, match=r"^conditions of type \w+ must be a DataFrame"):
            model.predict(wrong)
    for wrong in ("x", "3", None, [1], float("nan"), 2.7, True, -1):
        with pytest.raises(InputError, match="^seed=.* must be a whole number"):
            model.predict(table, {"seed": wrong})
    wrong = 3
    with pytest.raises(InputError, match="^params=3 must map names to values"):
        model.predict(table, wrong)
    assert model.predict(table, {"seed": np.int64(3)}).equals(model.predict(table, {"seed": 3}))


def test_what_can_not_be_registered_is_said_before_anything_is_written(tmp_path: Path, capsys) -> None:
    (tmp_path / "ldm").mkdir()
    for run in (tmp_path, tmp_path / "ldm"):
        (run / "config.json").write_text("{}")
    words = ["export", f"vae={tmp_path}", f"out={tmp_path}/model", "register=small"]
    assert main(words) == 2
    assert "register=small needs ldm" in capsys.readouterr().err
    for alias in ("latest", "LATEST", "v1", "V1", "a b", "a\n", "x" * 256):
        assert main([*words, f"ldm={tmp_path}/ldm", f"alias={alias}"]) == 2
        assert f"alias={reprlib.repr(alias)}: give letters" in capsys.readouterr().err
    for name in ("a/b", "a:b", "a\nb", " ", ".", "..a", "\udcff", "x" * 257):
        assert main([*words[:-1], f"ldm={tmp_path}/ldm", f"register={name}"]) == 2
        assert f"register={reprlib.repr(name)}: give a name" in capsys.readouterr().err
    assert main(["export", f"vae={tmp_path}", "out=x", "alias=champion"]) == 2
    assert "alias=champion needs register=NAME" in capsys.readouterr().err
    assert main([*words, f"ldm={tmp_path}/ldm"]) == 2
    assert f"register: {tmp_path}/ldm was trained without MLflow" in capsys.readouterr().err


def test_a_server_that_is_away_is_told_and_the_model_is_there(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    begin_note(tmp_path / "ldm", TrackingConfig(uri=f"http://127.0.0.1:{free_port()}"), "train ldm", {})
    with pytest.raises(Busy, match=r"register=small: .* is written, MLflow at http.* refused.* again$"):
        register(folder, tmp_path / "ldm", "small")


def test_what_a_server_refuses_is_no_matter_of_another_try(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """And a model has longer than a row, also where rows were sent by this process before."""
    seen = []

    def refuse(*_: object) -> str:
        seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        raise RuntimeError("API request to endpoint x failed with error code 403 != 200.")

    monkeypatch.setattr(registry, "_registered", refuse)
    begin_note(tmp_path / "ldm", TrackingConfig(uri="http://127.0.0.1:9"), "train ldm", {})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", MLFLOW_ENVIRONMENT["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    with pytest.raises(InputError, match=r"HTTP 403, this user may not do that.* Mend that$") as error:
        register(folder, tmp_path / "ldm", "small")
    assert not isinstance(error.value, Busy)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with pytest.raises(InputError, match=r"[^.]\. Mend that$"):
        register(folder, tmp_path / "ldm", "small")
    assert seen == ["120", "7"]


def test_what_it_requires_can_be_installed_anywhere() -> None:
    wanted = requirements()
    assert any(line.startswith("torch==") for line in wanted)
    assert not any("+" in line or "deepspeed" in line for line in wanted)
