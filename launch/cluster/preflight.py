"""Before a job trains: is every node up, alike, healthy, and as fast as the others? One task per GPU runs it, by srun.

The first rank serves a store, judges, and leads from stage to stage. Every rank takes part, the first in a thread:

    findings        versions, GPU, folders, disk (node_checks.py)
    product         a matrix product, on the nodes that came up with a GPU that works
    pair            an all-reduce between neighbours in a ring of the nodes that nothing was found against by then

Each rank writes the result of each stage as soon as it has it, and before it what it does next. It also sends a
heartbeat. So a rank that never came up, failed, died or hangs is named with what it was doing, and no other is blamed
with it. The first rank adds the nodes that are unfit to bad_nodes in the job's notes. It writes preflight.json there
with those to run on: as many fit ones as the global batch can be split over.

Reading order: main, lead, take_part. What a rank finds is in node_checks.py, what follows from it in node_judgement.py.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.cli import config_of, find_verb
from launch.cluster.node_checks import Findings, device_of, findings_of, time_all_reduce, time_matmul
from launch.cluster.node_judgement import ABSENT, Course, Outcomes, Report
from launch.cluster.notes import leave_word
from launch.verbs import VERBS
from scldm.errors import InputError, json_of
from scldm.given_json import Kind, typed
from scldm.parallel.dist import address_from_environment, open_store

JOIN = 0.5  # of the time that there is: a rank that has not given its findings by then is missing
PRODUCT_S = 6.0
PAIR_S, LEAST_PAIR_S = 12.0, 6.0  # a round of pairs. One that has less time left is not begun
BEAT_S = 0.5


def limit_s() -> float:
    """Seconds for the whole of it."""
    return float(os.environ["SCLDM_PREFLIGHT_S"])


def main(words: Sequence[str]) -> int:
    """One rank of the preflight of a verb's command line. Returns its exit code."""
    rank, size, local = address_from_environment()
    hosts = os.environ["SCLDM_HOSTS"].split()
    course = Course(hosts, size // len(hosts), Path(os.environ["SCLDM_NOTES"]), time.monotonic())
    threading.Thread(target=_end_at, args=(course.began + limit_s(), course.node(rank)), daemon=True).start()
    try:
        verb, rest = find_verb(words)
        assert verb is not None  # the job has read these words
        config = config_of(importlib.import_module(VERBS[verb][0]), rest)
    except Exception as error:  # of this node's code alone, or of all: told as what the rank found
        config = error
    if rank:
        return take_part(course, config, rank, local)
    try:
        store = store_of_job(serves=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        report, port = Report(course), f"port {os.environ['MASTER_PORT']} of {course.hosts[0]}"
        report.blame_the_job(f"{port} can't be served. Where another program has it, submit again ({why})")
        report.write(config)
        return 1
    threading.Thread(target=take_part, args=(course, config, rank, local), daemon=True).start()
    return lead(course, config, store)


def store_of_job(serves: bool = False) -> dist.TCPStore:
    """A connection of its own: one that waits for a word holds up all that share it."""
    limit = limit_s() - 5  # one that can't reach the first must still leave word of it
    return open_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), serves, limit)


def read_word(store: dist.TCPStore, key: str, kind: type[Kind], who: str) -> Kind:
    """What the store has at a key, once it is there. Raises: InputError with the key and who gave it, for no `kind`."""
    where = f"preflight: {key} of {who}"
    return typed(kind, json_of(store.get(key), where), where)


def rounds_of(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs of neighbours in a ring, in rounds in which no node has two of them.

    Of three nodes or more a slow or hung one is that in both of its pairs, and every other one has a pair without it.
    """
    if len(nodes) < 2:
        return [[(node, node)] for node in nodes]
    pairs = list(zip(nodes, [*nodes[1:], nodes[0]]))[: len(nodes) if len(nodes) > 2 else 1]
    odd = pairs.pop() if len(pairs) > 2 and len(pairs) % 2 else None
    return [found for found in (pairs[::2], pairs[1::2], [odd] if odd else []) if found]


# --- the first rank -------------------------------------------------------------------------------------------------


def lead(course: Course, config: Any, store: dist.TCPStore) -> int:
    """The first rank's part: the word for each stage, the judgement, the report. Returns the exit code."""
    report = Report(course)
    everyone = course.ranks(course.hosts)
    found, missing = collect(store, "findings", Findings, everyone, course.began + JOIN * limit_s())
    report.failures(missing, everyone)
    report.findings(found)

    computing = [node for node in course.hosts if all(r in found and not found[r].gpu for r in course.ranks([node]))]
    store.set("product", json.dumps(computing))
    products, missing = collect(store, "product", float, course.ranks(computing), time.monotonic() + PRODUCT_S)
    report.failures(missing, course.ranks(computing))
    report.products(products)

    ring = [node for node in course.hosts if node in computing and not report.troubles[node]]
    store.set("ring", json.dumps(ring))
    outcomes: Outcomes = {}
    rounds = rounds_of(ring)
    for number, pairs in enumerate(rounds):
        left = (course.began + limit_s() - 4 - time.monotonic()) / (len(rounds) - number)
        if left < LEAST_PAIR_S:
            report.notes.append("no time was left for all of the all-reduces")
            break
        limit = min(left, PAIR_S)
        store.set(f"round/{number}", json.dumps(limit))
        ranks = course.ranks(node for pair in pairs for node in pair)
        reduced, missing = collect(store, f"pair/{number}", float, ranks, time.monotonic() + limit + 2 * BEAT_S)
        for pair in pairs:
            of_pair = {*course.ranks(pair)}
            done = {rank: seconds for rank, seconds in reduced.items() if rank in of_pair}
            outcomes[pair] = done, {rank: words for rank, words in missing.items() if rank in of_pair}
    report.pairs(outcomes)
    report.hopeless |= isinstance(config, Exception)  # on how many nodes it could run is not known
    use = report.write(config)
    return 0 if use else 1


def collect(
    store: dist.TCPStore, what: str, kind: type[Kind], ranks: Sequence[int], until: float
) -> tuple[dict[int, Kind], dict[int, str]]:
    """What these ranks came to, by rank. Of those without a result, what became of them, in words."""
    found, missing = dict[int, Kind](), dict[int, str]()
    while True:
        late = time.monotonic() > until  # before a last look: this process, too, may have stood still until now
        for rank in ranks:
            if rank not in found and rank not in missing and store.check([f"{what}/{rank}"]):
                try:
                    told = read_word(store, f"{what}/{rank}", dict[str, Any], f"rank {rank}")
                    if "failed" in told:
                        missing[rank] = typed(str, told["failed"], f"preflight: {what}/{rank}: failed")
                    else:
                        found[rank] = typed(kind, told.get("is"), f"preflight: {what}/{rank}")
                except InputError as error:
                    missing[rank] = f"gave what is no result: {error}"
        if late or len(found) + len(missing) == len(ranks):
            break
        time.sleep(0.05)
    return found, missing | silent(store, [rank for rank in ranks if rank not in found and rank not in missing])


def silent(store: dist.TCPStore, ranks: Sequence[int]) -> dict[int, str]:
    """What became of ranks that gave no word: whether they came up, what they do, whether their heart beats."""
    came = [rank for rank in ranks if store.check([f"at/{rank}"])]
    before = {rank: store.add(f"beats/{rank}", 0) for rank in came}
    if came:
        time.sleep(4 * BEAT_S)
    words = dict.fromkeys(ranks, ABSENT)
    for rank in came:
        at = store.get(f"at/{rank}").decode(errors="replace")
        alive = store.add(f"beats/{rank}", 0) > before[rank]
        words[rank] = f"hangs: it {at}" if alive else f"died or froze: it {at}"
    return words


# --- every rank -----------------------------------------------------------------------------------------------------


def take_part(course: Course, config: Any, rank: int, local: int) -> int:
    """What every rank does, at the first one's word. Returns the exit code.

    config: the verb's, or what was raised instead
    """
    node, first = course.node(rank), f"the first rank, on {course.hosts[0]}"
    try:
        store = store_of_job()
    except RuntimeError:
        return _first_is_gone(course, rank)

    def tell(doing: str) -> None:
        store.set(f"at/{rank}", doing)

    def look() -> Findings:
        if isinstance(config, Exception):
            raise config
        return findings_of(config, course.notes, node, local, tell)

    def give(key: str, result: Callable[[], Any], within_s: float | None = None) -> None:
        """Tell what a function returns, or raises. One that does not return in time stays behind in its thread."""

        def tell_result() -> None:
            try:
                is_ = result()
                told = {"is": asdict(is_) if isinstance(is_, Findings) else is_}
            except Exception as error:
                told = {"failed": " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]}
            store.set(f"{key}/{rank}", json.dumps(told))

        under_way = threading.Thread(target=tell_result, daemon=True)
        under_way.start()
        under_way.join(within_s)

    tell("begins")
    if local == 0:
        with suppress(OSError):  # that it can't write there is one of the findings
            leave_word(course.notes, node)
    done = threading.Event()
    threading.Thread(target=_beat, args=(course, rank, done), daemon=True).start()
    give("findings", look)
    try:
        if node in read_word(store, "product", list[str], first):
            tell("computes a matrix product")
            give("product", lambda: time_matmul(device_of(local)))
        ring = read_word(store, "ring", list[str], first)
        for number, pairs in enumerate(rounds_of(ring) if node in ring else []):
            for pair in [pair for pair in pairs if node in pair]:
                seconds = read_word(store, f"round/{number}", float, first)
                tell(f"takes part in an all-reduce of {' and '.join(dict.fromkeys(pair))}")
                give(f"pair/{number}", partial(reduce, course, number, pair, rank, local), min(seconds, PAIR_S))
    except InputError as error:
        print(f"preflight: rank {rank} on {node} ends: {error}", flush=True)
        return 3
    finally:
        done.set()
    return 0


def reduce(course: Course, number: int, pair: tuple[str, str], rank: int, local: int) -> float:
    ranks = course.ranks(pair)
    store = dist.PrefixStore(f"all-reduce/{number}/{pair[0]}", store_of_job())
    return time_all_reduce(device_of(local), store, ranks.index(rank), len(ranks))


def _beat(course: Course, rank: int, done: threading.Event) -> None:
    """Send heartbeats. End this process where the first rank is gone."""
    try:
        store = store_of_job()
        while True:
            store.add(f"beats/{rank}", 1)
            time.sleep(BEAT_S)
    except RuntimeError:
        if rank and not done.is_set():
            os._exit(_first_is_gone(course, rank))


def _first_is_gone(course: Course, rank: int) -> int:
    """Leave word that this node came up: the first one is to blame, as the job's steps then conclude."""
    leave_word(course.notes, course.node(rank))
    end = f"ends: the first one, on {course.hosts[0]}, has ended or can't be reached"
    print(f"preflight: rank {rank} on {course.node(rank)} {end}", flush=True)
    return 3


def _end_at(deadline: float, node: str) -> None:
    """A rank that hangs does not keep the job."""
    time.sleep(max(0.0, deadline - time.monotonic()))
    print(f"preflight: a rank on {node} did not finish within {limit_s():.0f} s", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait within a collective operation
