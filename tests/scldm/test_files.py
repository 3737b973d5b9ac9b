"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.files import of_bytes
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


def test_bytes_are_said_in_the_unit_that_shows_them() -> None:
    said = {
        0: "0 B",
        340: "340 B",
        1000: "1 kB",
        2_540_000: "2.54 MB",
        999_600: "1 MB",
        1e14: "100 TB",
        5e15: "5,000 TB",
    }
    assert {n: of_bytes(n) for n in said} == said
