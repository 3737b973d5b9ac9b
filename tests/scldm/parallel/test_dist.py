"""A process's place among the ranks, as its environment has it."""

from __future__ import annotations

import os

import pytest

from scldm.parallel.dist import close_world, world_of_environment

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
