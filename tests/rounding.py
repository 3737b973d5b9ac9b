"""How far float32 results may lie apart that are the same but for rounding: measured where the test runs.

No bound here is a number that one machine gave. It is a multiple of an error that the test measures in its own process,
against float64 or between runs that differ in nothing but the last bit. Where a network can be had in float64, it is
compared there instead, and nothing of this is needed.
Reading order: one result, an error over several networks, runs of training.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scldm.train.tracking import read_metrics

# Two results err independently, each like the one that was measured, and the two errors add up: a factor of 2. The
# largest error of one order of summation may be a few times that of another, as sums of roundings are random: 4 allows
# four standard deviations where the measured one has one.
APART = 8.0

# --- one result ----------------------------------------------------------------------------------------------------


def error_of(network: nn.Module, call: Callable[[Any], Tensor]) -> float:
    """The largest absolute error of `call(network)` in float32, against the same network in float64."""
    with torch.no_grad():
        exact = call(copy.deepcopy(network).double())
        assert exact.dtype == torch.float64
        return float((call(network).double() - exact).abs().max())


def assert_rounded(found: Any, expected: Any, error: float) -> None:
    """Both are float32 results of one function, which errs by about `error`."""
    assert error > 0, "nothing was rounded: compare for equality"
    torch.testing.assert_close(
        torch.as_tensor(np.asarray(found)).double(),
        torch.as_tensor(np.asarray(expected)).double(),
        atol=APART * error,
        rtol=0,
    )


# --- an error over several networks --------------------------------------------------------------------------------


def worse(
    errors: Mapping[str, Sequence[float]], formula: Mapping[str, Sequence[float]], at_most: float
) -> dict[str, float]:
    """What a path errs by more than `at_most` times as much as the formula does: name -> the ratio of their errors.

    errors, formula: of each named number, its relative error on each of the same networks; a name with a dot is of a
        parameter's gradient, others are outputs

    The ratio is the geometric mean over networks, so that no single sum of roundings decides. Its own spread is
    measured: the logarithm of a ratio varies over networks by some sd, which all names together estimate, and a mean of
    n has sd / sqrt(n). A ratio counts as larger where it lies four of these above `at_most`. An error may be small by
    luck: that of a gradient counts as no less than three quarters of the network's gradients have, that of an output as
    no less than half a float32's last digit.
    """
    n = len(next(iter(formula.values())))
    gradients = [of for name, of in formula.items() if "." in name]
    lowest = [float(np.quantile([of[k] for of in gradients], 0.25)) if gradients else 0.0 for k in range(n)]

    def least(name: str, k: int) -> float:
        return max(lowest[k] if "." in name else 0.0, 2.0**-24)

    logs = {
        name: [math.log(max(e, least(name, k)) / max(formula[name][k], least(name, k))) for k, e in enumerate(of)]
        for name, of in errors.items()
    }
    sd = math.sqrt(statistics.mean(statistics.variance(of) for of in logs.values()))
    limit = math.log(at_most) + 4 * sd / math.sqrt(n)
    return {name: math.exp(statistics.mean(of)) for name, of in logs.items() if statistics.mean(of) > limit}


# --- runs of training ----------------------------------------------------------------------------------------------

N_NUDGED = 4
# From seed to seed, the logarithm of a nudged run's distance from the undisturbed one has a standard deviation of about
# 1 (measured: 0.4e-6 to 3.4e-5 in the loss after 50 steps). The largest of four lies about 1 above its mean, and e^3 =
# 20 times that is 4 standard deviations above it. A wrong gradient is 1e-2 off at its first step.
BAND = 20.0
LEAST = 2.0**-20  # relative: 16 halves of a float32's last digit, where nothing amplifies them


BF16_DIGIT = 2.0**-8  # relative: what one rounding to bfloat16 may move a number by, up or down


def nudged(seed: int, by: float = 0.0) -> Callable[[Any, Any], None]:
    """A disturbance for small_run: every weight starts one representable number higher or lower, at random; or, given
    `by`, as much relative to its size at most."""

    def disturb(stage: Any, loader: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in stage.module.parameters():
                random = torch.rand(p.shape, generator=generator)
                up = torch.where(random < 0.5, torch.inf, -torch.inf)
                p.copy_(p * (1 + (2 * random - 1) * by) if by else torch.nextafter(p, up))

    return disturb


def curve(run_dir: Path, key: str, split: str = "train") -> Tensor:
    """A metric at each of its logged steps, in order, float64."""
    return torch.tensor([row[key] for row in read_metrics(run_dir, split)], dtype=torch.float64)


@dataclass(frozen=True)
class Undisturbed:
    """A run, and how far rounding alone takes others from it.

    run_dir: of the run
    others: runs that differ in nothing but the last bit of their first weights
    """

    run_dir: Path
    others: Sequence[Path]

    @classmethod
    def of(cls, folder: Path, train: Callable[..., Any], by: float = 0.0) -> Undisturbed:
        """`train(run_dir, disturb=...)` makes a run; by as for nudged."""
        train(folder / "undisturbed")
        others = [folder / f"nudged-{seed}" for seed in range(1, N_NUDGED + 1)]
        for seed, other in enumerate(others, 1):
            train(other, disturb=nudged(seed, by))
        return cls(folder / "undisturbed", others)

    def band(self, key: str, split: str = "train") -> Tensor:
        """The relative distance that is allowed at each logged step. It never shrinks: a distance once made may show
        again later."""
        own = curve(self.run_dir, key, split)
        apart = torch.stack([(curve(other, key, split) / own - 1).abs() for other in self.others]).amax(0)
        return (BAND * apart.cummax(0).values).clamp_min(LEAST)

    def assert_same(self, run_dir: Path, keys: Mapping[str, str]) -> None:
        """Every logged step of the metrics, given as metric -> split."""
        for key, split in keys.items():
            own, found = curve(self.run_dir, key, split), curve(run_dir, key, split)
            assert found.shape == own.shape, (run_dir.name, key, split)
            over = (found / own - 1).abs() / self.band(key, split)
            assert (over <= 1).all(), f"{run_dir.name}: {split} {key} is {over.max():.3g} times as far off as allowed"

    def assert_near(self, run_dir: Path, key: str) -> None:
        """Of a run in bfloat16, beside others that were nudged by as much as it rounds: the relative distance of the
        median step. It is another precision, so it must not be 0."""
        own = curve(self.run_dir, key)
        apart = [float((curve(path, key) / own - 1).abs().median()) for path in (run_dir, *self.others)]
        assert 1e-6 < apart[0] < APART * max(apart[1:]), (run_dir.name, apart)

    def assert_same_tensors(self, tensors: Mapping[str, Tensor], read: Callable[[Path], Mapping[str, Tensor]]) -> None:
        """Weights and the like at the end; `read` gives a run's."""
        own = read(self.run_dir)

        def apart(found: Mapping[str, Tensor]) -> float:
            assert found.keys() == own.keys()
            return max(float((found[key] - own[key]).abs().max()) for key in own)

        allowed = BAND * max(apart(read(other)) for other in self.others)
        assert apart(tensors) <= max(allowed, LEAST), f"{apart(tensors):.3g} apart, allowed {allowed:.3g}"
