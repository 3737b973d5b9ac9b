"""The bounds on rounding let rounding pass, and nothing thirty times as large."""

from __future__ import annotations

import numpy as np
import pytest

from tests.rounding import assert_rounded, worse

NAMES = ["latent", "log share", *(f"layer.{k}" for k in range(40))]


def drawn(seed: int, networks: int = 5) -> dict[str, list[float]]:
    """Errors of 42 numbers of five networks: each number has a size of its own, from 1e-7 to 3e-6, and errs by a factor
    of e around it."""
    size = 10 ** np.random.default_rng(0).uniform(-7, -5.5, len(NAMES))
    spread = np.random.default_rng([1, seed]).normal(0, 0.5, (len(NAMES), networks))
    return dict(zip(NAMES, (size[:, None] * np.exp(spread)).tolist(), strict=True))


def test_a_path_of_the_same_errors_is_not_worse() -> None:
    assert not any(worse(drawn(seed), drawn(seed + 1_000), at_most=2) for seed in range(100))


@pytest.mark.parametrize("name", ["latent", "log share", "layer.0", "layer.7"])
def test_one_number_that_errs_thirty_times_as_much_is_named(name: str) -> None:
    for seed in range(20):
        errors = drawn(seed)
        errors[name] = [30 * e for e in errors[name]]
        assert name in worse(errors, drawn(seed + 1_000), at_most=2)


def test_a_bound_of_roundings_is_no_bound_of_another_result() -> None:
    assert_rounded([1.0, 2.0], [1.0 + 5e-7, 2.0], error=1e-7)
    with pytest.raises(AssertionError):
        assert_rounded([1.0, 2.0], [1.0 + 9e-7, 2.0], error=1e-7)
    with pytest.raises(AssertionError, match="nothing was rounded"):
        assert_rounded([1.0], [1.0], error=0.0)
