"""`python -m benchmarks.ranks`: what ranks that meet take, and what the note of a checkpoint does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ranks_connect_as_needed_and_a_checkpoint_grows_with_its_nodes(tmp_path: Path) -> None:
    """In a process of its own, which has no threads yet: it forks."""
    saved = tmp_path / "ranks.json"
    words = ["ranks=16", "parts=16,64", "genes=50", f"save={saved}"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.ranks", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3_000:]
    value = {row["name"]: row["value"] for row in json.loads(saved.read_text())["rows"]}
    # of a full mesh, and the launcher's store and the first rank's watch besides
    assert value["16 ranks: sockets of a rank, all connected at once"] >= 16
    assert value["16 ranks: sockets of a rank"] <= 10
    assert [value[f"{n} ranks: files of tensors"] for n in (16, 64)] == [2, 8]  # 8 ranks on each node
    assert 3 < value["64 ranks: state.json"] / value["16 ranks: state.json"] < 4
