"""The description of where something ran: plain JSON, true of this checkout, and cheap to make."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from scldm import environment

ROOT = Path(__file__).resolve().parent.parent.parent


def test_it_is_json_and_names_the_versions_that_are_installed() -> None:
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["versions"]["numpy"] == metadata.version("numpy")
    assert described["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_the_commit_is_that_of_the_checkout() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (environment.git_commit() or "").removesuffix("-dirty") == head


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "scldm" / "environment.py"))
    assert environment.git_commit() is None


def test_describing_imports_nothing_heavy() -> None:
    code = "import sys, scldm.environment as e; e.describe(); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
