"""Before a job trains: is every node up, alike, healthy, and as fast as the others? One task per GPU runs it, by srun.

Every rank writes its findings to a store that the first rank serves, so that a rank that never comes up, or hangs in a
collective operation, is named and not waited for. The first rank judges: it writes preflight.json to the job's notes,
adds the nodes that are not fit to bad_nodes, and to use_nodes those to run on: of the fit ones as many as the global
batch can be split over.

Reading order: main, the findings of a rank, the timings, the judgement.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from launch.cli import VERBS, find_verb
from launch.config import compose
from scldm.environment import describe
from scldm.errors import InputError
from scldm.parallel.dist import address_from_environment
from scldm.train.run_folder import write_json

LIMIT_S = 55.0  # of the whole of it
JOIN_S = 35.0  # a rank that has not come up by then is missing
SEEN_S = 5.0  # in which a file written on one node is visible on another
SLOW = 2.0  # times the median of the nodes
MATMUL_S, MATMUL_ROUNDS = 0.15, 3
LEAST_DISK = 1 << 30  # bytes free on a node's own disk

Findings = dict[str, Any]
Troubles = dict[str, list[str]]  # node -> what is wrong with it


def main(words: Sequence[str]) -> int:
    """One rank of the preflight of a verb's command line. Returns its exit code: 2 for words that the verb refuses."""
    began = time.monotonic()
    rank, size, local = address_from_environment()
    hosts = os.environ["SCLDM_HOSTS"].split()
    per_node = size // len(hosts)
    notes = Path(os.environ["SCLDM_NOTES"])
    threading.Thread(target=_end_at, args=(began + LIMIT_S, hosts[rank // per_node]), daemon=True).start()
    try:
        verb, rest = find_verb(list(words))
        assert verb is not None
        config = compose(importlib.import_module(VERBS[verb][0]).CONFIG, rest)
    except InputError as error:
        if rank == 0:
            print(f"scldm {' '.join(words[:2])}: error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        write_token(notes, "first")
    store = open_store(rank == 0)
    findings = findings_of(config, notes, hosts[rank // per_node], local)
    store.set(f"findings/{rank}", json.dumps(findings))
    if rank:
        return _take_part(store, rank, per_node, hosts)

    found = collect(store, "findings", size, began + JOIN_S)
    troubles = judge_findings(found, hosts, per_node, notes)
    timings: dict[int, Findings] = {}
    store.set("go", "yes" if len(found) == size else "no")
    if len(found) == size:
        threading.Thread(target=_take_part, args=(open_store(False), rank, per_node, hosts), daemon=True).start()
        timings = collect(store, "timings", size, began + LIMIT_S - 5)
        for node, reasons in judge_timings(timings, hosts, per_node).items():
            troubles[node] += reasons
    use, note = nodes_to_use(config, [host for host in hosts if not troubles[host]], per_node)
    write_report(notes, hosts, per_node, found, timings, troubles, use, note, time.monotonic() - began)
    return 0 if use else 1


def open_store(serves: bool) -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, None, serves, timedelta(seconds=LIMIT_S), wait_for_workers=False)


def collect(store: dist.TCPStore, what: str, size: int, until: float) -> dict[int, Findings]:
    """What the ranks wrote, by rank; those that wrote nothing by then are missing."""
    found: dict[int, Findings] = {}
    while True:
        for rank in range(size):
            if rank not in found and store.check([f"{what}/{rank}"]):
                found[rank] = json.loads(store.get(f"{what}/{rank}"))
        if len(found) == size or time.monotonic() > until:
            return found
        time.sleep(0.05)


def _take_part(store: dist.TCPStore, rank: int, per_node: int, hosts: Sequence[str]) -> int:
    """Wait for the first rank's word, then time; returns the exit code."""
    if store.get("go") == b"yes":
        store.set(f"timings/{rank}", json.dumps(timings_of(store, rank, per_node, len(hosts))))
    return 0


def _end_at(deadline: float, node: str) -> None:
    """A rank that hangs does not keep the job."""
    time.sleep(max(0.0, deadline - time.monotonic()))
    print(f"preflight: a rank on {node} did not finish within {LIMIT_S:.0f} s", file=sys.stderr, flush=True)
    os._exit(3)


# --- the findings of a rank -----------------------------------------------------------------------------------------


def findings_of(config: Any, notes: Path, node: str, local: int) -> Findings:
    """What one rank sees: its GPU, and as the first of its node versions, folders and disk too."""
    if local:
        return {"same": {}, "troubles": gpu_troubles(local)}
    here = describe()
    config_json = json.dumps(asdict(config), sort_keys=True, default=str)
    troubles = gpu_troubles(local) + folder_troubles(config, notes, node)
    scratch = os.environ.get("SCLDM_SCRATCH") or os.environ.get("TMPDIR") or "/tmp"
    return {
        "same": {
            "python": here["python"],
            "commit": here["git"],
            "config": hashlib.sha256(config_json.encode()).hexdigest()[:12],
            **here["versions"],
        },
        "troubles": troubles,
        "disk_gb": round(shutil.disk_usage(scratch).free / 1e9, 1) if os.path.isdir(scratch) else 0.0,
    }


def gpu_troubles(local: int) -> list[str]:
    """What is wrong with this rank's GPU, where the site says that nodes have some."""
    expected = int(os.environ.get("SCLDM_GPUS_PER_NODE") or 0)
    if not expected:
        return []
    try:
        if torch.cuda.device_count() < 1 or (local == 0 and 1 < torch.cuda.device_count() < expected):
            return [f"{torch.cuda.device_count()} GPUs are there, not {expected}"]
        index = local % torch.cuda.device_count()
        # products of small integers are exact at any precision: a wrong one is the GPU's fault
        a, b = (torch.arange(1 << 20).reshape(1024, 1024) * k % 5 - 2 for k in (3, 7))
        product = (a.to(f"cuda:{index}", torch.float32) @ b.to(f"cuda:{index}", torch.float32)).cpu()
        if not torch.equal(product, a.float() @ b.float()):
            return [f"GPU {index} computes a wrong product"]
    except RuntimeError as error:
        return [f"its GPU of rank {local}: {' '.join(str(error).split())[:200]}"]
    return memory_errors(local)


def memory_errors(local: int) -> list[str]:
    """Uncorrected memory errors since the driver was loaded, where nvidia-smi tells; the node's first rank asks."""
    if local or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi gives no answer"]
    rows = [line.split(",") for line in done.stdout.splitlines()]
    bad = [(row[0].strip(), row[1].strip()) for row in rows if len(row) == 2]
    return [f"GPU {index}: {n} uncorrected memory errors" for index, n in bad if n.isdigit() and int(n)]


def folder_troubles(config: Any, notes: Path, node: str) -> list[str]:
    """The run's folder and its data must be there; the node's own disk must have room for what is staged."""
    found = []
    try:
        write_token(notes, node)
        if not see_token(notes, "first", SEEN_S):
            found.append(f"{notes}: what the first node writes there is not seen here")
    except OSError as error:
        found.append(f"{notes} can't be written: {error.strerror}")
    shards = getattr(getattr(config, "data", None), "shards", "") or getattr(config, "shards", "")
    manifest = Path(shards) / "manifest.json"
    staged = os.environ.get("SCLDM_STAGE") == "on"
    need = LEAST_DISK if staged else 0
    if shards and "://" not in shards:
        if not manifest.is_file():
            return [*found, f"{shards}: no shard set is seen here"]
        need += sum(shard["bytes"] for shard in json.loads(manifest.read_text())["shards"]) if staged else 0
    scratch = os.environ.get("SCLDM_SCRATCH") or ""
    if scratch:
        try:
            os.makedirs(scratch, exist_ok=True)
            free = shutil.disk_usage(scratch).free
        except OSError as error:
            return [*found, f"{scratch} can't be used: {error.strerror}"]
        if not os.access(scratch, os.W_OK):
            found.append(f"{scratch} can't be written")
        elif free < need:
            found.append(f"{scratch}: {free / 1e9:.1f} GB are free, {need / 1e9:.1f} GB are needed")
    return found


def token() -> str:
    return (
        f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT', 0)}.{os.environ.get('SLURM_STEP_ID')}"
    )


def write_token(notes: Path, name: str) -> None:
    (notes / "preflight").mkdir(parents=True, exist_ok=True)
    (notes / "preflight" / name).write_text(token())


def see_token(notes: Path, name: str, within_s: float) -> bool:
    """A network file system may show a new file a moment later."""
    until = time.monotonic() + within_s
    while True:
        try:
            if (notes / "preflight" / name).read_text() == token():
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


# --- the timings ----------------------------------------------------------------------------------------------------


def timings_of(store: dist.TCPStore, rank: int, per_node: int, n_nodes: int) -> Findings:
    """Seconds of a matrix product, and of an all-reduce between this node and each of its neighbours; collective.

    Neighbours are paired in a ring, so that of three nodes or more a slow one is slow in both of its pairs, and every
    other one has at least one pair without it.
    """
    on_gpu = torch.cuda.is_available() and int(os.environ.get("SCLDM_GPUS_PER_NODE") or 0) > 0
    device = torch.device("cuda", rank % per_node % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    found: Findings = {"matmul_s": time_matmul(device), "all_reduce_s": {}}
    limit = timedelta(seconds=15)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=per_node * n_nodes, timeout=limit
    )
    pairs = [(k, (k + 1) % n_nodes) for k in range(n_nodes if n_nodes > 2 else n_nodes - 1)] or [(0, 0)]
    groups = [dist.new_group(sorted({n * per_node + k for n in pair for k in range(per_node)})) for pair in pairs]
    for first in (0, 1):  # every other pair at a time
        for number in range(first, len(pairs), 2):
            if rank // per_node in pairs[number]:
                found["all_reduce_s"][str(number)] = time_all_reduce(device, groups[number])
        dist.barrier()
    dist.destroy_process_group()
    return found


def time_matmul(device: torch.device) -> float:
    """Seconds of one product, the best round's mean; square, bf16 of 8,192 on a GPU, fp32 of 384 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(MATMUL_ROUNDS):
        _wait_for(a @ a)
        began, n_done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < MATMUL_S or not n_done:
            _wait_for(a @ a)
            n_done += 1
        best = min(best, elapsed / n_done)
    return best


def time_all_reduce(device: torch.device, group: Any) -> float:
    """Seconds of an all-reduce, the best of a few: of 64 MiB on GPUs, 1 MiB on CPUs."""
    values = torch.ones(1 << (24 if device.type == "cuda" else 18), device=device)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        _wait_for(values)
        best = min(best, time.perf_counter() - began)
    return best


def _wait_for(value: torch.Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize(value.device)


# --- the judgement --------------------------------------------------------------------------------------------------


def judge_findings(found: Mapping[int, Findings], hosts: Sequence[str], per_node: int, notes: Path) -> Troubles:
    """What the findings of the ranks say against nodes."""
    troubles: Troubles = defaultdict(list)
    for rank in range(len(hosts) * per_node):
        if rank not in found:
            troubles[hosts[rank // per_node]].append(f"rank {rank} did not come up")
        else:
            troubles[hosts[rank // per_node]] += found[rank]["troubles"]
    for what in sorted({key for one in found.values() for key in one["same"]}):
        values = {rank: one["same"].get(what) for rank, one in found.items() if one["same"]}
        (usual, _), *_ = Counter(values.values()).most_common()  # of equally many, the one that the first rank has
        for rank, value in values.items():
            if value != usual:
                troubles[hosts[rank // per_node]].append(
                    f"{what} is {value or 'missing'}, on other nodes {usual or 'missing'}"
                )
    until = time.monotonic() + SEEN_S
    for node in hosts:
        if not troubles[node] and not see_token(notes, node, until - time.monotonic()):
            troubles[node].append(f"{notes}: what it writes there is not seen on the first node")
        troubles[node] = list(dict.fromkeys(troubles[node]))
    return troubles


def judge_timings(timings: Mapping[int, Findings], hosts: Sequence[str], per_node: int) -> Troubles:
    """Nodes that are slow beside the median of all, or did not finish. Of one or two nodes none can be called slow."""
    troubles: Troubles = defaultdict(list)
    for rank in range(len(hosts) * per_node):
        if rank not in timings and not troubles[hosts[rank // per_node]]:
            troubles[hosts[rank // per_node]].append(f"rank {rank} hung in an all-reduce with a neighbour")
    for what, of_node in figures(timings, hosts, per_node).items():
        usual = median(of_node.values()) if len(of_node) > 2 else float("inf")
        for node, seconds in of_node.items():
            if seconds > SLOW * usual:
                times = f"{seconds / usual:.1f} times the median of the nodes"
                troubles[node].append(f"slow: {what} takes {seconds * 1e3:.2f} ms, {times}")
    return troubles


def figures(timings: Mapping[int, Findings], hosts: Sequence[str], per_node: int) -> dict[str, dict[str, float]]:
    """Seconds of each operation by node: of the product its slowest rank's, of the all-reduce its faster pair's."""
    of_node: dict[str, list[Findings]] = defaultdict(list)
    for rank, one in timings.items():
        of_node[hosts[rank // per_node]].append(one)
    product = {node: max(one["matmul_s"] for one in ranks) for node, ranks in of_node.items()}
    reduce = {
        node: min(max(one["all_reduce_s"][pair] for one in ranks) for pair in ranks[0]["all_reduce_s"])
        for node, ranks in of_node.items()
    }
    return {"a matrix product": product, "an all-reduce": reduce}


def nodes_to_use(config: Any, fit: Sequence[str], per_node: int) -> tuple[list[str], str]:
    """As many of the fit nodes as the global batch can be split over, and a note where that is not all of them."""
    least = int(os.environ.get("SCLDM_MIN_NODES") or len(os.environ["SCLDM_HOSTS"].split()))
    if len(fit) < least:
        return [], f"{len(fit)} nodes are fit, {least} are needed"
    if not hasattr(config, "train"):
        return list(fit), ""
    cells, micro = config.train.global_batch, config.hardware.micro_batch
    usable = [n for n in range(1, len(fit) + 1) if cells % (n * per_node * micro) == 0]
    if not usable:
        return [], (
            f"train.global_batch={cells} can't be split over {len(fit)} nodes or fewer of {per_node} ranks with "
            f"hardware.micro_batch={micro}"
        )
    n = usable[-1]
    note = f"train.global_batch={cells} with hardware.micro_batch={micro} can't be split over {len(fit)} nodes of "
    return list(fit[:n]), "" if n == len(fit) else f"{note}{per_node} ranks; running on {n}"


def write_report(
    notes: Path,
    hosts: Sequence[str],
    per_node: int,
    found: Mapping[int, Findings],
    timings: Mapping[int, Findings],
    troubles: Troubles,
    use: Sequence[str],
    note: str,
    seconds: float,
) -> None:
    """preflight.json, bad_nodes, use_nodes, and lines for the log."""
    of_node = figures(timings, hosts, per_node)
    rows = [
        {
            "node": host,
            "matmul_ms": round(of_node["a matrix product"].get(host, 0) * 1e3, 3) or None,
            "all_reduce_ms": round(of_node["an all-reduce"].get(host, 0) * 1e3, 3) or None,
            "disk_gb": found.get(k * per_node, {}).get("disk_gb"),
            "troubles": troubles[host],
        }
        for k, host in enumerate(hosts)
    ]
    same = found[0]["same"]
    write_json(
        notes / "preflight.json", {"seconds": round(seconds, 1), "nodes": rows, "use": use, "note": note, "same": same}
    )
    with (notes / "bad_nodes").open("a") as file:
        for host in hosts:
            if troubles[host]:
                file.write(f"{host}\t{time.strftime('%Y-%m-%d %H:%M:%S')}\t{'; '.join(troubles[host])}\n")
    (notes / "use_nodes.partial").write_text("".join(f"{host}\n" for host in use))
    os.replace(notes / "use_nodes.partial", notes / "use_nodes")
    print(
        f"preflight of {len(hosts)} nodes x {per_node} ranks in {seconds:.1f} s; "
        f"config {same['config']}, commit {same['commit']}"
    )
    for row in rows:
        cells = f"product {row['matmul_ms']} ms, all-reduce {row['all_reduce_ms']} ms, {row['disk_gb']} GB of disk free"
        print(f"  {row['node']}: {'; '.join(row['troubles']) or 'fit'} ({cells})")
    if note:
        print(f"  {note}")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait within a collective operation
