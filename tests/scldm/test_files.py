"""Files that are whole or not there, durable before they have their name, and readable for colleagues."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scldm.cells_opened import check_out
from scldm.errors import InputError
from scldm.files import (
    PARTIAL,
    check_evaluation,
    check_page,
    check_writable,
    made_aside,
    of_bytes,
    put_in_place,
    sha256_of,
    write_page,
    written_aside,
)

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = ("benchmarks", "data_pipeline", "launch", "scldm")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the system, in order."""
    asked: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (asked.append(name), real(*a))[1])
    return asked


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


def test_what_can_not_be_written_is_known_before_and_the_trial_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    check_writable("out", str(tmp_path / "new" / "folder"))
    check_writable("out", str(tmp_path))
    check_writable("out", str(tmp_path / "a"), is_file=True)
    for place in ("/proc/new/folder", "/proc", f"{tmp_path}/a", f"{tmp_path}/a/b"):
        with pytest.raises(InputError, match=f"^out={place}: (/proc|{tmp_path}/a) can't be written to"):
            check_writable("out", place)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_page_replaces_nothing_but_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_page("out", str(page))
    for begins in ("", "<!DOCTYPE html>\n<html", "<!doctype html><meta"):
        page.write_text(begins)
        check_page("out", str(page))
    page.write_text("{}")
    with pytest.raises(InputError, match=f"^out={page} exists and is no HTML page, which would be lost"):
        check_page("out", str(page))


def test_an_evaluation_replaces_nothing_but_an_evaluation(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    check_evaluation("out", out)
    for name in ("evaluation.json", "report.html", "figures/scores.png"):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[1]")
        with pytest.raises(InputError, match=f"out={out}: {path} is there, and evaluation.json of what"):
            check_evaluation("out", out)
        path.unlink()
    (tmp_path / "out" / "thesis.txt").write_text("not of its names")
    check_evaluation("out", out)
    path.write_text("a figure")
    (tmp_path / "out" / "evaluation.json").write_text('{"made_with": {}}')
    check_evaluation("out", out, has_page=False)
    with pytest.raises(InputError, match=f"{path} is there"):  # of an autoencoder, which has no figure
        check_evaluation("out", out)
    (tmp_path / "out" / "evaluation.json").write_text('{"made_with": {}, "pooled": {}}')
    check_evaluation("out", out)


@pytest.mark.parametrize("name", ["gone", "n" * 256, "a\0b"])
def test_what_can_be_no_folder_is_known_before(tmp_path: Path, name: str) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"out=.* (is a link to .*/nothing, which is not|must be a path of at most)"):
        check_writable("out", str(tmp_path / name))


def test_a_page_takes_what_a_killed_one_left_with_it(tmp_path: Path) -> None:
    mine, others = (tmp_path / f".{name}.0123456789ab.partial" for name in ("page.html", "other.html"))
    for left in (mine, others):
        left.touch()
    with written_aside(tmp_path / "page.html"):  # of a process that writes it too
        (under_way,) = set(tmp_path.iterdir()) - {mine, others}
        write_page(tmp_path / "page.html", "<!doctype html>é".encode())
        assert {path.name for path in tmp_path.iterdir()} == {others.name, under_way.name, "page.html"}
        under_way.write_bytes((tmp_path / "page.html").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "page.html"]
    assert (tmp_path / "page.html").read_text() == "<!doctype html>é"


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


def write_folder(path: Path, text: str) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)


def test_what_a_library_makes_is_durable_before_it_has_its_name(tmp_path: Path, done: list[str]) -> None:
    with made_aside(tmp_path / "new" / "file") as part:  # the folder above is made too
        part.write_text("a")
        assert not (tmp_path / "new" / "file").exists()
    assert done == ["fsync", "replace", "fsync"]  # bytes, name, folder
    done.clear()
    with made_aside(tmp_path / "folder") as part:
        write_folder(part, "a")
    assert done == ["fsync"] * 3 + ["replace", "fsync"]  # file, inner, folder; name, folder above
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "new"]


@pytest.mark.parametrize("write", [write_folder, Path.write_text])
def test_what_fails_leaves_what_was_there(tmp_path: Path, write: Callable[[Path, str], object]) -> None:
    path = tmp_path / "cells"
    with made_aside(path) as part:
        write(part, "first")

    def held() -> list[bytes]:
        return [p.read_bytes() for p in [path, *path.rglob("*")] if p.is_file()]

    def fails() -> None:
        with made_aside(path) as part:
            write(part, "second")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert held() == [b"first"]
    write(path.with_name(f".cells.0123456789ab{PARTIAL}"), "of a killed process")
    (somebodys := path.with_name(path.name + PARTIAL)).write_text("mine")
    with made_aside(path) as part:
        write(part, "third")
    assert held() == [b"third"]
    assert sorted(tmp_path.iterdir()) == [path, somebodys]


def test_a_folder_that_replaces_none_leaves_what_another_made_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    with made_aside(path, replaces=False) as slow:
        write_folder(slow, "slow")
        with made_aside(path, replaces=False) as fast:
            write_folder(fast, "fast")
    assert (path / "inner" / "file").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [path]


def test_it_may_be_made_elsewhere(tmp_path: Path) -> None:
    with made_aside(tmp_path / "out", at=tmp_path / "parts" / "joined") as part:
        assert part == tmp_path / "parts" / "joined"
        part.write_text("a")
    assert (tmp_path / "out").read_text() == "a"
    assert not part.exists()


def test_a_folder_that_can_not_be_removed_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", "new")
    write_folder(tmp_path / "b", "old")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    put_in_place(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "inner" / "file").read_text() == "new"


def test_what_can_not_have_its_name_leaves_the_folder_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", "new")
    write_folder(tmp_path / "b", "old")
    real = os.replace

    def refused(source: Path, target: Path) -> None:
        if source == tmp_path / "a":
            raise PermissionError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        put_in_place(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "inner" / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_takes_no_folders_place(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", "years of work")
    for make in (made_aside, written_aside):
        with pytest.raises(IsADirectoryError), make(tmp_path / "mine") as part:
            part.write_text("a") if isinstance(part, Path) else part.write(b"a")
    assert (tmp_path / "mine" / "inner" / "file").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_h5ad(path: Path) -> None:
    ad.AnnData(np.ones((2, 3), np.float32)).write_h5ad(path)


def write_model(path: Path) -> None:
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / "model.safetensors")


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"a": torch.ones(2)}, path),
    "torch": lambda path: torch.save({"a": torch.ones(2)}, path),
    "h5ad": write_h5ad,
    "folder": write_model,
    "private": lambda path: os.close(os.open(path, os.O_CREAT, 0o600)),  # as safetensors did, whatever it does now
}


@pytest.mark.parametrize("kind", WRITERS)
def test_colleagues_can_read_what_umask_lets_them(tmp_path: Path, umask: int, kind: str) -> None:
    with made_aside(tmp_path / "made") as part:
        WRITERS[kind](part)
    files = [p for p in [tmp_path / "made", *(tmp_path / "made").rglob("*")] if p.is_file()]
    assert [stat.S_IMODE(p.stat().st_mode) for p in files] == [0o666 & ~umask]


def test_a_hash_is_of_the_bytes_that_are_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"xabc")
    with path.open("rb") as file:
        file.read(1)
        assert sha256_of(file, piece=2) == (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    path.write_bytes(b"abc")
    assert sha256_of(path)[1].startswith("ba7816bf")


def renames(text: str) -> list[int]:
    """Lines that give a file or folder another name. `a.replace(b, c)` is of text, `.rename("x")` of pandas."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            by_system = (of, node.func.attr) in (("os", "replace"), ("os", "rename"), ("shutil", "move"))
            of_path = node.func.attr in ("replace", "rename") and len(node.args) == 1
            if by_system or (of_path and not isinstance(node.args[0], ast.Constant)):
                found.append(node.lineno)
    return found


@pytest.mark.heavy
def test_files_are_put_in_place_by_one_module_alone() -> None:
    paths = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if renames(path.read_text())}
    assert found == {"scldm/files.py"}


@pytest.mark.parametrize("line", ["os.replace(a, b)", "os.rename(a, b)", "shutil.move(a, b)", "a.rename(b / 'c')"])
def test_a_rename_elsewhere_is_found(line: str) -> None:
    assert renames(line) == [1]
    assert renames("a.replace('x', 'y'); s.rename('n'); replace(a, b=1); dataclasses.replace(a, b=1)") == []


def test_a_folder_in_the_place_of_a_file_is_refused_and_one_that_is_the_output_is_not(tmp_path: Path) -> None:
    """A second `scldm generate out=cells.zarr` finds what the first one made."""
    for name in ("cells.zarr", "cells.h5ad"):
        (tmp_path / name).mkdir()
    check_out(tmp_path / "cells.zarr", (".h5ad", ".zarr"))
    with pytest.raises(InputError, match="cells.h5ad can't be written to"):
        check_out(tmp_path / "cells.h5ad", (".h5ad", ".zarr"))
