"""A process's place among the ranks, as its environment has it."""

from __future__ import annotations

import os

import pytest

from scldm.parallel.dist import address_from_environment, close_world, world_of_environment

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
