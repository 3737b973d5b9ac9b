"""Changes, tests and slopes against scipy, numpy and simulated cells whose responses are known; faults are seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import mannwhitneyu, norm

from scldm.errors import InputError
from scldm.evaluate.cells import Cells
from scldm.evaluate.changes import Blocks, Pair, rank_sum, variance_of_sum
from scldm.evaluate.response import (
    Contrast,
    Response,
    agreement,
    guess_control,
    pooled,
    response,
    responses,
    rows_with,
)

G = 400
GENES = tuple(f"g{k}" for k in range(G))


@pytest.mark.parametrize(
    "labels, control",
    [
        (["ctrl", "stim"], "ctrl"),
        (["IFN-beta", "Control (24 h)"], "Control (24 h)"),
        (["TP53", "non-targeting", "MYC"], "non-targeting"),
        (["TP53", "NonTargeting_1"], "NonTargeting_1"),
        (["a", "PBS"], "PBS"),
        (["CTL", "IFN"], "CTL"),
        (["CD4 CTL", "B naive", "NK"], None),  # a cell type
        (["uncontrolled", "stimulated"], None),  # no whole word
        (["DMSO", "untreated", "drug"], None),  # two
        (["non-responder", "targeting"], None),
    ],
)
def test_the_usual_names_of_a_reference_are_known(labels: list[str], control: str | None) -> None:
    assert guess_control(labels) == control


def test_rank_sum_is_scipys() -> None:
    rng = np.random.default_rng(0)
    rate = np.concatenate([rng.gamma(1, 1.0, 30), [0, 0, 40]])
    up = rng.poisson(rate * rng.choice([1, 1, 3], 33), (25, 33)).astype(float)
    down = rng.poisson(rate, (31, 33)).astype(float)
    up[:, 30], down[:, 30] = 2, 2  # all tied, above 0
    up[:, :10] /= 3  # not whole numbers
    z = rank_sum(sp.csr_matrix(up), sp.csr_matrix(down))
    expected = np.array([mannwhitneyu(up[:, g], down[:, g], method="asymptotic").pvalue for g in range(33)])
    expected[[30, 31]] = 1.0  # scipy has no number where nothing varies
    # both take the same sums in another order
    np.testing.assert_allclose(2 * norm.sf(np.abs(z)), expected, rtol=1e-9)
    larger = [mannwhitneyu(up[:, g], down[:, g]).statistic > 25 * 31 / 2 for g in range(33)]
    assert ((z > 0) == larger)[z != 0].all()


def test_explicit_zeros_are_zeros() -> None:
    treated, control = sp.csr_matrix(np.array([[1.0], [2], [3]])), sp.csr_matrix(np.array([[1.0], [9], [9]]))
    expected = rank_sum(treated, sp.csr_matrix(np.array([[1.0], [0], [0]])))
    control.data[1:] = 0
    assert rank_sum(treated, control) == pytest.approx(expected)


def test_changes_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(1)
    up, down = rng.poisson(3, (17, 20)), rng.poisson(2, (19, 20))
    pair = Pair(*(Blocks.of_counts(sp.csr_matrix(c), rng) for c in (up, down)))
    ten, twenty = (c / c.sum(1, keepdims=True) * 10_000 for c in (up, down))
    np.testing.assert_allclose(pair.change, np.log2((ten.mean(0) + 1) / (twenty.mean(0) + 1)))
    np.testing.assert_allclose(pair.log1p_change, np.log1p(ten).mean(0) - np.log1p(twenty).mean(0))
    parts = np.array([[1, 1, 0, 1, 0, 0, 0, 1.0]])
    chosen = [pair.treated.per_10k.toarray()[np.isin(np.arange(17) % 8, [0, 1, 3, 7])]]
    chosen.append(pair.control.per_10k.toarray()[np.isin(np.arange(19) % 8, [0, 1, 3, 7])])
    np.testing.assert_allclose(pair.changes(parts)[0], np.log2((chosen[0].mean(0) + 1) / (chosen[1].mean(0) + 1)))
    logs = [np.log1p(c) for c in chosen]
    error = np.sqrt(sum(x.var(0, ddof=1) / len(x) for x in logs))
    np.testing.assert_allclose(pair.welch_t(parts)[0], (logs[0].mean(0) - logs[1].mean(0)) / error, rtol=1e-6)
    assert len(pair.half(0).treated.n_K) == 8
    assert pair.half(0).treated.n_K.sum() + pair.half(1).treated.n_K.sum() == 17


# --- simulated cells -----------------------------------------------------------------------------------------------


def cells_of(counts: sp.csr_matrix, labels: dict[str, np.ndarray]) -> Cells:
    return Cells.of_labels(counts, labels, GENES, "cells")


class World:
    """Cells with known mean counts per 10,000 and log2 changes of 60 of 400 genes, of a fifth of that depth."""

    def __init__(self, seed: int, effect: float = 1.2) -> None:
        self.rng = np.random.default_rng(seed)
        self.mean_G = self.rng.lognormal(1.0, 1.5, G)
        self.mean_G *= 10_000 / self.mean_G.sum()
        self.change_G = np.where(self.rng.permutation(G) < 60, self.rng.normal(0, effect, G), 0)

    def draw(self, mean_G: np.ndarray, n: int) -> sp.csr_matrix:
        scale = self.rng.gamma(3, 1 / 3, (n, G)) * self.rng.lognormal(0, 0.3, (n, 1))
        return sp.csr_matrix(self.rng.poisson(0.2 * mean_G * scale))

    def cells(self, n: int, scale: float = 1.0) -> Cells:
        """n control and n treated cells, the changes multiplied by `scale`."""
        treated_G = np.clip((self.mean_G + 1) * 2 ** (scale * self.change_G) - 1, 0, None)
        counts = sp.csr_matrix(sp.vstack([self.draw(self.mean_G, n), self.draw(treated_G, n)]))
        return cells_of(counts, {"drug": np.repeat(["ctrl", "stim"], n)})


def respond(train: Cells, test: Cells, generated: Cells, **other) -> Response:
    return response(train, test, generated, "drug", "ctrl", **other)


def change_of(source: Cells) -> np.ndarray:
    rng = np.random.default_rng(0)
    return Pair(
        *(Blocks.of_counts(source.counts[rows_with(source, {"drug": x})], rng) for x in ("stim", "ctrl"))
    ).change


def value(found: Response, name: str) -> float:
    number = found.pooled[name].value
    assert number is not None
    return number


@pytest.mark.heavy
def test_slopes_are_those_of_the_truth_where_a_regression_is_too_low() -> None:
    slopes, errors = [], []
    for seed in range(20):
        world = World(seed)
        train, test, right, half = (world.cells(40, scale) for scale in (1, 1, 1, 0.5))
        # a generator that has learned everything, noise too
        found = [respond(train, test, generated, seed=seed).pooled["slope"] for generated in (right, half, train)]
        errors.append(found[0].error)
        x, y, z, copied = map(change_of, (test, right, train, train))
        top, of_train = np.argsort(-np.abs(x))[:80], np.argsort(-np.abs(z))[:80]
        centred = z[of_train] - z[of_train].mean()
        naive = np.polyfit(x[top], y[top], 1)[0]
        by_training_cells = centred @ copied[of_train] / (centred @ x[of_train])
        slopes.append([*(s.value for s in found), found[0].ceiling, naive, by_training_cells])
    right, half, copies, ceiling, naive, by_training_cells = np.mean(slopes, 0)
    # the mean of 20 has a standard deviation of about .01
    assert (right, copies, ceiling) == pytest.approx((1, 1, 1), abs=0.04)
    assert half == pytest.approx(0.5, abs=0.04)
    assert naive < 0.9
    assert by_training_cells > 1.1
    # the jackknife halves once more: its error is somewhat too large, never too small
    assert 0.9 < np.mean(errors) / np.std([s[0] for s in slopes]) < 2.5


def test_faults_of_generators_are_seen() -> None:
    world = World(1)
    train, test = world.cells(60), world.cells(60)
    good, blind, opposite = (respond(train, test, world.cells(60, scale)) for scale in (1, 0, -1))
    assert value(good, "slope") == pytest.approx(1, abs=0.15)
    assert value(blind, "slope") == pytest.approx(0, abs=0.15)
    assert value(opposite, "slope") < -0.7
    for name in ("r", "delta_r", "overlap_20", "overlap_50", "direction_20"):
        ceiling = good.pooled[name].ceiling
        assert ceiling is not None
        assert value(good, name) > ceiling - 0.15
        assert value(blind, name) < ceiling - 0.3
    assert value(opposite, "direction_20") < 0.1
    assert value(opposite, "overlap_20") > 0.5  # the same genes, the wrong way
    reach = good.pooled["r"].as_json()
    assert reach["low"] < reach["value"] < reach["high"] < 1


def test_without_a_response_there_is_no_slope() -> None:
    world = World(2, effect=0.0)
    found = respond(*(world.cells(40) for _ in range(3)))
    assert found.pooled["slope"].value is None
    assert abs(value(found, "r")) < 0.3


@pytest.mark.heavy
def test_agreement_is_that_of_the_lists() -> None:
    world = World(3)
    rng = np.random.default_rng(0)
    pairs = []
    for source in (world.cells(40), world.cells(40)):
        pairs.append(
            Pair(*(Blocks.of_counts(source.counts[rows_with(source, {"drug": x})], rng) for x in ("stim", "ctrl")))
        )
    found = agreement(*pairs)
    lists = []
    for pair in pairs:
        tested = [
            mannwhitneyu(pair.treated.per_10k[:, [g]].toarray(), pair.control.per_10k[:, [g]].toarray()).pvalue[0]
            for g in range(G)
        ]
        lists.append(np.argsort(tested, kind="stable")[:50])
    assert found["overlap_50"] == pytest.approx(len(set(lists[0]) & set(lists[1])) / 50, abs=0.021)  # one at the edge
    same = np.sign(pairs[0].change) == np.sign(pairs[1].change)
    assert found["direction_50"] == pytest.approx(same[lists[0]].mean(), abs=0.021)
    assert found["r"] == pytest.approx(np.corrcoef(pairs[0].change, pairs[1].change)[0, 1])
    few = [Pair(*(Blocks.of(b.per_10k[:, :60]) for b in (p.treated, p.control))) for p in pairs]
    assert "overlap_20" in agreement(*few)
    assert "overlap_50" not in agreement(*few)  # of 60 genes, it says nothing


# --- contrasts -----------------------------------------------------------------------------------------------------


def joined(parts: dict[str, tuple[Cells, int, int]]) -> Cells:
    """Cells of several types: of each source the first so many control and treated cells."""
    counts, drug, kind = [], [], []
    for name, (source, n_control, n_treated) in parts.items():
        for label, n in (("ctrl", n_control), ("stim", n_treated)):
            counts.append(source.counts[rows_with(source, {"drug": label})[:n]])
            drug += [label] * n
            kind += [name] * n
    return cells_of(sp.csr_matrix(sp.vstack(counts)), {"kind": np.array(kind), "drug": np.array(drug)})


@pytest.fixture(scope="module")
def of_types() -> Response:
    world = World(4)
    cells = [world.cells(40) for _ in range(6)]
    test = joined(
        {"B": (cells[0], 40, 30), "T": (cells[1], 40, 40), "rare": (cells[1], 40, 9), "pure": (cells[0], 0, 30)}
    )
    train = joined({"B": (cells[2], 40, 40), "T": (cells[3], 40, 0), "rare": (cells[3], 40, 40)})
    generated = joined({"B": (cells[4], 40, 40), "T": (cells[5], 40, 40), "rare": (cells[5], 40, 40)})
    return respond(train, test, generated)


def by_kind(found: Response) -> dict[str, Contrast]:
    return {c.group["kind"]: c for c in found.contrasts}


def test_each_type_is_its_own_contrast_and_small_ones_are_named(of_types: Response) -> None:
    found = by_kind(of_types)
    assert set(found) == {"B", "T"}
    assert found["B"].n_cells["test"] == {"treated": 30, "control": 40}
    assert found["B"].n_cells["generated"] == found["B"].n_cells["train"] == {"treated": 40, "control": 40}
    left = {c["group"]["kind"]: c["n_cells"] for c in of_types.left_out}
    assert set(left) == {"rare", "pure"}
    assert left["rare"]["test"] == {"treated": 9, "control": 40}
    assert left["pure"]["generated"] == {"treated": 0, "control": 0}
    assert (found["B"].of_halves, found["T"].of_halves) == (False, True)
    slopes = found["B"].scores["slope"], found["T"].scores["slope"]
    assert slopes[0].ceiling == pytest.approx(1, abs=0.25)
    assert slopes[1].ceiling is None  # training has none of that combination
    ceiling = found["T"].scores["r"].ceiling
    assert ceiling is not None
    # Spearman and Brown: of halves, yet that of as many cells as the other type's
    assert ceiling == pytest.approx(found["B"].scores["r"].ceiling, abs=0.12)


def test_pooled_is_the_mean_weighted_by_cells(of_types: Response) -> None:
    found = by_kind(of_types)
    both, covariances = [found["B"], found["T"]], [found[kind].covariances for kind in ("B", "T")]
    together = pooled(both)
    for name in ("r", "overlap_20", "direction_50"):
        values = [of.scores[name].value for of in both]
        assert together[name].value == pytest.approx(np.average(values, weights=[70, 80]))
    ratio = np.dot([70, 80], [c.generated for c in covariances]) / np.dot([70, 80], [c.real for c in covariances])
    assert together["slope"].value == pytest.approx(ratio)


def test_contrasts_that_were_not_trained_stand_apart(of_types: Response) -> None:
    found = by_kind(of_types)
    assert of_types.pooled["slope"] == pooled([found["B"]])["slope"]
    assert of_types.unseen["slope"] == pooled([found["T"]])["slope"]


@pytest.mark.heavy
def test_errors_are_those_of_repeats_where_treatments_share_their_control() -> None:
    """12 treatments with few control cells, which are most of the error. A mean over treatments does not reduce it."""
    world, names = World(8), [f"drug {k:02d}" for k in range(12)]
    changes = [np.where(world.rng.permutation(G) < 60, world.rng.normal(0, 0.8, G), 0) for _ in names]
    means = [np.clip((world.mean_G + 1) * 2**change_G - 1, 0, None) for change_G in changes]

    def draw() -> Cells:
        parts = [world.draw(world.mean_G, 16), *(world.draw(mean_G, 48) for mean_G in means)]
        labels = np.repeat(["ctrl", *names], [16, *[48] * 12])
        return cells_of(sp.csr_matrix(sp.vstack(parts)), {"drug": labels})

    found = [respond(draw(), draw(), draw(), min_cells=16, seed=seed).pooled["r"] for seed in range(16)]
    errors, spread = [score.error for score in found], np.std([score.value for score in found], ddof=1)
    # the spread of 16 is itself 18 % off; as if the contrasts shared nothing, the ratio is 0.35
    assert 0.65 < np.mean(errors) / spread < 2


def test_two_treatments_that_are_one_are_no_surer_than_one() -> None:
    """Their cells are all alike, so that the error is the control cells', and the same for both."""
    world = World(9)
    treated_G = np.rint(0.2 * (world.mean_G + 1) * 2**world.change_G)

    def draw() -> Cells:
        treated = sp.csr_matrix(np.tile(treated_G, (48, 1)))
        counts = sp.csr_matrix(sp.vstack([world.draw(world.mean_G, 40), treated]))
        return cells_of(counts, {"drug": np.repeat(["ctrl", "a", "b"], [40, 24, 24])})

    found = respond(draw(), draw(), draw())
    a, b = found.contrasts
    # sums of the same numbers; only their order may differ
    np.testing.assert_allclose(a.r_S, b.r_S, rtol=1e-9)
    for name in ("r", "slope"):
        error = a.scores[name].error
        assert error is not None
        assert error > 0
        assert found.pooled[name].error == pytest.approx(error)


def test_variances_add_over_groups_and_replicates_within() -> None:
    replicates_NS = np.array([[1.0, 3, 1, 3], [1, 3, 1, 3], [1, 1, 3, 3]])
    apart = variance_of_sum(replicates_NS, [1, 2, 1], ["a", "b", "c"])
    assert apart == pytest.approx(1 + 4 + 1)
    assert variance_of_sum(replicates_NS, [1, 2, 1], ["a", "a", "c"]) == pytest.approx(9 + 1)
    assert variance_of_sum(replicates_NS, [1, 2, 1], ["a", "b", "a"]) == pytest.approx(
        apart
    )  # these two don't correlate


def test_json_holds_it_all(of_types: Response) -> None:
    found = json.loads(json.dumps(of_types.as_json(), allow_nan=False))
    assert {"slope", "r", "delta_mae", "overlap_100", "direction_20"} < set(found["contrasts"][0]["scores"])
    assert found["pooled"]["slope"]["low"] < found["pooled"]["slope"]["value"] < found["pooled"]["slope"]["high"]
    genes = found["contrasts"][0]["genes"]
    assert len(set(genes["gene"])) == len(genes["generated"]) == len(genes["train"]) <= 500
    assert "train" not in found["contrasts"][1]["genes"]


def test_the_same_seed_gives_the_same_numbers() -> None:
    world = World(5)
    sources = [world.cells(20) for _ in range(3)]
    first, again = (responses(*sources, {"drug": "ctrl"}, seed=3)["drug"].as_json() for _ in range(2))
    assert first == again
    assert len(first["contrasts"]) == 1
    assert first["contrasts"][0]["group"] == {}


def test_a_ceiling_is_that_of_as_many_cells_as_were_generated() -> None:
    world = World(6)
    train, test = world.cells(80), world.cells(80)
    ceilings = [respond(train, test, world.cells(n)).pooled["r"].ceiling for n in (20, 80, 160)]
    assert ceilings[0] is not None
    assert ceilings[1] is not None
    assert ceilings[0] < ceilings[1] - 0.05
    assert ceilings[2] == pytest.approx(ceilings[1])
    # of more generated cells than training cells only as many count: copies reach the ceiling and no more
    twice = cells_of(sp.csr_matrix(sp.vstack([train.counts] * 2)), {"drug": np.tile(train.labels["drug"], 2)})
    assert value(respond(train, test, twice), "r") < ceilings[1] + 0.02


def test_what_is_not_there_is_named() -> None:
    cells = World(7).cells(20)
    with pytest.raises(InputError, match="no condition 'dose'. They have drug"):
        response(cells, cells, cells, "dose", "ctrl")
    with pytest.raises(InputError, match="drug='vehicle' is no label of the test cells: ctrl, stim"):
        response(cells, cells, cells, "drug", "vehicle")
