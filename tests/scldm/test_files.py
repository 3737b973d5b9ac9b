"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scldm.files import written_aside


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_replaces_none_leaves_what_another_made_meanwhile(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> None:
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "file"
    with written_aside(path, replaces=False) as file:
        file.write(b"first")
        assert not path.exists()
    with written_aside(path, replaces=False) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
