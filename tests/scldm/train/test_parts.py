"""A part of a checkpoint, which the ranks of a node write together, and how little of one is in memory at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scldm.errors import InputError
from scldm.train.checkpoint import Checkpoint, Damaged
from scldm.train.converted import repartition, write_plain
from scldm.train.parts import KINDS, Layout, Ranges, layouts
from scldm.train.saver import complete
from tests.scldm.train.small_runs import tensors_at_a_time

SIZES = {"a": 1_001, "b": 7, "c": 0, "d": 1} | {f"e{k}": 40 + k for k in range(9)}
WHOLE = {
    (kind, name): torch.randn(n, generator=torch.Generator().manual_seed(k * n))
    for k, kind in enumerate(KINDS, 1)
    for name, n in SIZES.items()
}


def held_by(n_ranks: int, seed: int = 0) -> list[Ranges]:
    """Every number once, at ends by chance: some ranks hold nothing of a parameter, one may hold nothing at all."""
    rng = np.random.default_rng(seed)
    ends = {name: [0, *sorted(rng.integers(0, n + 1, n_ranks - 1).tolist()), n] for name, n in SIZES.items()}
    return [{name: (at[k], at[k + 1]) for name, at in ends.items() if at[k] < at[k + 1]} for k in range(n_ranks)]


def write(part: Layout, folder: Path, k: int) -> None:
    part.write(folder, k, lambda kind, name: WHOLE[kind, name][slice(*part.ranges[k][name])])


def written(folder: Path, nodes: list[str], seed: int = 0) -> Checkpoint:
    """By ranks that all write at once."""
    parts = layouts(nodes, held_by(len(nodes), seed))
    aside = folder / "step-00000003.partial"
    ranks = [
        threading.Thread(target=write, args=(part, aside, k))
        for part in parts
        for k in reversed(range(len(part.ranges)))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    state = {"step": 3, "n_updates": 3, "shapes": {name: [n] for name, n in SIZES.items()}}
    complete(aside, parts, {"mean": torch.ones(2)}, state, folder)
    return Checkpoint(aside.rename(folder / "step-00000003"))


@pytest.mark.parametrize(
    "nodes, files",
    [("x", 1), ("xxxx", 1), ("xxyyyz", 3), ("xyxy", 4), ("x" * 8 + "y" * 8, 2)],  # ranks dealt out in turn: one each
)
@pytest.mark.parametrize("seed", range(3))
def test_the_ranks_of_a_node_write_one_file_and_every_number_is_found(
    tmp_path: Path, nodes: str, files: int, seed: int
) -> None:
    checkpoint = written(tmp_path, list(nodes), seed)
    assert len(list(checkpoint.folder.glob("part-*"))) == files
    assert checkpoint.n_ranks == len(nodes)
    checkpoint.check()
    rng = np.random.default_rng(seed)
    for (kind, name), whole in WHOLE.items():
        assert torch.equal(checkpoint.read(kind, name), whole)
        start, stop = sorted(rng.integers(0, SIZES[name] + 1, 2).tolist())
        assert torch.equal(checkpoint.read(kind, name, start, stop), whole[start:stop])
    assert checkpoint.buffers()["mean"].tolist() == [1, 1]
    for path in checkpoint.folder.glob("part-*"):
        load_file(path)  # other tools read it


def harm_seen(checkpoint: Checkpoint, share: slice) -> str:
    try:
        checkpoint.check(share)
    except Damaged as error:
        return str(error)
    return ""


def test_each_stretch_is_compared_by_one_rank(tmp_path: Path) -> None:
    """One bit of each, in turn: of those that share the reading, one finds it and names the file."""
    checkpoint = written(tmp_path, list("xxxyy"))
    for name, part in checkpoint.held.parts.items():
        path = checkpoint.folder / name
        sound = path.read_bytes()
        for end in part.ends:
            harmed = bytearray(sound)
            harmed[end - 1] ^= 1
            path.write_bytes(harmed)
            told = [harm_seen(checkpoint, slice(rank, None, 3)) for rank in range(3)]
            assert sorted(map(bool, told)) == [False, False, True]
            assert f"{path} is damaged: its SHA-256" in "".join(told)
        path.write_bytes(sound)
    checkpoint.check()


@pytest.mark.parametrize(
    "ranks, said",
    [
        ((0, 1), "rank 2 of its node has not written it"),
        ((1, 2), "is not as the 3 ranks of its node"),
        ((0, 2), "rank 1 of its node has not"),
    ],
)
def test_a_part_that_a_rank_has_not_written_is_no_part(tmp_path: Path, ranks: tuple[int, ...], said: str) -> None:
    (part,) = layouts(["x"] * 3, [{"a": (0, 3)}, {"a": (3, 900)}, {"a": (900, 901)}])
    for k in ranks:
        write(part, tmp_path, k)
    if 2 not in ranks:  # a file of its full size
        with (tmp_path / part.name).open("r+b") as file:
            file.truncate(part.ends[-1])
    with pytest.raises(InputError, match=said):
        part.noted(tmp_path)


def test_a_stretch_written_again_is_the_last_one(tmp_path: Path) -> None:
    """As where a save failed on another rank, and the next begins over what it left."""
    (part,) = layouts(["x"] * 2, held_by(2))
    for k in (0, 1):
        part.write(tmp_path, k, lambda kind, name, k=k: torch.zeros(part.ranges[k][name][1] - part.ranges[k][name][0]))
    for k in (1, 0):
        write(part, tmp_path, k)
    (again,) = layouts(["x"] * 2, held_by(2))
    for k in (0, 1):
        write(again, tmp_path / "new", k)
    assert part.noted(tmp_path) == again.noted(tmp_path / "new")
    assert (tmp_path / part.name).read_bytes() == (tmp_path / "new" / part.name).read_bytes()


def test_a_header_that_is_not_as_it_was_to_be_is_no_part(tmp_path: Path) -> None:
    (part,) = layouts(["x"] * 2, held_by(2))
    for k in (0, 1):
        write(part, tmp_path, k)
    path = tmp_path / part.name
    sound = path.read_bytes()
    for harmed in (sound.replace(b"1/exp_avg/a", b"1/exp_avg/b"), b"\xff" * 8 + sound[8:]):
        path.write_bytes(harmed)
        with pytest.raises(InputError, match="is not as the 2 ranks of its node"):
            part.noted(tmp_path)


def test_a_conversion_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path, list("xxy"))
    read, n_read = Checkpoint.read, iter(range(9))

    def fails(self: Checkpoint, *what) -> torch.Tensor:
        if next(n_read) == 8:
            raise OSError("no more")
        return read(self, *what)

    monkeypatch.setattr(Checkpoint, "read", fails)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="no more"):
        repartition(checkpoint, tmp_path / "out" / "moved", 2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("to", ["safetensors", "files", "dcp", "checkpoint"])
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    checkpoint = written(tmp_path, list("xxy"))
    at_a_time = tensors_at_a_time(monkeypatch)
    if to == "checkpoint":
        repartition(checkpoint, tmp_path / "out", 1)
    else:
        write_plain(checkpoint, tmp_path / "out", "dcp" if to == "dcp" else "safetensors", "ema", 50 * (to == "files"))
    assert len(at_a_time) >= len(SIZES) - 1
    assert max(at_a_time) <= 2, "the one before it, until the next has its name"
