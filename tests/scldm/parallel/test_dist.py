"""A process's place among the ranks, as its environment has it."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from scldm.parallel import dist as dist_of_ours
from scldm.parallel.dist import (
    LOOPBACK,
    World,
    address_from_environment,
    close_world,
    open_store,
    world_of_environment,
)

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("given", [{}, dict.fromkeys(PLACE[:3], "0") | {"WORLD_SIZE": "1", "MASTER_PORT": "7"}])
def test_a_world_that_was_closed_leaves_the_place_that_was_given_and_no_other(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    world = world_of_environment()
    assert (world.rank, world.size) == (0, 1)
    assert all(name in os.environ for name in PLACE)  # DeepSpeed reads them
    close_world()
    assert {name: os.environ[name] for name in PLACE if name in os.environ} == given


def test_a_store_for_this_host_alone_takes_no_connection_from_elsewhere() -> None:
    """127.0.0.2 is another interface of this host."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    store = open_store(LOOPBACK, port, serves=True, timeout_s=20)
    other = open_store(LOOPBACK, port, serves=False, timeout_s=20)
    other.set("a", "b")
    assert store.get("a") == b"b"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}: Address already in use"):
        open_store(LOOPBACK, port, serves=True, timeout_s=20)


def test_a_group_of_one_needs_no_store_that_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    World(0, 1, torch.device("cpu")).alone()
    try:
        assert dist.get_world_size() == 1
    finally:
        close_world()


@pytest.mark.parametrize(
    "given, address, said",
    [
        # the shell of a batch script after --ntasks=4
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0), "though 4 tasks are allotted"),
        # a step of two of them
        (
            {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
            (1, 2, 1),
            "",
        ),
        # the interactive step of salloc, which is one process
        (
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
            (0, 1, 0),
            "",
        ),
        # torchrun within an allocation
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_NTASKS": "4"}, (1, 2, 1), ""),
    ],
)
def test_only_what_was_started_is_waited_for(given, address, said, monkeypatch, capsys) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert address_from_environment() == address
    told = capsys.readouterr().err
    assert said in told
    assert bool(said) == bool(told)


@pytest.mark.parametrize("nodes, tasks, address", [("1", "2", "127.0.0.1"), ("2", "2", "n1"), ("1", "1", "n1")])
def test_ranks_of_one_node_meet_where_no_other_host_comes(
    monkeypatch: pytest.MonkeyPatch, nodes: str, tasks: str, address: str
) -> None:
    """The last are two steps of one node each, whose ranks are told by other variables."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    for name, value in {**told, "SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_NUM_TASKS": tasks}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_of_ours, "_first_host", lambda _: "n1")
    dist_of_ours.world_of_environment()
    assert os.environ["MASTER_ADDR"] == address
    dist_of_ours.close_world()
