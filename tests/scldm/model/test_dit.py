"""The diffusion transformer: how it starts, and what its conditions may be called."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from scldm.errors import InputError
from scldm.model.dit import DiT, DiTConfig


def randomised(labels: dict[str, int]) -> DiT:
    torch.manual_seed(2)
    model = DiT(DiTConfig(16, 2, 2), 3, 4, labels).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def test_a_continuous_condition_has_a_known_scale() -> None:
    with pytest.raises(InputError, match=r"model.continuous.dose=lgo must be one of linear, log"):
        DiTConfig(continuous={"dose": "lgo"})


def test_it_starts_at_zero_velocity_and_learns_from_there() -> None:
    model = DiT(DiTConfig(16, 2, 2), 3, 4, {"a": 2})
    z, t = torch.randn(5, 3, 4), torch.rand(5)
    velocity = model(z, t, {"a": torch.zeros(5, dtype=torch.int64)})
    assert velocity.abs().max() == 0
    (velocity - 1).square().sum().backward()
    assert model.to_velocity.bias.grad is not None
    assert model.to_velocity.bias.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["type", "cell.type", "keys", "cell type"])
def test_a_condition_may_have_any_name(name: str) -> None:
    model = randomised({"other": 2, name: 3}).double()
    ids = {"other": torch.tensor([0, 0, 0]), name: torch.tensor([0, 1, 3])}
    z, t = torch.randn(1, 3, 4).double().expand(3, 3, 4), torch.full((3,), 0.5)
    by_label = model(z, t, ids)
    assert (by_label[1:] - by_label[:-1]).abs().amax((1, 2)).min() > 0.01
    # the order of the columns in a batch decides nothing
    torch.testing.assert_close(model(z, t, dict(reversed(ids.items()))), by_label)
    loaded = DiT(model.config, 3, 4, model.n_labels).double()
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(z, t, ids), by_label)


def test_time_and_tokens_are_told_apart() -> None:
    model = randomised({})
    z = torch.randn(1, 1, 4).expand(2, 3, 4)
    velocity = model(z, torch.tensor([0.1, 0.9]), {})
    assert (velocity[0] - velocity[1]).abs().max() > 0.01
    assert (velocity[0, 0] - velocity[0, 1]).abs().max() > 0.01


@pytest.mark.parametrize("other", [{"attention": "plain"}, {"recompute": True}])
def test_how_it_is_computed_changes_nothing(other: dict) -> None:
    model = randomised({"a": 2}).requires_grad_(True).double()
    same = DiT(replace(model.config, **other), 3, 4, {"a": 2}).double()
    same.load_state_dict(model.state_dict())
    z, t, ids = torch.randn(5, 3, 4).double(), torch.rand(5), {"a": torch.tensor([0, 1, 2, 0, 1])}
    for network in (model, same):
        network(z, t, ids).square().sum().backward()
    torch.testing.assert_close(same(z, t, ids), model(z, t, ids), atol=1e-9, rtol=1e-9)
    for p, q in zip(model.parameters(), same.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.exhaustive  # a minute, all of it torch's compiler
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_it_computes_the_same() -> None:
    model = randomised({"a": 2})
    same = DiT(replace(model.config, compile=True), 3, 4, {"a": 2}).eval().requires_grad_(False)
    same.load_state_dict(model.state_dict())
    z, t, ids = torch.randn(5, 3, 4), torch.rand(5), {"a": torch.tensor([0, 1, 2, 0, 1])}
    torch.testing.assert_close(same(z, t, ids), model(z, t, ids), atol=1e-4, rtol=1e-4)
