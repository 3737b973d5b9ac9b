"""Conditions besides a plain table: values, vectors, tokens of combinations; not given, or never trained."""

from __future__ import annotations

import math

import pytest
import torch

from scldm.errors import InputError
from scldm.flow.guidance import GuidedField
from scldm.flow.path import interpolate
from scldm.flow.sampler import SamplerConfig
from scldm.flow.solver import heun
from scldm.model.conditions import CombinationTokens, FeatureEmbedding, ValueEmbedding
from scldm.model.dit import DiT, DiTConfig

NAN = float("nan")
DOSES = torch.tensor([0.0, 0.1, 1.0, 10.0])


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return module


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_value_between_two_lies_between_them_and_not_given_is_its_own(scale) -> None:
    embedding = randomised(ValueEmbedding(DOSES, scale, 8))
    at = embedding(torch.tensor([1.0, 1.001, 1.1, NAN, NAN]))
    assert torch.equal(at[3], at[4])
    near, far = (at[1] - at[0]).norm(), (at[2] - at[0]).norm()
    assert 0 < near < far / 20
    assert (at[3] - at[0]).norm() > 0.1
    # decades are evenly spread on the log scale and not on the linear one
    x = embedding._standardised(DOSES)
    assert (abs((x[3] - x[2]) / (x[2] - x[1]) - 1) < 0.5) == (scale == "log")
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=4 * 2**-23 * float(x.abs().max()), rtol=0)  # 4 numbers
    assert embedding.label_ids(torch.tensor([0.1, 10.0, 0.5, NAN])).tolist() == [1, 3, 4, 4]


@pytest.mark.parametrize(
    "values, scale, said",
    [([-1.0, 1.0], "log", "value -1 has no logarithm"), ([2.0, 2.0], "linear", "all labels are 2")],
)
def test_values_that_say_nothing_are_refused(values, scale, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ValueEmbedding(torch.tensor(values), scale, 8)


def test_a_label_known_by_its_vector_is_told_by_it_alone() -> None:
    features = torch.tensor([[0.0, 5.0, 1.0], [1.0, 3.0, 1.0], [0.0, 5.0, 1.0], [2.0, 0.0, 1.0]])
    embedding = randomised(FeatureEmbedding(features, 8)).double()
    at = embedding(torch.tensor([0, 1, 2, 3, 4]))
    torch.testing.assert_close(at[0], at[2])  # the same vector
    assert torch.pdist(at[[0, 1, 3, 4]]).min() > 0.1
    assert at.isfinite().all()  # a column that is the same for all labels says nothing and harms nothing
    # its scale does not matter
    other = randomised(FeatureEmbedding(1e4 * features, 8)).double()
    torch.testing.assert_close(other(torch.arange(5)), at)


def test_only_trained_combinations_have_a_token() -> None:
    tokens = randomised(CombinationTokens(torch.tensor([[2, 1], [0, 0], [1, 1]]), (3, 2), 8, tokens=True))
    tokens.embedding.weight.data[-1] = 0
    ids = torch.tensor([[0, 0], [1, 1], [2, 1], [0, 1], [1, 2], [3, 2]])
    assert tokens.index(ids).tolist() == [0, 1, 2, 3, 3, 3]
    at = tokens(ids, None)
    assert at[3:].abs().max() == 0
    assert torch.pdist(at[:4]).min() > 0.1
    assert torch.equal(tokens(ids, torch.tensor([True, False, True, True, True, True]))[1], torch.zeros(8))
    assert tokens.index(ids[:0]).tolist() == []


def test_combinations_of_many_conditions_with_many_labels_are_told_apart() -> None:
    """Ten conditions of 100 labels: 1e20 combinations, more than 64 bits number."""
    generator = torch.Generator().manual_seed(0)
    trained = torch.randint(0, 100, (300, 10), generator=generator)
    trained[100:200] = trained[:100]
    trained[100:200, 9] = (trained[:100, 9] + 1) % 100  # alike but for the last
    tokens = CombinationTokens(trained, (100,) * 10, 8, tokens=False)
    known = {tuple(row): k for k, row in enumerate(tokens.labels_KC.tolist())}
    assert list(known) == sorted(map(tuple, trained.tolist()))
    hidden, other = trained[:50].clone(), trained[:50].clone()
    hidden[:, 4], other[:, 0] = 100, (other[:, 0] + 1) % 100
    asked = torch.cat((trained, hidden, other))[torch.randperm(400, generator=generator)]
    assert tokens.index(asked).tolist() == [known.get(tuple(row), 300) for row in asked.tolist()]


def test_trained_parts_are_those_that_cells_had_together() -> None:
    tokens = CombinationTokens(torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]]), (3, 2, 2), 8, tokens=False)
    ids = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [2, 0, 0]])
    given = torch.tensor([[True] * 3] * 3 + [[True, False, True]] + [[True] * 3])
    found = [{"".join(map(str, sorted(part))) for part in family} for family in tokens.trained_parts(ids, given)]
    every = {"", "0", "1", "2", "01", "02", "12", "012"}
    assert found[0] == every
    assert found[1] == {"", "0", "1", "2", "01"}
    assert found[2] == {"", "0", "1", "2", "01", "12"}
    assert found[3] == {"", "0", "2", "02"}
    assert found[4] == every  # label 2 was never trained: nothing is left out because of it


def test_a_model_with_all_kinds_of_conditions_starts_trains_and_is_loaded_again() -> None:
    torch.manual_seed(0)
    table = {"values": {"dose": DOSES}, "features": {"gene": torch.randn(5, 7)}}
    config = DiTConfig(16, 1, 2, continuous={"dose": "log"}, combination_tokens=True)
    labels = {"dose": 4, "gene": 5, "donor": 2}
    model = DiT(config, 3, 4, labels, combinations_KC=torch.tensor([[3, 0, 1], [0, 4, 0]]), **table)
    assert model.combinations.embedding.weight[-1].abs().max() == 0
    ids = {"dose": torch.tensor([3, 0]), "gene": torch.tensor([0, 4]), "donor": torch.tensor([1, 0])}
    given = model.of_labels(ids)
    assert given["dose"].tolist() == [10.0, 0.0]
    assert torch.equal(model.label_ids(given), torch.tensor([[3, 0, 1], [0, 4, 0]]))
    hidden = {"dose": torch.tensor([NAN, NAN]), "gene": torch.tensor([5, 5]), "donor": torch.tensor([2, 2])}
    assert model.is_given(given).all()
    assert not model.is_given(hidden).any()
    torch.nn.init.normal_(model.to_velocity.weight)
    torch.nn.init.normal_(model.blocks[0].modulation.weight)
    torch.nn.init.normal_(model.modulation_out.weight)
    model(torch.randn(2, 3, 4), torch.rand(2), given).square().sum().backward()
    model(torch.randn(2, 3, 4), torch.rand(2), hidden).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    loaded = DiT.of_tensors(config, 3, 4, labels, model.state_dict())
    loaded.load_state_dict(model.state_dict())
    z, t = torch.randn(2, 3, 4), torch.rand(2)
    assert torch.equal(loaded(z, t, given), model(z, t, given))


# --- library sizes -------------------------------------------------------------------------------------------------


def test_library_sizes_are_told_by_their_logarithm() -> None:
    """Every cell by itself, standardised, and in the network's answer. A cell without counts is finite."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(16, 1, 2, library_size=True), 3, 4, {"type": 2})
    randomised(model)
    model.size.log_moments.copy_(torch.tensor([math.log(1e4), 0.5]))
    size_B = torch.tensor([1e4, 1e4 * math.exp(0.5), 0.0])
    told_BD = model.size(size_B)
    first, *_ = model.size.mlp
    for row, x in enumerate((0.0, 1.0, -2 * math.log(1e4))):
        waves = torch.tensor([x, *(of(f * math.pi / 2 * x) for of in (math.sin, math.cos) for f in (0.5, 1, 2))])
        torch.testing.assert_close(told_BD[row], model.size.mlp[1:](first(waves)), atol=1e-5, rtol=1e-5)
    z, t, ids = torch.randn(3, 3, 4), torch.rand(3), {"type": torch.tensor([0, 1, 2])}
    answer = model(z, t, ids, size_B=size_B)
    other = model(z, t, ids, size_B=size_B * torch.tensor([1.0, 2.0, 1.0]))
    moved = (answer - other).abs().amax((1, 2))
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() < 1e-6
    with pytest.raises(AssertionError, match="told library sizes"):
        model(z, t, ids)


# --- means of conditions -------------------------------------------------------------------------------------------


def with_means() -> tuple[DiT, torch.Tensor]:
    """A network at its start whose shifts were fitted on 11 of 4 x 3 combinations of additive means, and the means;
    all in float64."""
    generator = torch.Generator().manual_seed(0)
    of_type, of_drug = torch.randn(4, 1, 3, 4, generator=generator), torch.randn(1, 3, 3, 4, generator=generator)
    true = (of_type + of_drug - (of_type.mean(0) + of_drug.mean(1))).double()
    model = DiT(DiTConfig(16, 1, 2, condition_means=True), 3, 4, {"type": 4, "drug": 3}).double()
    rows = torch.cartesian_prod(torch.arange(4), torch.arange(3))[:-1]  # (3, 2) was never trained
    n_cells = torch.tensor([1_000.0, 200.0] * 5 + [50.0])
    model.means.fit(rows, n_cells, true[rows[:, 0], rows[:, 1]])
    return model, true


def test_a_combination_never_trained_has_the_shifts_of_its_parts() -> None:
    model, true = with_means()
    ids = {"type": torch.tensor([3, 1, 3, 4]), "drug": torch.tensor([2, 0, 3, 3])}
    found = model.means(ids)
    assert (found[0] - true[3, 2]).norm() < 0.15 * true[3, 2].norm()
    assert (found[1] - true[1, 0]).norm() < 0.1 * true[1, 0].norm()
    assert torch.equal(found[2], model.means.shift_0[3])
    assert found[3].abs().max() == 0
    # fitted again, it is the same
    before = model.means.shift_0.clone()
    rows = torch.cartesian_prod(torch.arange(4), torch.arange(3))[:-1]
    model.means.fit(rows, torch.tensor([1_000.0, 200.0] * 5 + [50.0]), true[rows[:, 0], rows[:, 1]])
    torch.testing.assert_close(model.means.shift_0, before)


def test_shifts_of_nested_conditions_are_the_least_squares() -> None:
    """Twenty donors in two diseases, fifty types: in either order of the conditions, as a direct solution has it; and
    a label of no combination has none."""
    generator = torch.Generator().manual_seed(0)
    donor, kind = torch.cartesian_prod(torch.arange(20), torch.arange(50)).unbind(1)
    rows = torch.stack([donor, donor % 2, kind], 1)
    mean = torch.randn(1000, 1, 1, generator=generator).double() + (2.0 * (donor % 2) - 1)[:, None, None]
    n_cells = torch.randint(1, 500, (1000,), generator=generator).float()
    sizes = [21, 2, 50]  # the last donor has no cells
    one_hot = torch.cat([torch.nn.functional.one_hot(rows[:, k], n) for k, n in enumerate(sizes)], 1).double()
    weighted = one_hot * (n_cells / (n_cells + 10)).double()[:, None]
    best = torch.linalg.solve(weighted.T @ one_hot + 0.1 * torch.eye(73).double(), weighted.T @ mean[:, 0])[:, 0]
    for order in ([0, 1, 2], [1, 0, 2]):
        labels = {f"c{k}": sizes[k] for k in order}
        means = DiT(DiTConfig(16, 1, 2), 1, 1, labels).double().means
        means.fit(rows[:, order], n_cells, mean)
        found = {k: means.get_buffer(f"shift_{at}").flatten() for at, k in enumerate(order)}
        torch.testing.assert_close(torch.cat([found[k][:-1] for k in (0, 1, 2)]), best, atol=1e-6, rtol=0)
        has = means.get_buffer(f"has_shift_{order.index(0)}")
        assert has.tolist() == [True] * 20 + [False, False]


def test_the_network_sees_the_flow_around_the_mean() -> None:
    """Untrained it answers 0, and the flow takes noise to noise around the mean; trained or not, the flow of z with
    mean m is that of z - m."""
    model, _ = with_means()
    ids = {"type": torch.tensor([3, 1, 4]), "drug": torch.tensor([2, 0, 3])}
    noise = torch.randn(3, 3, 4, dtype=torch.float64)
    mean = model.means(ids)
    torch.testing.assert_close(heun(GuidedField(model, ids, SamplerConfig()), noise, 5), noise + mean)
    randomised(model)
    plain = DiT(DiTConfig(16, 1, 2), 3, 4, {"type": 4, "drug": 3}).double()
    plain.load_state_dict(model.state_dict())
    t, z = torch.tensor([0.1, 0.5, 0.9]).double(), torch.randn(3, 3, 4, dtype=torch.float64)
    moved = interpolate(z + mean, noise, t)
    torch.testing.assert_close(model(moved, t, ids), plain(interpolate(z, noise, t), t, ids) - mean)


def test_values_and_vectors_have_no_shift() -> None:
    config = DiTConfig(16, 1, 2, continuous={"dose": "log"}, condition_means=True)
    tables = {"values": {"dose": DOSES}, "features": {"gene": torch.randn(5, 7)}}
    model = DiT(config, 3, 4, {"dose": 4, "gene": 5, "donor": 2}, **tables)
    assert list(model.means.names.values()) == ["donor"]
    loaded = DiT.of_tensors(config, 3, 4, model.n_labels, model.state_dict())
    loaded.load_state_dict(model.state_dict())
