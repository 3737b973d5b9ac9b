"""A draw of an atlas keeps what is compared: rare types, their shares, and the names of types that are missing."""

from __future__ import annotations

import numpy as np
import pytest

from scldm.evaluate.sample import Sample, rows_of_blocks

TRAIN = {"common": 900_000, "rare": 300, "of no test cell": 5_000}
TEST = {"common": 100_000, "rare": 30}
GENERATED = {"common": 10_000, "rare": 30}


def test_a_split_within_the_bound_is_taken_whole() -> None:
    sample = Sample(905_300, GENERATED, 0)
    for split in ("train", "validation"):
        assert sample.numbers(split, TRAIN, TEST) == TRAIN
    assert Sample(905_299, GENERATED, 0).numbers("train", TRAIN, TEST) != TRAIN


def test_training_and_test_cells_have_the_shares_at_which_they_are_compared() -> None:
    sample = Sample(50_000, GENERATED, 0)
    train, test = (sample.numbers(split, of, TEST) for split, of in (("train", TRAIN), ("test", TEST)))
    assert sum(train.values()) == pytest.approx(50_000, abs=2)
    assert train["rare"] / train["common"] == pytest.approx(30 / 10_000, rel=0.01)
    assert "of no test cell" not in train
    # there are no more of the rare ones; their place is taken by the common ones
    assert test == {"common": 49_970, "rare": 30}
    uniform = sample.numbers("validation", TRAIN, TEST)
    assert uniform == {"common": pytest.approx(49_707, abs=2), "rare": 16, "of no test cell": 276}


def test_a_type_that_was_not_generated_is_still_missed_by_name() -> None:
    sample = Sample(50_000, {"common": 10_000}, 0)
    assert sample.numbers("test", TEST, TEST)["rare"] >= 1
    assert "rare" not in sample.numbers("train", {"common": 900_000}, TEST)


def test_a_draw_takes_each_type_from_few_blocks_without_looking_at_the_others() -> None:
    rng = np.random.default_rng(0)
    type_n = (rng.random(100_000) < 0.01).astype(np.uint8)
    start = np.append(np.arange(0, 100_000, 256), 100_000)
    rows = rows_of_blocks(type_n, start, np.array([2_000, 20]), np.random.default_rng(1))
    assert np.bincount(type_n[rows]).tolist() == [2_000, 20]
    assert (np.diff(rows) > 0).all()
    blocks = np.unique(rows // 256)
    assert len(blocks) < 20
    assert blocks.min() < 100 < 250 < blocks.max()  # of the whole set, not its beginning
    more = rows_of_blocks(type_n, start, np.array([10**6, 0]), np.random.default_rng(1))
    np.testing.assert_array_equal(more, np.flatnonzero(type_n == 0))
