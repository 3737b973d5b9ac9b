"""The learning rate by hand, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch

from scldm.errors import InputError
from scldm.model.vae import LR_SCALE
from scldm.train.optim import OptimConfig, learning_rate, make_optimizer
from tests.scldm.train.small_runs import make_vae


def test_hold_rises_holds_and_falls_to_zero() -> None:
    config = OptimConfig(lr=2.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([2 * (k + 1) / 11 for k in range(10)])
    assert rates[10:81] == [2.0] * 71
    assert rates[81:] == pytest.approx([2 * k / 20 for k in range(19, 0, -1)])


def test_cosine_falls_to_zero_from_the_end_of_the_warm_up() -> None:
    config = OptimConfig(lr=2.0, warmup=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([2 * (k + 1) / 11 for k in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))


@pytest.mark.parametrize("schedule", ["hold", "cosine"])
@pytest.mark.parametrize("warmup, decay", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_the_shortest_runs_learn_too(schedule, warmup: float, decay: float, n_steps: int) -> None:
    config = OptimConfig(lr=2.0, warmup=warmup, decay=decay, schedule=schedule)
    assert all(0 < learning_rate(config, step, n_steps) <= 2 for step in range(n_steps))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"warmup": 0.6, "decay": 0.6}, "add up to at most 1"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_what_can_not_be_is_refused_by_name(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OptimConfig(**wrong)


def test_linear_maps_decay_and_embeddings_queries_biases_norms_and_dispersions_do_not() -> None:
    model = make_vae()
    optimizer = make_optimizer(OptimConfig(lr=1e-3, weight_decay=0.1), model)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert len(of) == sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    for name, parameter in parameters.items():
        tables = ("embedding", "log_share", "log_theta", "latent_queries", "token.count")
        matrix = parameter.ndim == 2 and not any(table in name for table in tables)
        assert (of[id(parameter)]["weight_decay"] > 0) == matrix, name
    scale = getattr(model.log_theta.weight, LR_SCALE)
    assert scale != 1
    assert of[id(model.log_theta.weight)]["lr_scale"] == scale
    assert of[id(model.token.gene.weight)]["lr_scale"] == 1
    assert isinstance(optimizer, torch.optim.AdamW)
