"""Where the cells of a combination lie: measured where it was trained, else as its nearest relatives say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scldm.flow.means import CombinationMeans
from scldm.flow.shift import nearest_trained, way
from scldm.model import conditions
from scldm.model.dit import DiT, DiTConfig

LATENT = (3, 4)
MANY = 1e6  # cells, so that no mean is drawn to 0


def model(labels: dict[str, int], trained: list[list[int]], place: dict[tuple[int, ...], float], cells: float) -> DiT:
    """A network whose combinations lie at these places, in every latent number."""
    labels_KC = torch.tensor(trained)
    dit = DiT(DiTConfig(16, 1, 2), *LATENT, labels, combinations_KC=labels_KC)
    mean_K = torch.tensor([place[tuple(row)] for row in trained], dtype=torch.float64)
    dit.fit_means(labels_KC, torch.full((len(trained),), cells), mean_K[:, None, None].expand(-1, *LATENT))
    return dit


def response(kind: int) -> float:
    """What the drug does to a type: types 0 and 1 respond, which lie near each other, and 2 and 3 hardly do."""
    return (4.0, 5.0, 0.5, 0.2)[kind]


PLACES = {(kind, drug): (0.0, 1.0, 20.0, 22.0)[kind] + drug * response(kind) for kind in range(4) for drug in range(2)}
ALL = [list(labels) for labels in PLACES]


def mean(dit: DiT, *labels: int) -> Tensor:
    found = CombinationMeans(dit)(torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool))
    assert found.shape == LATENT
    assert found.std() < 1e-4
    return found[0, 0]


def test_a_trained_combination_lies_where_it_was_measured_and_one_of_few_cells_nearer_to_the_sum() -> None:
    dit = model({"type": 4, "drug": 2}, ALL, PLACES, MANY)
    torch.testing.assert_close(mean(dit, 2, 1), torch.tensor(20.5), atol=1e-2, rtol=0)
    of_sum = float(dit.means({"type": torch.tensor([2]), "drug": torch.tensor([1])})[0, 0, 0])
    assert abs(of_sum - 20.5) > 0.3
    few = model({"type": 4, "drug": 2}, ALL, PLACES, 10.0)  # half of the interaction
    of_sum = float(few.means({"type": torch.tensor([2]), "drug": torch.tensor([1])})[0, 0, 0])
    assert float(mean(few, 2, 1)) == pytest.approx((of_sum + 20.5) / 2, abs=1e-2)


@pytest.mark.parametrize(("kind", "relative"), [(1, 0), (3, 2)])
def test_an_unseen_one_responds_as_its_near_relative_does(kind: int, relative: int) -> None:
    dit = model({"type": 4, "drug": 2}, [row for row in ALL if row != [kind, 1]], PLACES, MANY)
    of_sum = float(dit.means({"type": torch.tensor([kind]), "drug": torch.tensor([1])})[0, 0, 0])
    assert float(mean(dit, kind, 1)) == pytest.approx(PLACES[kind, 0] + response(relative), abs=0.1)
    assert abs(of_sum - PLACES[kind, 0] - response(relative)) > 0.5


def test_the_way_leads_there_from_either_side_and_conditions_may_stand_in_any_order() -> None:
    trained = [row for row in ALL if row != [1, 1]]
    dit = model({"type": 4, "drug": 2}, trained, PLACES, MANY)
    asked = {"type": torch.tensor([1, 1, 0]), "drug": torch.tensor([1, 1, 1])}
    of = {"type": torch.tensor([1, 0, 0]), "drug": torch.tensor([0, 1, 1])}
    way_BLZ = way(dit, of, asked)
    assert isinstance(way_BLZ, Tensor)
    torch.testing.assert_close(way_BLZ[:, 0, 0], torch.tensor([4.0, 1.0, 0.0]), atol=0.1, rtol=0)
    assert way_BLZ[2].abs().max() == 0
    other = model({"drug": 2, "type": 4}, [row[::-1] for row in trained], {k[::-1]: v for k, v in PLACES.items()}, MANY)
    torch.testing.assert_close(mean(other, 1, 1), mean(dit, 1, 1))


def test_of_three_conditions_a_relative_that_shares_most_says_most() -> None:
    """Donors shift little. The drug's response is the type's own, so another donor's cells of that type say it."""
    labels = [(kind, drug, donor) for kind in range(3) for drug in range(2) for donor in range(3)]
    place = {(k, d, n): 10.0 * k + d * (6.0, 1.0, 3.0)[k] + 0.3 * n for k, d, n in labels}
    dit = model({"type": 3, "drug": 2, "donor": 3}, [list(x) for x in labels if x != (0, 1, 2)], place, MANY)
    assert float(mean(dit, 0, 1, 2)) == pytest.approx(6.6, abs=0.1)


def test_a_condition_that_is_not_given_says_nothing() -> None:
    labels = [(kind, drug, donor) for kind in range(4) for drug in range(2) for donor in range(2)]
    place = {(k, d, n): PLACES[k, d] + 7.0 * n for k, d, n in labels}
    trained = [list(x) for x in labels if x[:2] != (1, 1)]
    dit = model({"type": 4, "drug": 2, "donor": 2}, trained, place, MANY)
    means, given = CombinationMeans(dit), torch.tensor([True, True, False])
    not_given = dit.n_labels["donor"]
    moved = means(torch.tensor([1, 1, not_given]), given) - means(torch.tensor([1, 0, not_given]), given)
    torch.testing.assert_close(moved, torch.full(LATENT, 4.0), atol=0.1, rtol=0)
    rows = torch.tensor([[0, 1, not_given], [2, 0, not_given]])
    torch.testing.assert_close(means.of_trained(rows, given), torch.stack([means(row, given) for row in rows]))


def test_without_a_relative_it_is_the_sum_of_its_shifts() -> None:
    trained = [[0, 0], [1, 0], [2, 1], [3, 1]]  # no type has both
    dit = model({"type": 4, "drug": 2}, trained, PLACES, MANY)
    of_sum = dit.means({"type": torch.tensor([1]), "drug": torch.tensor([1])})
    torch.testing.assert_close(mean(dit, 1, 1), of_sum[0, 0, 0])


def test_too_many_combinations_have_shifts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "INTERACTION_BYTES", 4 * len(ALL) * 12 - 1)
    dit = model({"type": 4, "drug": 2}, ALL, PLACES, MANY)
    assert dit.combinations.interaction_KLZ is None
    assert "combinations.interaction_KLZ" not in dit.state_dict()
    of_sum = dit.means({"type": torch.tensor([1]), "drug": torch.tensor([1])})
    torch.testing.assert_close(mean(dit, 1, 1), of_sum[0, 0, 0])


def test_weights_with_and_without_interactions_find_their_network() -> None:
    trained = [row for row in ALL if row != [1, 1]]
    dit, n_labels = model({"type": 4, "drug": 2}, trained, PLACES, MANY), {"type": 4, "drug": 2}
    tensors = dict(dit.state_dict())
    again = DiT.of_tensors(dit.config, *LATENT, n_labels, tensors)
    again.load_state_dict(tensors)
    torch.testing.assert_close(mean(again, 1, 1), mean(dit, 1, 1))
    del tensors["combinations.interaction_KLZ"]
    before = DiT.of_tensors(dit.config, *LATENT, n_labels, tensors)
    before.load_state_dict(tensors)
    assert before.combinations.interaction_KLZ is None


def test_the_nearest_is_chosen_by_the_ways_that_are_gone() -> None:
    """By the sum of shifts type 1 under the drug would lie far from type 0. It lies near, as measured."""
    dit = model({"type": 4, "drug": 2}, [row for row in ALL if row != [1, 1]], PLACES, MANY)
    base = nearest_trained(dit, {"type": torch.tensor([1]), "drug": torch.tensor([1])})
    assert (int(base["type"]), int(base["drug"])) == (0, 1)
