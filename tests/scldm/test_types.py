"""The library's types, as a user's strict type checker reads them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import scldm

USE = """
import scldm
from anndata import AnnData


def work(adata: AnnData) -> None:
    model = scldm.fit(adata, ["cell_type"], vae={"train.steps": 600}, ldm="ldm/tiny")
    cells = model.generate({"cell_type": "T"}, n=5, sampler=scldm.SamplerConfig(n_steps=20))
    print(model.embed(adata, pool="mean").shape, model.history["vae"], scldm.__version__)
    found = model.evaluate(cells, adata)
    print(found.tables["pooled"], found.verdict, found.figures, found.save("report"))
    print(model.log_fold_changes("cell_type", "T", "B", by=["donor"]).shape)
    model.save("model")
    again: scldm.Pretrained = scldm.load("model", precision="bfloat16")
    print(again.transform(adata, to={"cell_type": "T"}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("basedpyright"), reason="needs basedpyright, of the extra dev")
def test_strict_users_can_use_the_types(tmp_path: Path) -> None:
    root = str(Path(scldm.__file__).parent.parent)
    strict = {
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        "extraPaths": [root],
        "reportMissingTypeStubs": False,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(strict))
    (tmp_path / "right.py").write_text(USE)
    (tmp_path / "wrong.py").write_text(USE.replace('pool="mean"', 'pool="avg"'))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [(Path(of["file"]).name, "pool" in of["message"]) for of in found] == [("wrong.py", True)], found
