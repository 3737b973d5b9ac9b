"""Which process this is among how many, and the few collectives that training needs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# torch's variable, of every group of gloo: ranks connect when they first exchange something, which few pairs do. By
# default each of N ranks has N - 1 connections in every group
LAZY = "TORCH_GLOO_LAZY_INIT"
LOOPBACK = "127.0.0.1"  # where nobody but this host comes


@dataclass(frozen=True)
class World:
    """One process per accelerator (or per CPU share).

    rank, size: this process among all
    device: where its part of the model lives
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self, timeout_s: float = 1_800) -> None:
        """Meet the other ranks, where that was not done yet: gloo for what lies on CPUs, NCCL for what is on GPUs."""
        if self.size > 1 and not dist.is_initialized():
            os.environ.setdefault(LAZY, "1")
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=timeout_s),
                store=self._own_store(timeout_s),
                rank=self.rank,
                world_size=self.size,
            )
            # whoever connects asks the launcher's store, which the first rank may hold: not once that one has ended
            self.begin_max([0])()
            self.gather(None)
            self.barrier()

    def _own_store(self, timeout_s: float) -> dist.TCPStore | None:
        """The launcher's store, where all ranks are on this host and no agent of torchrun has it. None leaves it to
        torch."""
        address = os.environ.get("MASTER_ADDR")
        if address != LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return None
        return open_store(address, int(os.environ["MASTER_PORT"]), self.is_first, timeout_s, self.size)

    def alone(self) -> None:
        """A group of this process, for an engine that needs one. No store of it listens."""
        if self.size == 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """The sum over ranks of each value, in float64. All ranks give the same names and get the same sums."""
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def begin_max(self, values: list[int]) -> Callable[[], list[int]]:
        """Begin to find the largest over ranks of each value. Call what is returned to wait for them.

        It goes over gloo, on the CPU, while the caller does other work: no GPU waits for it, or it for a GPU.
        """
        largest = torch.tensor(values)
        under_way = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True) if self.size > 1 else None

        def wait() -> list[int]:
            if under_way is not None:
                under_way.wait()
            return largest.tolist()

        return wait

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """The first rank's value, on every rank. What others give is not looked at."""
        values = [value if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def address_from_environment() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this host), as torchrun or srun set them. (0, 1, 0) under neither.

    A shell inside an allocation has SLURM_NTASKS too, and nobody starts its other tasks: srun alone sets
    SLURM_STEP_NUM_TASKS, which counts the processes that it did start.
    """
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if all(name in os.environ for name in (rank, size, local)):
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ[local])
    if (n := int(os.environ.get("SLURM_NTASKS") or 1)) > 1:
        print(f"scldm: one process, though {n} tasks are allotted: srun before the command starts all", file=sys.stderr)
    return 0, 1, 0


_ours = set[str]()  # the variables that were not set for this process but by it


def world_of_environment() -> World:
    """This process's place, before anything is initialised. Sets the rendezvous that a lone process lacks."""
    rank, size, local = address_from_environment()
    if torch.cuda.is_available():
        index = local % torch.cuda.device_count()  # Slurm may show a task its own GPU alone
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    else:
        device = torch.device("cpu")
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)}
    if size == 1:
        place |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
    elif "MASTER_ADDR" not in os.environ and "SLURM_JOB_NODELIST" in os.environ:
        # jobs that share a node must not share a port. These lie below Linux's ephemeral ports, from 32,768 on
        port = 12_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
        step = [os.environ.get(f"SLURM_STEP_NUM_{of}") for of in ("NODES", "TASKS")]
        on_one_node = step == ["1", str(size)]  # of many such steps, each is not all
        address = LOOPBACK if on_one_node else _first_host(os.environ["SLURM_JOB_NODELIST"])
        place |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    missing = place.keys() - os.environ.keys()
    os.environ.update({name: place[name] for name in missing})
    _ours.update(missing)
    return World(rank, size, device)


def open_store(address: str, port: int, serves: bool, timeout_s: float, size: int | None = None) -> dist.TCPStore:
    """A connection to torch's store at this address. With `serves`, the store too.

    At the address LOOPBACK it listens on that interface alone. At others it listens on all, as torch does: by which one
    other hosts come is known only when they have met, and they meet in this store.

    size: ranks to wait for. None waits for nobody

    Raises: RuntimeError for a port that is taken, and for a store that can't be reached.
    """
    listening = None
    if serves and address == LOOPBACK:
        try:
            listening = socket.create_server((address, port)).detach()  # the store closes it
        except OSError as error:
            raise RuntimeError(f"{address}:{port}: {error.strerror}") from error
    return dist.TCPStore(
        address,
        port,
        size,
        serves,
        timedelta(seconds=timeout_s),
        wait_for_workers=size is not None,
        master_listen_fd=listening,
    )


def wait_at_most(timeout: timedelta) -> None:
    """Within every group of ranks that there is by now. DeepSpeed makes its own with torch's defaults, whatever it is
    told: 10 minutes with NCCL, which would give up before a hang is found, and 30 with gloo."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _first_host(nodelist: str) -> str:
    """The first of Slurm's compressed list of hosts, as `gpu[03-07,9]`."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


def close_world() -> None:
    """End it. No place is left behind: the ranks of a job that this process submits next would take it for theirs."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _ours:
        os.environ.pop(_ours.pop(), None)
