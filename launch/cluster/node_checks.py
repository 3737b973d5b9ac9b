"""What one rank of the preflight finds on its node: versions, GPU, folders and disk, and how fast it computes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.cluster.notes import leave_word
from launch.cluster.site import gpus_of_node
from scldm.environment import describe
from scldm.errors import InputError
from scldm.given_json import Count, known_of, read_known

MATMUL_S, MATMUL_ROUNDS = 0.15, 3
LEAST_DISK = 1 << 30  # bytes free on a node's own disk


@dataclass(frozen=True)
class Findings:
    """What one rank found.

    gpu: troubles of this rank's GPU, for which the site's settings may be the reason
    broken: those that no setting makes
    same: what must be the same on all nodes. Of a node's first rank alone, as the next two
    folders: what is wrong with folders and disk. None of other ranks
    disk_gb: what is free of the node's own disk
    """

    gpu: list[str]
    broken: list[str]
    same: dict[str, str | None] = field(default_factory=dict)
    folders: list[str] | None = None
    disk_gb: float | None = None


def findings_of(config: Any, notes: Path, node: str, local: int, tell: Callable[[str], None]) -> Findings:
    """What one rank sees: its GPU, and as the first of its node versions, folders and disk too.

    `tell` is called with what it looks at next.
    """
    tell("looks at its GPU")
    gpu, broken = gpu_troubles(local)
    if local:
        return Findings(gpu, broken)
    tell("looks at its versions")
    here = describe()
    config_json = json.dumps(asdict(config), sort_keys=True, default=str)
    tell("looks at its folders")
    folders = folder_troubles(config, notes, node)
    config_hash = hashlib.sha256(config_json.encode()).hexdigest()[:12]
    same = {"python": here["python"], "commit": here["git"], "config": config_hash, **here["versions"]}
    free_gb = round(shutil.disk_usage(own_disk()).free / 1e9, 1) if os.path.isdir(own_disk()) else 0.0
    return Findings(gpu, broken, same, folders, free_gb)


def gpu_troubles(local: int) -> tuple[list[str], list[str]]:
    """What is wrong with this rank's GPU, where the site says that nodes have some: what a setting may be the reason
    of, and what is broken."""
    expected = gpus_of_node(os.environ)[1]
    if not expected:
        return [], []
    try:
        n_seen = torch.cuda.device_count()  # Slurm may show each rank its own alone
        if n_seen < 1 or 1 < n_seen < expected:
            return [f"{n_seen} GPUs are there, not {expected}"], []
        index = local % torch.cuda.device_count()
        # products of small integers are exact at any precision: a wrong one is the GPU's fault
        a, b = (torch.arange(1 << 20).reshape(1024, 1024) * k % 5 - 2 for k in (3, 7))
        product = (a.to(f"cuda:{index}", torch.float32) @ b.to(f"cuda:{index}", torch.float32)).cpu()
        if not torch.equal(product, a.float() @ b.float()):
            return [], [f"GPU {index} computes a wrong product"]
    except RuntimeError as error:
        return [f"its GPU of rank {local}: {' '.join(str(error).split())[:200]}"], []
    return [], memory_errors(local)


def memory_errors(local: int) -> list[str]:
    """Uncorrected memory errors since the driver was loaded, where nvidia-smi tells. The node's first rank asks."""
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


@dataclass(frozen=True)
class _Set:
    """What is asked here of a set's manifest, which holds more."""

    shards: list[dict[str, Any]]


@dataclass(frozen=True)
class _Shard:
    bytes: Count


def folder_troubles(config: Any, notes: Path, node: str) -> list[str]:
    """The run's folder and its data must be there. The node's own disk must have room, also for what is staged."""
    found = []
    try:
        leave_word(notes, node)
    except OSError as error:
        found.append(f"{notes} can't be written: {error.strerror}")
    shards = getattr(getattr(config, "data", None), "shards", "") or getattr(config, "shards", "")
    manifest = Path(shards) / "manifest.json"
    need = LEAST_DISK
    if shards and "://" not in shards:
        if not manifest.is_file():
            return [*found, f"{shards}: no shard set is seen here"]
        if os.environ.get("SCLDM_STAGE") == "on":
            try:
                need += sum(known_of(_Shard, of, str(manifest)).bytes for of in read_known(_Set, manifest).shards)
            except InputError as error:
                return [*found, str(error)]
    disk = own_disk()
    try:
        os.makedirs(disk, exist_ok=True)
        free = shutil.disk_usage(disk).free
    except OSError as error:
        return [*found, f"{disk} can't be used: {error.strerror}"]
    if not os.access(disk, os.W_OK):
        found.append(f"{disk} can't be written")
    elif free < need:
        found.append(f"{disk}: {free / 1e9:.3g} GB are free, {need / 1e9:.3g} GB are needed")
    return found


def own_disk() -> str:
    """The folder on this node's own disk that a job uses: the site's, else that of temporary files."""
    return os.environ.get("SCLDM_SCRATCH") or tempfile.gettempdir()


# --- the timings ----------------------------------------------------------------------------------------------------


def device_of(local: int) -> torch.device:
    on_gpu = torch.cuda.is_available() and gpus_of_node(os.environ)[1] > 0
    return torch.device("cuda", local % torch.cuda.device_count()) if on_gpu else torch.device("cpu")


def time_matmul(device: torch.device) -> float:
    """Seconds of one product, the best round's mean. It is square: bf16 of 8,192 on a GPU, fp32 of 384 on a CPU."""
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


def time_all_reduce(device: torch.device, store: dist.Store, rank: int, size: int) -> float:
    """Seconds of an all-reduce among `size` ranks, the best of a few: of 64 MiB on GPUs, 1 MiB on CPUs. Collective.

    The group is of these ranks alone, with a store and a stream of its own: one that hangs holds up no other.
    """
    limit = timedelta(seconds=120)  # no rank of the preflight lives so long
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    best = float("inf")
    with torch.cuda.stream(stream):
        values = torch.ones(1 << (18 if stream is None else 24), device=device)
        if stream is None:
            group = dist.ProcessGroupGloo(store, rank, size, limit)
        else:
            torch.cuda.set_device(device)
            group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
        for _ in range(6):
            began = time.perf_counter()
            group.allreduce([values]).wait()  # pyright: ignore[reportAttributeAccessIssue] # torch's stubs lack it
            if stream is not None:
                stream.synchronize()
            best = min(best, time.perf_counter() - began)
    return best


def _wait_for(value: torch.Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize(value.device)
