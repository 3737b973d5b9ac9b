"""How far combinations lie apart: as measured where they were trained, else as the nearest relatives say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from scldm.flow.means import CombinationMeans
from scldm.flow.shift import nearest_trained, way
from scldm.model import dit as dits
from scldm.model.dit import DiT, DiTConfig

LATENT = (3, 4)
MANY = 1e6  # cells, so that no mean is drawn to 0
Labels = tuple[int, ...]


def model(
    labels: dict[str, int],
    trained: Sequence[Labels],
    place: dict[Labels, float],
    cells: dict[Labels, float] | float = MANY,
    variance: float = 1.0,
) -> DiT:
    """A network whose combinations lie at these places, in every latent number. Those of 0 cells were not measured.

    variance: of cells, in each number
    """
    dit = DiT(DiTConfig(16, 1, 2), *LATENT, labels, combinations_KC=torch.tensor(trained))
    n_of = {row: cells.get(row, MANY) if isinstance(cells, dict) else cells for row in trained}
    measured = [row for row in trained if n_of[row]]
    mean_K = torch.tensor([place[row] for row in measured], dtype=torch.float64)
    n_K = torch.tensor([n_of[row] for row in measured], dtype=torch.float64)
    dit.fit_means(torch.tensor(measured), n_K, mean_K[:, None, None].expand(-1, *LATENT), variance * 12)
    return dit


def response(kind: int) -> float:
    """What the drug does to a type: types 0 and 1 respond, which lie near each other, and 2 and 3 hardly do."""
    return (4.0, 5.0, 0.5, 0.2)[kind]


PLACES: dict[Labels, float] = {
    (kind, drug): (0.0, 1.0, 20.0, 22.0)[kind] + drug * response(kind) for kind in range(4) for drug in range(2)
}
ALL, PAIR = list(PLACES), {"type": 4, "drug": 2}
SEEN = [row for row in ALL if row != (1, 1)]


def gone(dit: DiT, of: Labels, to: Labels, given: Labels | None = None) -> float:
    """The way between two combinations."""
    is_given = torch.ones(len(to), dtype=torch.bool) if given is None else torch.tensor(given).bool()
    found = CombinationMeans(dit).way(torch.tensor([of]), torch.tensor(to), is_given)
    assert found.shape == (1, *LATENT)
    assert found.std() < 1e-4
    return float(found[0, 0, 0])


def by_shifts(dit: DiT, of: Labels, to: Labels) -> float:
    there, here = (dit.means(dict(zip(dit.n_labels, torch.tensor([x]).unbind(1)))) for x in (to, of))
    return float((there - here)[0, 0, 0])


def test_trained_combinations_lie_as_far_apart_as_was_measured() -> None:
    dit = model(PAIR, ALL, PLACES)
    assert gone(dit, (0, 1), (2, 0)) == pytest.approx(16.0, abs=1e-2)
    assert abs(by_shifts(dit, (0, 1), (2, 0)) - 16.0) > 0.5


@pytest.mark.parametrize(("kind", "relative"), [(1, 0), (3, 2)])
def test_an_unseen_one_responds_as_its_near_relative_does(kind: int, relative: int) -> None:
    dit = model(PAIR, [row for row in ALL if row != (kind, 1)], PLACES)
    assert gone(dit, (kind, 0), (kind, 1)) == pytest.approx(response(relative), abs=0.1)
    assert abs(by_shifts(dit, (kind, 0), (kind, 1)) - response(relative)) > 0.5


def test_the_way_leads_there_from_either_side_and_conditions_may_stand_in_any_order() -> None:
    dit = model(PAIR, SEEN, PLACES)
    asked = {"type": torch.tensor([1, 1, 0]), "drug": torch.tensor([1, 1, 1])}
    of = {"type": torch.tensor([1, 0, 0]), "drug": torch.tensor([0, 1, 1])}
    way_BLZ = way(dit, of, asked)
    assert isinstance(way_BLZ, Tensor)
    torch.testing.assert_close(way_BLZ[:, 0, 0], torch.tensor([4.0, 1.0, 0.0]), atol=0.1, rtol=0)
    assert way_BLZ[2].abs().max() == 0
    other = model({"drug": 2, "type": 4}, [row[::-1] for row in SEEN], {k[::-1]: v for k, v in PLACES.items()})
    assert gone(other, (0, 1), (1, 1)) == pytest.approx(gone(dit, (1, 0), (1, 1)), abs=1e-4)


@pytest.mark.parametrize("trio", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_of_three_conditions_a_relative_that_shares_most_says_most(trio: Labels) -> None:
    """Donors shift little. The drug's response is the type's own, so another donor's cells of that type say it."""
    labels = [(kind, drug, donor) for kind in range(3) for drug in range(2) for donor in range(3)]
    place = {(k, d, n): 10.0 * k + d * (6.0, 1.0, 3.0)[k] + 0.3 * n for k, d, n in labels}

    def turned(row: Labels) -> Labels:
        return tuple(row[k] for k in trio)

    names = [("type", 3), ("drug", 2), ("donor", 3)]
    seen = [turned(x) for x in labels if x != (0, 1, 2)]
    dit = model(dict(names[k] for k in trio), seen, {turned(k): v for k, v in place.items()})
    assert gone(dit, turned((0, 0, 2)), turned((0, 1, 2))) == pytest.approx(6.0, abs=0.1)


def test_where_no_donor_has_both_treatments_the_types_response_is_kept_and_the_donors_character() -> None:
    """Donors 0 and 1 are controls, 2 and 3 treated. No parallelogram has all three conditions. Type 1 responds by 6,
    type 0 by 3, and cells of type 1 and donor 1 lie 2 off."""
    labels = [(kind, donor, int(donor > 1)) for kind in range(2) for donor in range(4)]
    place = {(k, n, d): 8.0 * k + d * 3.0 * (1 + k) + 2.0 * (k * (n == 1)) for k, n, d in labels}
    dit = model({"type": 2, "donor": 4, "drug": 2}, labels, place)
    ways = {(k, n): gone(dit, (k, n, 0), (k, n, 1)) for k in range(2) for n in range(2)}
    assert ways[0, 1] == pytest.approx(ways[0, 0], abs=1e-3)
    assert ways[1, 1] == pytest.approx(ways[1, 0], abs=1e-3)
    # the drug's effect is mixed up with its donors', so its size can't be known. What types differ by can, but for
    # the two that donor 1 lies off, of which the mean of both donors has one
    assert ways[1, 0] - ways[0, 0] == pytest.approx(3.0 - 1.0, abs=0.1)


@pytest.mark.parametrize("few", [(0, 0), (0, 1), (1, 0)])
def test_a_mean_of_few_cells_hardly_counts_and_one_of_none_not_at_all(few: Labels) -> None:
    """Type 0 is the nearest relative of type 1, and responds by 6, the others by 1. Of 5 cells that is not certain.
    What is drawn to 0 is the whole answer, not one corner of it."""
    place = {
        (kind, drug): (0.0, 1, 30, 33)[kind] + drug * (6.0, 6, 1, 1)[kind] for kind in range(4) for drug in range(2)
    }
    assert gone(model(PAIR, SEEN, place), (1, 0), (1, 1)) == pytest.approx(6.0, abs=0.1)
    unsure = model(PAIR, SEEN, place, {few: 5.0}, variance=1e3)
    shift = by_shifts(unsure, (1, 0), (1, 1))
    assert min(shift, 1.0) - 0.3 < gone(unsure, (1, 0), (1, 1)) < max(shift, 1.0) + 0.3
    none = model(PAIR, SEEN, place, {few: 0.0})
    assert none.combinations.cells_K.min() == 0
    if few[0] == 0:
        assert gone(none, (1, 0), (1, 1)) == pytest.approx(1.0, abs=0.1)


def test_interactions_that_are_noise_are_drawn_to_the_sum_of_shifts() -> None:
    """48 combinations of 12 x 4 labels that are sums of shifts: the error is that of shifts alone."""
    draws = torch.Generator().manual_seed(0)
    labels = [(kind, drug) for kind in range(12) for drug in range(4)]
    true = {(k, d): 1.0 * k + 0.5 * d for k, d in labels}
    noise = torch.randn(len(labels), 12, generator=draws, dtype=torch.float64) * (4.0 / 20) ** 0.5

    def fitted(sizes: float) -> DiT:
        dit = DiT(DiTConfig(16, 1, 2), *LATENT, {"type": 12, "drug": 4}, combinations_KC=torch.tensor(labels))
        of = torch.tensor([true[row] + sizes * (row[0] % 3) * (row[1] % 2) for row in labels], dtype=torch.float64)
        mean_KLZ = of[:, None, None] + noise.view(-1, *LATENT)
        dit.fit_means(torch.tensor(labels), torch.full((48,), 20.0, dtype=torch.float64), mean_KLZ, 4.0 * 12)
        return dit

    assert float(fitted(0.0).combinations.noise) > 100  # cells that say as much as an interaction is large
    assert float(fitted(4.0).combinations.noise) < 2


def test_a_condition_that_is_not_given_says_nothing() -> None:
    labels = [(kind, drug, donor) for kind in range(4) for drug in range(2) for donor in range(2)]
    place = {(k, d, n): PLACES[k, d] + 7.0 * n for k, d, n in labels}
    dit = model({"type": 4, "drug": 2, "donor": 2}, [x for x in labels if x[:2] != (1, 1)], place)
    not_given = dit.n_labels["donor"]
    assert gone(dit, (1, 0, not_given), (1, 1, not_given), (1, 1, 0)) == pytest.approx(4.0, abs=0.1)


def test_a_label_without_a_shift_is_no_relative() -> None:
    """Type 0, the nearest, was not measured at all."""
    dit = model(PAIR, SEEN, PLACES, {(0, 0): 0.0, (0, 1): 0.0})
    assert not dit.means.has_shift_0[0]
    assert gone(dit, (1, 0), (1, 1)) == pytest.approx(0.5, abs=0.2)


def test_without_a_relative_it_is_the_sum_of_its_shifts() -> None:
    dit = model(PAIR, [(0, 0), (1, 0), (2, 1), (3, 1)], PLACES)  # no type has both
    assert gone(dit, (1, 0), (1, 1)) == pytest.approx(by_shifts(dit, (1, 0), (1, 1)))


def test_too_many_combinations_have_shifts_alone_and_those_that_were_kept_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = dict(model(PAIR, SEEN, PLACES).state_dict())
    monkeypatch.setattr(dits, "INTERACTION_BYTES", 4 * len(SEEN) * 12 - 1)
    dit = model(PAIR, SEEN, PLACES)
    assert dit.combinations.interaction_KLZ is None
    assert not [name for name in dit.state_dict() if "interaction" in name]
    assert gone(dit, (1, 0), (1, 1)) == pytest.approx(by_shifts(dit, (1, 0), (1, 1)))
    again = DiT.of_tensors(dit.config, *LATENT, PAIR, tensors)
    again.load_state_dict(tensors)
    assert gone(again, (1, 0), (1, 1)) == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("labels", [{"type": 4}, {}])
def test_a_single_condition_has_none(labels: dict[str, int]) -> None:
    trained = torch.arange(4)[:, None] if labels else None
    dit = DiT(DiTConfig(16, 1, 2), *LATENT, labels, combinations_KC=trained)
    assert dit.combinations.interaction_KLZ is None


def test_weights_without_interactions_find_their_network() -> None:
    dit = model(PAIR, SEEN, PLACES)
    own = {f"combinations.{name}" for name in ("interaction_KLZ", "cells_K", "noise")}
    tensors = {name: value for name, value in dit.state_dict().items() if name not in own}
    assert len(tensors) == len(dit.state_dict()) - 3
    before = DiT.of_tensors(dit.config, *LATENT, PAIR, tensors)
    before.load_state_dict(tensors)
    assert before.combinations.interaction_KLZ is None


def test_the_nearest_is_chosen_by_the_ways_that_are_gone() -> None:
    dit = model(PAIR, SEEN, PLACES)
    base = nearest_trained(dit, {"type": torch.tensor([1]), "drug": torch.tensor([1])})
    assert (int(base["type"]), int(base["drug"])) == (0, 1)
