"""The plan: what it says of the shipped presets, of what does not fit, and of 1,024 GPUs."""

from __future__ import annotations

import json

import pytest

from launch.cli import main
from launch.config import compose
from launch.plan import PlanConfig, does_fit, plan_of, remedies
from scldm.errors import InputError

DIT = ["stage=ldm", "n_cells=100_000_000", "model.n_latents=64", "ldm/base"]


def test_a_plan_for_1024_gpus_and_100_million_cells(capsys: pytest.CaptureFixture) -> None:
    words = [*DIT, "hardware/many_nodes", "hardware.nodes=128", "train.global_batch=8192", "hardware.micro_batch=8"]
    assert main(["plan", *words]) == 0
    table = capsys.readouterr().out
    for part in ("9.8 million parameters; 1,024 ranks x 8 cells x 1", "<- configured", "epochs of 100,000,000 cells"):
        assert part in table
    assert "FIT" not in table
    assert main(["plan", *words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    # a DiT step is six FLOPs a parameter of its blocks and token, and attention
    assert 6 * 64 * 6.2e6 < found["flops_per_cell"] < 6 * 64 * 9.8e6
    assert found["cells_per_s"] * found["step_s"] == pytest.approx(8192)
    assert found["days"] == pytest.approx(200_000 * found["step_s"] / 86_400)
    assert found["epochs"] == pytest.approx(200_000 * 8192 / 1e8)


def test_what_does_not_fit_is_told_with_knobs_that_help() -> None:
    words = [*DIT, "hardware.memory_gb=4.2", "train.global_batch=8192", "hardware.micro_batch=1024", "model.n_layers=2"]
    config = compose(PlanConfig, words)
    plan = plan_of(config)
    assert not plan.fits
    assert "DOES NOT FIT" in plan.table()
    assert plan.remedies
    told = dict(remedies(config))
    assert all(does_fit(told[remedy]) for remedy in plan.remedies)
    for remedy in plan.remedies:  # each is a command line
        assert does_fit(compose(PlanConfig, [*words, *remedy.split()]))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "n_genes=0: give it, or data.shards"),
        (["n_genes=100"], "n_cells=0: give it, or data.shards"),
        (["n_genes=100", "n_cells=5", "hardware.gpu=Z9"], "hardware.gpu=Z9: known are A100"),
        (
            ["n_genes=100", "n_cells=5", "hardware.nodes=1_000"],
            "train.global_batch=1024 can't be split over 8000 ranks",
        ),
        (["n_genes=100", "n_cells=5", "deepspeed.fp16.enabled=true"], "hardware.precision says this"),
    ],
)
def test_what_a_plan_can_not_know_is_asked_for(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(InputError):
        compose(PlanConfig, ["hardware.mfu=0"])
