"""Classifier-free guidance of every kind: what it gives, at which weights, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scldm.errors import InputError
from scldm.flow.generate import generate_latents
from scldm.flow.guidance import GuidedField, composition
from scldm.flow.sampler import SamplerConfig
from scldm.model.dit import DiT, DiTConfig

LABELS = {"type": 3, "donor": 2}
IDS = {"type": torch.tensor([0, 1, 2, 3, 1]), "donor": torch.tensor([0, 1, 2, 0, 1])}  # 3 and 2 are "not given"
Z, T = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).double(), 0.4


@pytest.fixture
def model() -> DiT:
    """A transformer with random weights; at its own start it gives 0 whatever is asked. Trained on type 0 with donor 0,
    type 1 with either and type 2 with donor 1."""
    return random_model(LABELS, [[0, 0], [1, 0], [1, 1], [2, 1]])


def random_model(labels: dict[str, int], trained: list[list[int]], **more: Any) -> DiT:
    torch.manual_seed(1)
    model = DiT(DiTConfig(16, 1, 2, **more), 3, 4, labels, combinations_KC=torch.tensor(trained)).double()
    for parameter in model.eval().requires_grad_(False).parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.fixture
def rows_asked(model: DiT) -> list[int]:
    """How many rows each call of the network had."""
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    return rows


def answer(model: DiT, shown: dict[str, Tensor]) -> Tensor:
    return model(Z, torch.full((5,), T), shown)


def evaluations(field: GuidedField) -> Tensor:
    """Of each cell."""
    assert isinstance(field.n_evaluations_B, Tensor)
    return field.n_evaluations_B


def field_of(model: DiT, ids: dict[str, Tensor], guidance: Any = "joint", size_B: Any = None, **of: Any) -> GuidedField:
    """of: keys of the sampler that begin with guidance_"""
    sampler = SamplerConfig(guidance=guidance, **{f"guidance_{key}": value for key, value in of.items()})
    return GuidedField(model, ids, sampler, size_B)


def null(name: str) -> Tensor:
    return torch.full((5,), LABELS[name])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected)  # in float64


def test_guidance_is_eq_11_and_costs_one_call(model: DiT, rows_asked: list[int]) -> None:
    given, free = answer(model, IDS), answer(model, {name: null(name) for name in LABELS})
    assert (given - free)[:2].abs().max() > 0.1  # else this tests nothing
    rows_asked.clear()
    torch.testing.assert_close(field_of(model, IDS, scale=0)(Z, T), free)
    torch.testing.assert_close(field_of(model, IDS, scale=1)(Z, T), given)
    assert rows_asked == [5, 5]
    field = field_of(model, IDS, scale=2)
    close(field(Z, T), free + 2 * (given - free))
    # one call on a doubled batch
    assert rows_asked == [5, 5, 10]
    assert evaluations(field).tolist() == [2] * 5


def test_every_subset_of_the_conditions_is_told_the_library_size() -> None:
    model, size_B = random_model(LABELS, [[0, 0]], library_size=True), torch.tensor([1.0, 2, 3, 4, 5]).double()
    t, free = torch.full((5,), T), {name: null(name) for name in LABELS}
    given_v, free_v = (model(Z, t, shown, size_B=size_B) for shown in (IDS, free))
    close(field_of(model, IDS, scale=2, size_B=size_B)(Z, T), free_v + 2 * (given_v - free_v))
    close(field_of(model, IDS, size_B=size_B)(Z, T), given_v)
    assert (given_v - model(Z, t, IDS, size_B=size_B.flip(0)))[[0, 1, 3, 4]].abs().amax((1, 2)).min() > 1e-3
    alone = random_model({}, [[]], library_size=True)
    close(field_of(alone, {}, size_B=size_B)(Z, T), alone(Z, t, {}, size_B=size_B))


def test_a_cell_without_conditions_is_asked_for_once(model: DiT) -> None:
    some = {name: torch.where(torch.arange(5) < 2, null(name), torch.zeros(5, dtype=torch.int64)) for name in LABELS}
    field = field_of(model, some, scale=2)
    found = field(Z, T)
    assert evaluations(field).tolist() == [1, 1, 2, 2, 2]
    free = answer(model, {name: null(name) for name in LABELS})
    close(found, free + 2 * (answer(model, some) - free))


def test_additive_guidance_has_a_weight_for_each_condition(model: DiT, rows_asked: list[int]) -> None:
    free = answer(model, {name: null(name) for name in LABELS})
    of_type = answer(model, {**IDS, "donor": null("donor")})
    of_donor = answer(model, {**IDS, "type": null("type")})
    rows_asked.clear()
    field = field_of(model, IDS, "additive", weights={"type": 1.5, "donor": 0.25})
    close(field(Z, T), free + 1.5 * (of_type - free) + 0.25 * (of_donor - free))
    assert len(rows_asked) == 1
    assert rows_asked[0] == 2 + 3 + 3 + 2 + 3  # cell 2 has no donor, cell 3 no type
    # one condition of weight 1 alone, and all of weight 0
    close(field_of(model, IDS, "additive", weights={"type": 1, "donor": 0})(Z, T), of_type)
    close(field_of(model, IDS, "additive", scale=0)(Z, T), free)
    assert rows_asked[1:] == [5, 5]
    # a condition without a weight of its own has the scale
    close(field_of(model, IDS, "additive", scale=0.25, weights={"type": 1.5})(Z, T), field(Z, T))
    with pytest.raises(InputError, match="condition 'typ' is unknown. The model knows type, donor"):
        field_of(model, IDS, "additive", weights={"typ": 1})


def test_guidance_acts_within_its_interval(model: DiT) -> None:
    field = field_of(model, IDS, scale=2, **{"from": 0.3, "to": 0.7})
    everywhere, nowhere = field_of(model, IDS, scale=2), field_of(model, IDS, scale=1)
    for t, other in ((0.29, nowhere), (0.3, everywhere), (0.7, everywhere), (0.71, nowhere)):
        field.n_evaluations_B = other.n_evaluations_B = 0
        assert torch.equal(field(Z, t), other(Z, t)), t
        assert torch.equal(evaluations(field), evaluations(other))


# --- compositional -------------------------------------------------------------------------------------------------


def parts(*names: str) -> frozenset[frozenset[int]]:
    """The family of all parts of some sets, each written as its digits."""
    every: set[frozenset[int]] = {frozenset()}
    for name in names:
        for bits in range(2 ** len(name)):
            every.add(frozenset(int(digit) for k, digit in enumerate(name) if bits >> k & 1))
    return frozenset(every)


@pytest.mark.parametrize(
    "largest, expected",
    [
        (("01",), {"01": 1}),
        (("0", "1"), {"0": 1, "1": 1, "": -1}),
        (("02", "12"), {"02": 1, "12": 1, "2": -1}),
        (("01", "02", "12"), {"01": 1, "02": 1, "12": 1, "0": -1, "1": -1, "2": -1, "": 1}),
        (("01", "2"), {"01": 1, "2": 1, "": -1}),
        ((), {"": 1}),
    ],
)
def test_a_composition_counts_every_condition_once(largest: tuple[str, ...], expected: dict[str, float]) -> None:
    found = composition(parts(*largest))
    assert found == {frozenset(map(int, name)): weight for name, weight in expected.items()}
    for condition in {digit for name in largest for digit in name}:
        assert sum(weight for subset, weight in found.items() if int(condition) in subset) == 1
    assert sum(found.values()) == 1


def test_compositional_guidance_composes_only_what_was_never_trained(model: DiT) -> None:
    ids = {"type": torch.tensor([0, 0, 1, 2, 3]), "donor": torch.tensor([0, 1, 1, 0, 0])}
    unseen = torch.tensor([False, True, False, True, False])
    free = answer(model, {name: null(name) for name in LABELS})
    joint = answer(model, ids)
    composed = answer(model, {**ids, "donor": null("donor")}) + answer(model, {**ids, "type": null("type")}) - free
    followed = torch.where(unseen[:, None, None], composed, joint)
    assert (composed - joint)[unseen].abs().max() > 0.01
    field = field_of(model, ids, "compositional")
    close(field(Z, T), followed)
    assert evaluations(field).tolist() == [1, 3, 1, 3, 1]  # what was trained costs one evaluation
    close(field_of(model, ids, "compositional", scale=3)(Z, T), free + 3 * (followed - free))
    close(field_of(model, ids, "compositional", scale=0)(Z, T), free)


def test_a_label_that_no_cell_had_is_left_out_of_no_part() -> None:
    """As one known by its features alone: with it, what was trained of the others is shown."""
    model = random_model({"type": 3, "gene": 3}, [[0, 0], [1, 1]])  # nothing of gene 2 nor type 2
    field = field_of(model, {"type": torch.tensor([0]), "gene": torch.tensor([2])}, "compositional")
    assert field.inside is not None
    assert field.inside.plain
    assert {name: int(ids) for name, ids in field.inside.conditions.items()} == {"type": 0, "gene": 2}


def test_a_model_that_does_not_know_what_it_was_trained_on_composes_nothing(model: DiT) -> None:
    model.combinations.labels_KC = torch.zeros(0, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="names no combinations"):
        field_of(model, IDS, "compositional")


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, calls",
    [
        ({"method": "euler", "n_steps": 4}, [5] * 4),
        ({"method": "heun", "n_steps": 4}, [5] * 8),
        ({"method": "heun", "n_steps": 4, "guidance_scale": 2.0}, [10] * 8),
        ({"method": "sde_euler", "n_steps": 4}, [5] * 4),
        ({"method": "sde_heun", "n_steps": 4, "guidance_scale": 2.0}, [10] * 8),
        ({"method": "euler", "n_steps": 4, "guidance": "additive"}, [15] * 4),
        (
            {"method": "euler", "n_steps": 4, "guidance_scale": 2.0, "guidance_from": 0.5, "guidance_to": 0.8},
            [5, 10, 10, 5],
        ),
    ],
)
def test_sampling_costs_what_the_config_says(model: DiT, rows_asked: list[int], settings: Any, calls) -> None:
    ids, model = {name: torch.zeros(5, dtype=torch.int64) for name in LABELS}, model.float()
    sampler = SamplerConfig(**settings)
    drawn = generate_latents(model, ids, torch.arange(5), 0, sampler)
    assert rows_asked == calls
    assert drawn.n_evaluations_B.tolist() == [sum(calls) // 5] * 5
    # a cell's latents are its own: another seed or number gives others, another batch does not
    alone = generate_latents(model, {k: v[:1] for k, v in ids.items()}, torch.tensor([3]), 0, sampler).latent_BLZ
    other = generate_latents(model, ids, torch.arange(5), 1, sampler).latent_BLZ
    apart = (other[3] - drawn.latent_BLZ[3]).abs().max()
    assert apart > 0.1
    assert (alone[0] - drawn.latent_BLZ[3]).abs().max() < 1e-3 * apart  # sums of float32 in another order


@pytest.mark.heavy
def test_the_adaptive_solver_says_what_it_cost(model: DiT, rows_asked: list[int]) -> None:
    pytest.importorskip("torchdiffeq", reason="needs the extra `ode`")
    ids = {name: torch.zeros(5, dtype=torch.int64) for name in LABELS}
    drawn = generate_latents(model.float(), ids, torch.arange(5), 0, SamplerConfig("adaptive", tolerance=1e-4))
    assert drawn.n_evaluations_B.tolist() == [sum(rows_asked) // 5] * 5
    assert sum(rows_asked) >= 5 * 12


def test_latents_come_back_on_the_autoencoders_scale(model: DiT) -> None:
    ids = {name: torch.zeros(4, dtype=torch.int64) for name in LABELS}
    sampler, model = SamplerConfig(n_steps=2), model.float()
    plain = generate_latents(model, ids, torch.arange(4), 0, sampler).latent_BLZ
    model.latent_mean_LZ += 5.0
    model.latent_std_LZ *= 3.0
    torch.testing.assert_close(generate_latents(model, ids, torch.arange(4), 0, sampler).latent_BLZ, plain * 3 + 5)
    torch.testing.assert_close(model.standardise(plain * 3 + 5), plain, atol=1e-5, rtol=1e-5)


def test_a_model_without_conditions_is_sampled_all_the_same() -> None:
    model = random_model({}, [[]]).float()
    drawn = generate_latents(model, {}, torch.arange(5), 0, SamplerConfig("heun", 3, guidance_scale=2.0))
    assert drawn.latent_BLZ.shape == (5, 3, 4)
    assert drawn.n_evaluations_B.tolist() == [6] * 5


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"n_steps": 0}, "n_steps=0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_weights": {"type": 1.0}}, "are for guidance=additive. shift has one scale"),
        ({"guidance": "additive", "guidance_weights": {"type": -1.0}}, "guidance_weights.type=-1"),
        ({"guidance_from": 0.7, "guidance_to": 0.3}, "sampler.guidance_from=0.7 and sampler.guidance_to=0.3"),
        ({"guidance_to": 1.5}, "guidance_to=1.5"),
        ({"tolerance": 0.0}, "tolerance=0"),
        ({"diffusion": 0.0}, "diffusion=0"),
    ],
)
def test_a_sampler_that_makes_no_sense_is_refused_by_its_key(settings: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        SamplerConfig(**settings)
