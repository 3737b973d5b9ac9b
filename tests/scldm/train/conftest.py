"""No test waits for another host's caches, or for a lock, as long as a run does."""

from __future__ import annotations

import pytest

from scldm.train import checkpoint, run_folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SEEN_S", 0.05)
    monkeypatch.setattr(run_folder, "WAIT_S", 0.2)
