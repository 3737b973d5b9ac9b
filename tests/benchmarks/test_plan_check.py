"""The plan beside measured figures: pairs that belong together, and the arithmetic of a published network."""

from __future__ import annotations

import pytest

from benchmarks import plan_check, vae_step
from benchmarks.foundation import measured
from benchmarks.plan_check import MEAN_OF_EIGHT, SCGPT_CELLS, SCGPT_PARAMETERS, TOKENS

pytestmark = pytest.mark.heavy


def test_a_figure_is_planned_by_the_command_that_measured_it() -> None:
    config = plan_check.config_of("vae-step-own-sets-tiny-cpu.json", vae_step)
    assert (config.preset, config.cells, config.n_given, config.own_sets) == ("tiny", 30, 422, True)
    alone, *on_two = plan_check.of_engines()
    assert alone.measured == measured("train-cpu.json", "plain: a step")
    assert len({figure.measured for figure in (alone, *on_two)}) == 5
    assert all(0 < figure.planned < figure.measured for figure in (alone, *on_two)), "a plan has no Python of engines"


def test_the_published_transformer_takes_the_products_of_its_shape() -> None:
    rows = {row.name: row.value for row in plan_check.published_transformer()}
    blocks = 6 * 12 * 6 * 512**2 * TOKENS + 7 * 2 * 12 * 512 * TOKENS**2  # backward makes the scores again
    heads = 6 * 512 * (62_714 * round(0.15 * TOKENS) + 51 * TOKENS)
    assert rows["fast-scgpt, FLOPs of a cell, products that are made"] == pytest.approx((blocks + heads) / 1e9)
    # what 50 steps took in all is what the stated MFU is of, and the stated cells/s are of the median step
    assert rows["fast-scgpt, 8 H100: cells/s that the stated MFU is of"] == pytest.approx(MEAN_OF_EIGHT, rel=0.01)
    by_its_own = rows["fast-scgpt, 8 H100: MFU of the stated cells/s, by 12 x parameters x tokens, as it counts"]
    assert by_its_own == pytest.approx(100 * 31_900 * 12 * SCGPT_PARAMETERS * TOKENS / 8 / 989.5e12)
    # at 35 % of the peak, a step of one GPU computes longer than it launches or updates
    longest = SCGPT_CELLS / rows["fast-scgpt, 1 H100: planned at 35 % MFU"]
    assert longest == pytest.approx(SCGPT_CELLS * (blocks + heads) / (0.35 * 989.5e12), rel=0.01)
    assert rows["fast-scgpt, 1 H100: memory, planned / stated"] == pytest.approx(1, abs=0.15)
