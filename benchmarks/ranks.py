"""`python -m benchmarks.ranks`: what grows with the number of ranks, before and between the steps.

Ranks are forked processes of this machine, which share its cores. So their seconds are upper bounds, and ratios of two
ways say more. Sockets and bytes are what they would be anywhere.

Reading order: BenchRanksConfig, main, Meeting, met, as_rank, checkpoint_rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Report, Row, run_benchmark
from launch import train_vae
from launch.config import compose
from scldm.errors import InputError
from scldm.files import PARTIAL, put_in_place
from scldm.model.vae import VAE
from scldm.parallel.dist import LAZY, World
from scldm.parallel.links import meet
from scldm.train import checkpoint, steps
from scldm.train.parts import UNWRITTEN, layouts
from scldm.train.saver import complete

PURPOSE = """Measure what grows with the number of ranks: sockets, the time until all have met, a step's agreement, and
the note of a checkpoint (vae/20m, every parameter split over all ranks, as ZeRO-3 does)."""
EXAMPLE = """
python -m benchmarks.ranks ranks=16,64,256 parts=16,64,256,1024
"""
STEPS = 10
MOST_S = 900.0  # that a rank waits for the others
MOST_EAGER = 256  # ranks that all connect at once: more have more sockets than a machine gives
SHA256 = b"0" * 64
PER_NODE = 8  # ranks


@dataclass(frozen=True)
class BenchRanksConfig:
    """What to measure.

    ranks: numbers of processes that meet; each takes 8 MB of memory
    parts: numbers of ranks that write a checkpoint, 8 on each node
    genes: of the checkpoint's network
    json: print JSON, not the table
    save: write the JSON to this file as well
    """

    ranks: tuple[int, ...] = (16, 64)
    parts: tuple[int, ...] = (16, 64, 256, 1_024)
    genes: int = 36_130
    json: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        if any(n < 2 for n in self.ranks):
            raise InputError(f"ranks={','.join(map(str, self.ranks))}: at least 2 ranks meet")


CONFIG = BenchRanksConfig


def main(config: BenchRanksConfig) -> Report:
    """Print the table; returns it."""
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    report = Report("ranks", {"cores": os.cpu_count(), "steps": STEPS}, save=config.save)
    for n in config.ranks:
        ours = met(n, lazy=True)
        most = 4 + 2 * math.ceil(math.log2(n))  # a barrier's partners, a ring's, the store and the watch
        report.add(Row.at_most(f"{n} ranks: sockets of a rank", ours.sockets, "", most))
        report.add(Row(f"{n} ranks: sockets of the first", ours.of_first, ""))
        report.add(Row(f"{n} ranks: until all have met", ours.join_s, "s"))
        report.add(Row(f"{n} ranks: a step's agreement", 1e3 * ours.agree_s, "ms"))
        report.add(Row(f"{n} ranks: until all are watched", ours.watch_s, "s"))
        if n <= MOST_EAGER:
            eager = met(n, lazy=False)
            report.add(Row(f"{n} ranks: sockets of a rank, all connected at once", eager.sockets, ""))
            report.add(Row(f"{n} ranks: sockets of the first, all connected at once", eager.of_first, ""))
            report.add(Row(f"{n} ranks: until all have met, all connected at once", eager.join_s, "s"))
    for n in config.parts:
        checkpoint_rows(report, n, config.genes)
    report.print(config.json)
    return report


# --- ranks that meet -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meeting:
    """sockets: of the second rank, and of_first, once all have met, agreed and are watched
    join_s: until the first agreement; agree_s: each of the next; watch_s: until every rank has a link to the first"""

    sockets: int
    of_first: int
    join_s: float
    agree_s: float
    watch_s: float


def met(n: int, lazy: bool) -> Meeting:
    """Raises: InputError where a rank failed: it has said why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours, theirs = os.pipe()
    sys.stdout.flush()
    ranks = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            as_rank(rank, n, port, lazy, theirs)
        ranks.append(pid)
    os.close(theirs)
    with open(ours) as told:
        found = {line["rank"]: line for line in map(json.loads, told)}
    if failed := sum(os.waitpid(pid, 0)[1] != 0 for pid in ranks):
        raise InputError(f"{failed} of {n} ranks failed")
    slowest = {name: max(line[name] for line in found.values()) for name in ("join_s", "agree_s", "watch_s")}
    return Meeting(found[1]["sockets"], found[0]["sockets"], **slowest)


def as_rank(rank: int, n: int, port: int, lazy: bool, out: int) -> None:
    """What a rank does before its first step, in a forked process, which ends here."""
    code = 1
    try:
        place = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()} | {LAZY: str(int(lazy))})
        world = World(rank, n, torch.device("cpu"))
        began = time.monotonic()
        world.join(MOST_S)
        agree(world)
        joined = time.monotonic()
        for _ in range(STEPS):
            agree(world)
        agreed = time.monotonic()
        _, links = meet(world)
        watched = time.monotonic()
        seconds = {"join_s": joined - began, "agree_s": (agreed - joined) / STEPS, "watch_s": watched - agreed}
        os.write(out, (json.dumps({"rank": rank, "sockets": n_sockets(), **seconds}) + "\n").encode())  # at once: short
        world.barrier()
        del links
        code = 0
    except BaseException:  # whatever it is, this process goes no further than here
        traceback.print_exc()
    finally:
        os._exit(code)


def agree(world: World) -> None:
    world.begin_max([0, 0, 0, 0, 0, 0])()


def n_sockets() -> int:
    n = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            n += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return n


# --- the note of a checkpoint --------------------------------------------------------------------------------------


def checkpoint_rows(report: Report, n: int, genes: int) -> None:
    """What the first rank writes, and what every rank reads, of parts of which only the headers are there."""
    words = ["vae/20m", "hardware/cpu", "data.shards=none", "run_dir=none"]
    with torch.device("meta"):
        network = VAE(compose(train_vae.CONFIG, words).model, genes)
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    bounds = {name: [math.prod(shape) * k // n for k in range(n + 1)] for name, shape in shapes.items()}
    held = [{name: (at[k], at[k + 1]) for name, at in bounds.items()} for k in range(n)]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "step-00000001"
        aside = target.with_suffix(PARTIAL)
        aside.mkdir()
        began = time.perf_counter()
        parts = layouts([str(k // PER_NODE) for k in range(n)], held)
        first = parts[0].header
        layout_s = time.perf_counter() - began
        for part in parts:
            with (aside / part.name).open("wb") as file:
                file.write(part.header.replace(UNWRITTEN.encode(), SHA256))
                file.truncate(part.ends[-1])  # a hole, which takes no room
        state = {"step": 1, "n_updates": 1, "shapes": shapes}
        written, parts = parts, layouts([str(k // PER_NODE) for k in range(n)], held)  # anew: it has made no header
        for part, known in zip(parts, written, strict=True):
            part.take_outline(known.outline)  # as the node that wrote it tells
        commit_s = timed(lambda: complete(aside, parts, {}, state, Path(scratch)))
        put_in_place(aside, target)
        read_s = timed(lambda: checkpoint.Checkpoint(target))
        n_bytes = (target / steps.STATE).stat().st_size
    report.add(Row(f"{n} ranks: files of tensors", len(parts), ""))
    report.add(Row(f"{n} ranks: a part's header", len(first) / 1e6, "MB"))
    report.add(Row(f"{n} ranks: a rank makes the layout of its part", layout_s, "s"))
    report.add(Row(f"{n} ranks: {steps.STATE}", n_bytes / 1e6, "MB"))
    report.add(Row(f"{n} ranks: the first rank makes them one", commit_s, "s"))
    report.add(Row(f"{n} ranks: a rank opens them", read_s, "s"))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(run_benchmark("ranks"))
