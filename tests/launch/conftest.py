"""What tests of several verbs start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch.fake_slurm import COMMANDS


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for Slurm's commands, first on the PATH, which note in it what they were asked."""
    folder = tmp_path / "fake slurm"
    (folder / "bin").mkdir(parents=True)
    for name, text in COMMANDS.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "codes").touch()
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    (tmp_path / "site.sh").write_text(f'SCLDM_PARTITION=low\nSCLDM_GPUS_PER_NODE=8\nSCLDM_SHARED="{tmp_path}"\n')
    monkeypatch.setenv("SCLDM_SITE", str(tmp_path / "site.sh"))
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the verbs make of 200 small cells. Tests may add files, and change none."""
    from tests.launch.small_verbs import make_all

    at = tmp_path_factory.mktemp("verbs")
    make_all(at)
    return at
