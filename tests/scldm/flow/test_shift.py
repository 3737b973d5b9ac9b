"""Combinations that were never trained, by the shift of labels: from where, and how far."""

from __future__ import annotations

import torch

from scldm.flow.generate import generate_latents
from scldm.flow.sampler import SamplerConfig
from scldm.flow.shift import nearest_trained, stays, way
from scldm.model.dit import DiT, DiTConfig

TRAINED = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]])  # type 2 was never trained with drug 1
TWINS = [[0, 0], [1, 0], [2, 0], [0, 1], [2, 1]]  # nor type 1, the second, here
NUMBERS_B = torch.arange(64)


def model(drug: float = 1.0) -> DiT:
    """A random network whose types lie 3 and whose drug lies `drug` apart, in every latent number."""
    torch.manual_seed(0)
    dit = DiT(DiTConfig(16, 1, 2), 3, 4, {"type": 3, "drug": 2}, combinations_KC=TRAINED).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.3)
    dit.latent_mean_LZ.fill_(5.0)
    dit.latent_std_LZ.fill_(2.0)
    mean_K = 3.0 * (TRAINED[:, 0] - 1) + drug * TRAINED[:, 1]
    dit.means.fit(TRAINED, torch.full((5,), 1e6), mean_K[:, None, None].expand(-1, 3, 4))
    return dit


def asked(kind: int, drug: int) -> dict[str, torch.Tensor]:
    return {"type": torch.full((64,), kind), "drug": torch.full((64,), drug)}


def ids(conditions: dict[str, torch.Tensor]) -> list[int]:
    return [int(of_cell[0]) for of_cell in conditions.values()]


def test_an_unseen_combination_comes_from_the_nearest_one_and_is_moved_by_what_differs() -> None:
    dit, sampler = model(), SamplerConfig("euler", 5)
    shift = dit.means.shift_1[1] - dit.means.shift_1[0]
    assert 0.8 < float(shift.mean()) < 1  # drawn towards 0
    base = nearest_trained(dit, asked(2, 1))
    way_BLZ = way(dit, base, asked(2, 1))
    assert ids(base) == [2, 0]  # the drug's shift is shorter than that of a type
    torch.testing.assert_close(way_BLZ, shift.expand(64, 3, 4))
    found = generate_latents(dit, asked(2, 1), NUMBERS_B, 0, SamplerConfig("euler", 5, guidance="shift"))
    control = generate_latents(dit, asked(2, 0), NUMBERS_B, 0, sampler)
    torch.testing.assert_close(found.latent_BLZ, control.latent_BLZ + 2.0 * shift)
    # and from another type under the drug, where that is nearer
    assert ids(nearest_trained(model(drug=9.0), asked(2, 1))) == [1, 1]


def test_a_near_relative_is_preferred_to_a_slightly_shorter_way() -> None:
    """Types lie at 0, 1 and 20: the second is near the first, as types go, though the drug's way is shorter."""
    dit = DiT(DiTConfig(16, 1, 2), 3, 4, {"type": 3, "drug": 2}, combinations_KC=torch.tensor(TWINS))
    place = torch.tensor([0.0, 1.0, 20.0])[torch.tensor(TWINS)[:, 0]] + 0.9 * torch.tensor(TWINS)[:, 1]
    dit.means.fit(torch.tensor(TWINS), torch.full((5,), 1e6), place[:, None, None].expand(-1, 3, 4))
    base = nearest_trained(dit, asked(1, 1))
    way_BLZ = way(dit, base, asked(1, 1))
    assert ids(base) == [0, 1]
    assert float(way_BLZ.square().sum((1, 2))[0]) > float((dit.means.shift_1[1] - dit.means.shift_1[0]).square().sum())


def test_what_was_trained_or_is_not_given_stays_as_it_is() -> None:
    dit = model()
    for kind, drug in [(0, 0), (1, 1), (2, 2), (3, 1), (3, 2)]:  # 3 and 2 are "not given"
        conditions = asked(kind, drug)
        assert nearest_trained(dit, conditions) is conditions
        assert way(dit, conditions, conditions) == 0
        assert stays(dit, asked(0, 0), conditions) is conditions
        by = [generate_latents(dit, asked(kind, drug), NUMBERS_B, 0, SamplerConfig(n_steps=2, guidance=g)).latent_BLZ
              for g in ("joint", "shift")]  # fmt: skip
        assert torch.equal(*by)


def test_cells_of_several_combinations_each_have_their_own() -> None:
    dit = model()
    conditions = {"type": torch.tensor([2, 0, 2, 1]), "drug": torch.tensor([1, 1, 0, 2])}
    base = nearest_trained(dit, conditions)
    way_BLZ = way(dit, base, conditions)
    assert (base["type"].tolist(), base["drug"].tolist()) == ([2, 0, 2, 1], [0, 1, 0, 2])
    assert (way_BLZ.abs().amax((1, 2)) > 0).tolist() == [True, False, False, False]


def test_a_label_without_a_shift_is_asked_for_itself() -> None:
    """Shifts are fitted on some cells alone: a shift of 0 that stands for nothing is no near relative."""
    dit = model()
    dit.means.fit(
        TRAINED[[0, 1, 3, 4]], torch.full((4,), 1e6), torch.tensor([-3.0, 0, -2, 1])[:, None, None].expand(4, 3, 4)
    )
    assert not dit.means.has_shift_0[2]
    base = nearest_trained(dit, asked(2, 1))
    assert ids(base) == [2, 0]  # the type stays, as it has no way to another


def test_values_are_left_to_the_network() -> None:
    config = DiTConfig(16, 1, 2, continuous={"dose": "linear"})
    trained = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 1]])
    labels, values = {"type": 2, "drug": 2, "dose": 2}, {"dose": torch.tensor([1.0, 3.0])}
    dit = DiT(config, 3, 4, labels, values=values, combinations_KC=trained)
    dit.means.fit(trained, torch.full((3,), 1e6), torch.tensor([0.0, 5.0, 1.0])[:, None, None].expand(-1, 3, 4))
    conditions = {"type": torch.tensor([1]), "drug": torch.tensor([1]), "dose": torch.tensor([2.2])}
    base = nearest_trained(dit, conditions)
    assert ids({"type": base["type"], "drug": base["drug"]}) == [1, 0]
    assert base["dose"].tolist() == conditions["dose"].tolist()


def test_own_cells_stay_where_the_flow_knows_no_way() -> None:
    dit = model()
    own = {"type": torch.tensor([2, 0]), "drug": torch.tensor([0, 0])}
    other = {"type": torch.tensor([2, 0]), "drug": torch.tensor([1, 1])}
    by_flow = stays(dit, own, other)
    way_BLZ = way(dit, by_flow, other)
    assert (by_flow["type"].tolist(), by_flow["drug"].tolist()) == ([2, 0], [0, 1])
    torch.testing.assert_close(way_BLZ[0], dit.means.shift_1[1] - dit.means.shift_1[0])
    assert way_BLZ[1].abs().max() == 0


def test_own_cells_go_by_the_flow_where_a_label_has_no_shift() -> None:
    dit = model()
    few = TRAINED[[0, 1, 2]]  # without a cell under drug 1, of which the shift is then 0 and means nothing
    dit.means.fit(few, torch.full((3,), 1e6), torch.tensor([-3.0, 0, 3])[:, None, None].expand(3, 3, 4))
    own, other = (
        {"type": torch.tensor([2]), "drug": torch.tensor([0])},
        {"type": torch.tensor([2]), "drug": torch.tensor([1])},
    )
    assert stays(dit, own, other) is other
