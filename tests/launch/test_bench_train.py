"""The benchmark of the loop: that it runs, that its ways do the same work, and that no GPU's figure is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_says_what_the_loop_adds(tmp_path: Path) -> None:
    saved = tmp_path / "train.json"
    words = ["steps=5", "rounds=1", "cells=4", "n_genes=30", "model.width=16", "model.n_layers=1", f"save={saved}"]
    # a process of its own: DeepSpeed warns when it is imported, and warnings are errors here
    command = [sys.executable, "-m", "launch.cli", "bench", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3_000:]
    rows = {row["name"]: row for row in json.loads(saved.read_text())["rows"]}
    assert rows["loop on the plain engine - bare step"]["target"] == "<= 2"
    assert all(rows[f"{way}: a step"]["value"] > 0 for way in ("bare", "plain", "deepspeed"))
    assert sum(row["value"] is None for row in rows.values()) == 4
    assert done.stdout.count("not measured on a GPU") == 4
