"""The small model, saved and loaded once a module."""

from __future__ import annotations

from pathlib import Path

import pytest

import scldm
from scldm.model_folder import save_pretrained
from scldm.pretrained import Pretrained
from tests.scldm.small_model import CONDITIONS, GENES, library_sizes, networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    vae, dit = networks()
    save_pretrained(path, vae, dit, GENES, CONDITIONS, library_sizes(), {"from": "a test"})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Pretrained:
    return scldm.load(folder)
