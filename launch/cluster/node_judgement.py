"""What follows from what the ranks of the preflight found: which nodes are unfit, and on which the job runs.

A node is unfit where a rank of it did not come up, failed, died or hangs. So is one that differs from the others, and
one that is slow beside the median of all. What all nodes meet alike is held against none: then the job is wrong, or
the site's settings are. On a single node, so is what all of its ranks meet. A memory error is not: no setting makes it.

Reading order: Course, Report, nodes_to_use.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launch.cluster.job import usable_counts
from launch.cluster.node_checks import Findings
from launch.cluster.notes import BAD_NODES, LATE_NODES, REPORT, left_word, nodes_in, note_nodes
from scldm.files import write_json

SLOW = 2.0  # times the median of the nodes
ABSENT = "did not come up in time. --preflight-s gives more"
SEEN_S = 5.0  # in which a file written on one node is visible on another
Pair = tuple[str, str]
# pair of nodes -> of its ranks, seconds of an all-reduce, and what became of those that gave none
Outcomes = dict[Pair, tuple[dict[int, float], dict[int, str]]]


@dataclass(frozen=True)
class Course:
    """What all ranks of a preflight know: the nodes in their order, ranks on each, the job's notes, when it began."""

    hosts: Sequence[str]
    per_node: int
    notes: Path
    began: float

    def node(self, rank: int) -> str:
        return self.hosts[rank // self.per_node]

    def ranks(self, nodes: Iterable[str]) -> list[int]:
        """Those of these nodes, each once."""
        firsts = [self.hosts.index(node) * self.per_node for node in dict.fromkeys(nodes)]
        return [first + k for first in firsts for k in range(self.per_node)]


class Report:
    """What speaks against each node, stage by stage.

    troubles: node -> what is wrong with it
    notes: what is to be said of the job as a whole
    hopeless: the job itself is wrong: it would fail on any of the nodes
    """

    def __init__(self, course: Course) -> None:
        self.course = course
        self.troubles: dict[str, list[str]] = defaultdict(list)
        self.notes: list[str] = []
        self.hopeless = False
        self.found: Mapping[int, Findings] = {}
        self.product_s: dict[str, float] = {}
        self.all_reduce_s: dict[str, float] = {}

    def add(self, node: str, trouble: str) -> None:
        if trouble not in self.troubles[node]:
            self.troubles[node].append(trouble)

    def hold(self, told: Mapping[int, Sequence[str]], of_rank: bool = False) -> None:
        """Hold what each of the ranks that answered has met against its node, and against the job what all of their
        nodes have met alike, numbers aside. On a single node that is what all of its ranks met.

        told: rank -> what it has met, if anything
        of_rank: the words are about the rank, not about its node
        """
        met: dict[str, set[int]] = defaultdict(set)
        for rank, troubles in told.items():
            for trouble in troubles:
                met[_alike(trouble)].add(rank)
        nodes = {self.course.node(rank) for rank in told}
        for kind, ranks in met.items():
            first = next(trouble for trouble in told[min(ranks)] if _alike(trouble) == kind)
            if ranks == told.keys():
                self.blame_the_job(f"every rank {first}" if of_rank else f"on every node: {first}")
            elif len(nodes) > 1 and {self.course.node(rank) for rank in ranks} == nodes:
                self.blame_the_job(f"on every node{' a rank' if of_rank else ':'} {first}")
            else:
                for rank in sorted(ranks):
                    for trouble in told[rank]:
                        if _alike(trouble) == kind:
                            self.add(self.course.node(rank), f"rank {rank} {trouble}" if of_rank else trouble)

    def blame_the_job(self, why: str) -> None:
        self.notes.append(why)
        self.hopeless = True

    def failures(self, missing: Mapping[int, str], asked: Sequence[int]) -> None:
        """Ranks that gave no result, of those that were asked: rank -> what became of it."""
        absent = {rank for rank, words in missing.items() if words == ABSENT}
        for rank in sorted(absent):
            self.add(self.course.node(rank), f"rank {rank} {ABSENT}")
        told = {rank: [missing[rank]] if rank in missing else [] for rank in asked if rank not in absent}
        self.hold(told, of_rank=True)

    def findings(self, found: Mapping[int, Findings]) -> None:
        """What each rank found on its node, and in what a node differs from the others."""
        self.found = found
        for rank, one in found.items():
            for trouble in one.broken:
                self.add(self.course.node(rank), trouble)
        self.hold({rank: one.gpu for rank, one in found.items()})
        self.hold({rank: one.folders for rank, one in found.items() if one.folders is not None})
        for what in sorted({key for one in found.values() for key in one.same}):
            values = {rank: one.same.get(what) for rank, one in sorted(found.items()) if one.same}
            (usual, _), *_ = Counter(values.values()).most_common()  # of equally many, the one that the first rank has
            for rank, value in values.items():
                if value != usual:
                    told = f"{what} is {value or 'missing'}, on other nodes {usual or 'missing'}"
                    self.add(self.course.node(rank), told)
        self._folder_is_shared([node for node in self.course.hosts[1:] if self.course.ranks([node])[0] in found])

    def _folder_is_shared(self, others: Sequence[str]) -> None:
        """Every node has left a file in the job's notes, before its findings. The first node must see all of them."""
        notes, until = self.course.notes, time.monotonic() + SEEN_S
        writing = [node for node in others if not self.troubles[node]]
        unseen = [node for node in writing if not left_word(notes, node, until - time.monotonic())]
        if len(unseen) > 1 and unseen == writing:  # the job's script runs on the first node
            first = self.course.hosts[0]
            self.add(first, f"{notes}: what the others write there is not seen here")
            self.blame_the_job(f"{notes} is not on {first} what it is elsewhere, or is each node's own")
            return
        for node in unseen:
            self.add(node, f"{notes}: what it writes there is not seen on the first node")

    def products(self, seconds: Mapping[int, float]) -> None:
        """A matrix product: of a node's ranks, the slowest."""
        for rank, value in seconds.items():
            node = self.course.node(rank)
            self.product_s[node] = max(value, self.product_s.get(node, 0.0))
        self._slow("a matrix product", self.product_s)

    def pairs(self, outcomes: Outcomes) -> None:
        """All-reduces between neighbours: of a node's pairs, the faster one.

        Where one does not end, a rank that died in it is to blame. Without one, a node of which no pair ends is. Else
        both of its nodes are, since one of them or what lies between is broken. Where no pair at all ends and no death
        explains it, no node is to blame: the network is set wrong, or nothing tells the nodes apart.
        """
        broken = {pair: missing for pair, (_, missing) in outcomes.items() if missing}
        whole = {pair: max(done.values()) for pair, (done, missing) in outcomes.items() if not missing}
        for missing in broken.values():
            for rank, told in missing.items():
                if told.startswith("died"):
                    self.add(self.course.node(rank), f"rank {rank} {told}")
        explained = {node for node, troubles in self.troubles.items() if troubles}
        unexplained = [missing for pair, missing in broken.items() if explained.isdisjoint(pair)]
        if unexplained and not whole:
            rank, told = min(unexplained[0].items())
            self.blame_the_job(f"no all-reduce succeeds, of any nodes: rank {rank} {told}")
            return
        sound = {node for pair in whole for node in pair}
        for suspects in (lambda node: node not in sound, lambda node: True):
            for pair, missing in broken.items():
                if explained.isdisjoint(pair):
                    for node in filter(suspects, pair):
                        rank = next((r for r in missing if self.course.node(r) == node), min(missing))
                        self.add(
                            node, f"an all-reduce of {' and '.join(pair)} does not end: rank {rank} {missing[rank]}"
                        )
            explained = {node for node, troubles in self.troubles.items() if troubles}
        for pair, value in whole.items():
            for node in pair:
                self.all_reduce_s[node] = min(value, self.all_reduce_s.get(node, value))
        self._slow("an all-reduce", self.all_reduce_s)

    def _slow(self, what: str, seconds: Mapping[str, float]) -> None:
        """Of one or two nodes none can be called slow."""
        usual = median(seconds.values()) if len(seconds) > 2 else float("inf")
        for node, value in seconds.items():
            if value > SLOW * usual:
                times = f"{value / usual:.1f} times the median of the nodes"
                self.add(node, f"slow: {what} takes {value * 1e3:.2f} ms, {times}")

    def write(self, config: Any) -> list[str]:
        """preflight.json, bad_nodes, and lines for the log. Returns the nodes to run on."""
        course = self.course
        came = [node for node in course.hosts if set(course.ranks([node])) <= self.found.keys()]
        fit = [node for node in came if not self.troubles[node]]
        use, note = ([], "") if self.hopeless else nodes_to_use(config, fit, course)
        self.notes += [note] if note else []
        rows = [
            {
                "node": node,
                "matmul_ms": _ms(self.product_s.get(node)),
                "all_reduce_ms": _ms(self.all_reduce_s.get(node)),
                "disk_gb": first.disk_gb if (first := self.found.get(course.ranks([node])[0])) else None,
                "troubles": self.troubles[node],
            }
            for node in course.hosts
        ]
        same = next((one.same for _, one in sorted(self.found.items()) if one.same), {})
        seconds = time.monotonic() - course.began
        whole = {"seconds": round(seconds, 1), "nodes": rows, "use": use, "note": "; ".join(self.notes), "same": same}
        told = {node: self.troubles[node] for node in course.hosts if self.troubles[node]}
        # a node that was only late may owe it to a busy file system: it is left out once that has happened twice
        late = {node for node, troubles in told.items() if all(ABSENT in trouble for trouble in troubles)}
        first_time = late - nodes_in(course.notes / LATE_NODES).keys()
        for name, nodes in ((BAD_NODES, told.keys() - first_time), (LATE_NODES, late)):
            note_nodes(course.notes / name, {node: "; ".join(why) for node, why in told.items() if node in nodes})
        write_json(course.notes / REPORT, whole)  # last: the job takes it as the word that all is noted
        print(
            f"preflight of {len(course.hosts)} nodes x {course.per_node} ranks in {seconds:.1f} s: "
            f"config {same.get('config')}, commit {same.get('commit')}"
        )
        for row in rows:
            ms = f"product {row['matmul_ms']} ms, all-reduce {row['all_reduce_ms']} ms"
            print(f"  {row['node']}: {'; '.join(row['troubles']) or 'fit'} ({ms}, {row['disk_gb']} GB of disk free)")
        for note in self.notes:
            print(f"  {note}")
        sys.stdout.flush()
        return use


def _alike(trouble: str) -> str:
    return re.sub(r"\d+", "#", trouble)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def nodes_to_use(config: Any, fit: Sequence[str], course: Course) -> tuple[list[str], str]:
    """As many of the fit nodes as the global batch can be split over, and a note where that is not all of them.

    $SCLDM_MIN_NODES is the fewest to run on. Without it all that Slurm gave must be fit.
    """
    least = int(os.environ.get("SCLDM_MIN_NODES") or 0)
    if len(fit) < (least or len(course.hosts)):
        return [], f"{len(fit)} nodes are fit, {least or len(course.hosts)} are needed"
    if not hasattr(config, "train"):
        return list(fit), ""
    cells, micro = config.train.global_batch, config.hardware.micro_batch
    usable = [n for n in usable_counts(cells, micro, course.per_node, len(fit)) if n >= least]
    what = f"train.global_batch={cells} with hardware.micro_batch={micro} can't be split over"
    if not usable:
        span = f"{least or 1} to {len(fit)}" if (least or 1) < len(fit) else str(len(fit))
        return [], f"{what} {span} nodes of {course.per_node} ranks"
    note = f"{what} {len(fit)} nodes of {course.per_node} ranks. It runs on {usable[-1]}"
    return list(fit[: usable[-1]]), "" if usable[-1] == len(fit) else note
