"""HDF5 on a disk that becomes full: one error of the disk, a process that lives, and little kept in memory."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from anndata.io import sparse_dataset

from scldm import cells_file, hdf5
from scldm.cells_file import write_cells
from scldm.files import made_aside
from scldm.hdf5 import hdf5_made


class Disk:
    """A file on a disk that takes so many bytes, and is then as full as one for good."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])  # the last write before is cut short, as on a disk
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def full_at(monkeypatch: pytest.MonkeyPatch, room: int) -> list[Any]:
    """Let files have so much room. Returns those that are made."""
    begin, made = hdf5._Kept.__init__, []

    def begun(self: Any, file: Any) -> None:
        begin(self, Disk(file, room))
        made.append(self)

    monkeypatch.setattr(hdf5._Kept, "__init__", begun)
    return made


def fill(file: h5py.File) -> None:
    for k in range(4):
        numbers = np.random.default_rng(k).integers(0, 1_000, 30_000)
        file.create_dataset(f"group {k}/x", data=numbers, chunks=(4_096,), compression="gzip")
        file[f"group {k}"].attrs["name"] = "value" * k


def test_a_file_is_what_hdf5_writes_itself(tmp_path: Path) -> None:
    with hdf5_made(tmp_path / "a") as (file, check):
        fill(file)
        check()
    with h5py.File(tmp_path / "b", "w") as file:
        fill(file)
    with h5py.File(tmp_path / "a") as a, h5py.File(tmp_path / "b") as b:
        for k in range(4):
            np.testing.assert_array_equal(a[f"group {k}/x"], b[f"group {k}/x"])
            assert dict(a[f"group {k}"].attrs) == dict(b[f"group {k}"].attrs)


@pytest.mark.parametrize("room", [0, 1, 95, 96, 800, 2_047, 2_048, 20_000, 70_000, 150_000, 169_000])
def test_a_full_disk_is_its_own_error_wherever_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, room: int
) -> None:
    with hdf5_made(tmp_path / "whole") as (file, _):
        fill(file)
    assert (tmp_path / "whole").stat().st_size > 170_000
    full_at(monkeypatch, room)
    with pytest.raises(OSError, match="No space left") as raised, hdf5_made(tmp_path / "cut") as (file, _):
        fill(file)
    assert raised.value.errno == errno.ENOSPC
    assert capfd.readouterr().err == ""


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C raises, also where the tests are run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 10_000])
def test_ctrl_c_waits_for_hdf5_and_leaves_no_file_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, at: int
) -> None:
    """HDF5 writes when it closes the file at the latest. 10,000: between two writes."""
    write, calls = hdf5._Kept.write, []

    def written(self: Any, data: Any) -> int:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(hdf5._Kept, "write", written)

    def make() -> None:
        with made_aside(tmp_path / "cells") as part, hdf5_made(part) as (file, check):
            fill(file)
            if at == 10_000:
                signal.raise_signal(signal.SIGINT)
                check()
                pytest.fail("answered too late")

    with pytest.raises(KeyboardInterrupt):
        make()
    assert at == 10_000 or len(calls) > at
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rows_can_be_appended_to_a_sparse_matrix_of_a_file(tmp_path: Path) -> None:
    x = sp.csr_matrix(np.eye(5, dtype=np.float32))
    write_cells(ad.AnnData(x), tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        sparse_dataset(file["X"]).append(x)
        assert sparse_dataset(file["X"]).shape == (10, 5)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_cells_stop_soon_after_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(cells_file, "COPIED_NUMBERS", 1 << 18)
    dense = np.random.default_rng(0).random((80_000, 100), dtype=np.float32)  # 32 MB
    x = dense if kind == "dense" else sp.csr_matrix(dense) if kind == "csr" else sp.csc_matrix(dense)
    write_cells(ad.AnnData(x), tmp_path / "whole.h5ad", compression=None)
    back = ad.read_h5ad(tmp_path / "whole.h5ad")
    np.testing.assert_array_equal(back.X if kind == "dense" else back.X.toarray(), dense)
    made = full_at(monkeypatch, 50_000)
    with pytest.raises(OSError, match="No space left"):
        write_cells(ad.AnnData(x), tmp_path / "cut.h5ad", compression=None)
    assert 0 < sum(len(data) for _, data in made[0].rest) < 12e6  # HDF5 itself holds 8 MB
