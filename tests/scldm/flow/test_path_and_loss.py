"""The path from data to noise, the loss on it, and which conditions a training cell shows."""

from __future__ import annotations

import torch

from scldm import draws
from scldm.batch import LatentBatch
from scldm.flow.loss import drop_conditions, velocity_loss_B
from scldm.flow.path import interpolate, velocity
from scldm.model.dit import DiT, DiTConfig
from scldm.train.losses import Draws, FlowConfig, GuidanceConfig, LDMStage

B, L, Z = 5, 3, 2


def test_the_path_runs_from_data_to_noise_with_its_velocity_as_derivative() -> None:
    z, noise = torch.randn(2, B, L, Z, dtype=torch.float64)
    assert torch.equal(interpolate(z, noise, torch.zeros(B, dtype=torch.float64)), z)
    assert torch.equal(interpolate(z, noise, torch.ones(B, dtype=torch.float64)), noise)
    t, h = torch.rand(B, dtype=torch.float64), 1e-5
    slope = (interpolate(z, noise, t + h) - interpolate(z, noise, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity(z, noise), atol=1e-9, rtol=0)


def test_the_loss_is_the_squared_error_of_the_velocity_at_the_interpolated_point() -> None:
    z, noise = torch.randn(2, B, L, Z)
    t = torch.rand(B)
    seen = []

    class Off(torch.nn.Module):
        """The true velocity, with an error of 2 in the last cell."""

        def forward(self, z_t, t_B, conditions):
            seen.append((z_t, t_B, conditions))
            return velocity(z, noise) + torch.tensor([0.0, 0, 0, 0, 2])[:, None, None]

    conditions = {"type": torch.arange(B)}
    loss = velocity_loss_B(Off(), z, noise, t, conditions)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0, 0, 0, 4]))
    assert torch.equal(seen[0][0], interpolate(z, noise, t))
    assert seen[0][1] is t
    assert seen[0][2] is conditions


def test_conditions_are_dropped_as_often_as_asked() -> None:
    """All at once with drop_all, and each by itself with drop_each of the rest, independently."""
    model = DiT(DiTConfig(8, 1, 1), L, Z, {"type": 3, "donor": 2})
    n, drop_all, drop_each = 20_000, 0.2, 0.3
    shown = {"type": torch.arange(n) % 3, "donor": torch.arange(n) % 2}
    u = draws.uniform(0, "conditions", 0, torch.arange(n), 3)
    dropped = drop_conditions(model, shown, u, drop_all, drop_each)
    hidden = {name: ids == model.null(name) for name, ids in dropped.items()}
    for name, ids in dropped.items():
        assert torch.equal(ids[~hidden[name]], shown[name][~hidden[name]])
        # standard error of a share over 20,000: 0.0035
        assert abs(hidden[name].double().mean() - (drop_all + (1 - drop_all) * drop_each)) < 0.012
    both = (hidden["type"] & hidden["donor"]).double().mean()
    assert abs(both - (drop_all + (1 - drop_all) * drop_each**2)) < 0.012
    kept = drop_conditions(model, shown, u, 0.0, 0.0)
    assert all(torch.equal(kept[name], shown[name]) for name in shown)


def test_the_only_condition_is_dropped_by_drop_all_alone() -> None:
    model = DiT(DiTConfig(8, 1, 1), L, Z, {"type": 3})
    n = 20_000
    u = draws.uniform(0, "conditions", 0, torch.arange(n), 2)
    dropped = drop_conditions(model, {"type": torch.arange(n) % 3}, u, 0.2, 0.3)
    assert abs((dropped["type"] == 3).double().mean() - 0.2) < 0.012


def test_tokens_and_continuous_conditions_are_hidden_too() -> None:
    """What a training batch shows: values instead of ids, NaN where hidden; a token as often as asked, in validation
    always; flow times of the asked distribution in training, uniform in validation."""
    n = 20_000
    config = DiTConfig(8, 1, 1, continuous={"dose": "linear"}, combination_tokens=True)
    model = DiT(
        config, L, Z, {"dose": 2}, values={"dose": torch.tensor([3.0, 7.0])}, combinations_KC=torch.tensor([[0]])
    )
    stage = LDMStage(model, GuidanceConfig(0.2, 0.0, 0.3), FlowConfig("logit_normal", 1.0, 0.5))
    seen = []

    def network(z, t_B, conditions, with_token_B=None):
        seen.append((t_B, conditions["dose"], with_token_B))
        return torch.zeros_like(z)

    one, ids = torch.ones(n), torch.arange(n) % 2
    batch = LatentBatch(
        torch.zeros(n, L, Z), library_size_all_B=one, weight_B=one, conditions={"dose": ids},
        cell_ids_B2=torch.zeros(n, 2), positions_B=torch.arange(n), n_cells=n,
    )  # fmt: skip
    draw = Draws(0, 0, batch.positions_B)
    stage.loss(network, batch, draw)
    stage.validation(network, batch, draw)
    (t, dose, with_token), (t_valid, dose_valid, with_token_valid) = seen
    hidden = dose.isnan()
    assert abs(hidden.double().mean() - 0.2) < 0.012
    assert torch.equal(dose[~hidden], torch.tensor([3.0, 7.0])[ids][~hidden])
    assert abs(with_token.double().mean() - 0.7) < 0.012
    logit = torch.logit(t.double())
    assert abs(logit.mean() - 1.0) < 0.015  # standard error 0.5 / sqrt(20,000) = 0.0035
    assert abs(logit.std() - 0.5) < 0.015
    assert not dose_valid.isnan().any()
    assert with_token_valid is None
    assert abs(t_valid.mean() - 0.5) < 0.01
    assert abs(t_valid.std() - 12**-0.5) < 0.01
