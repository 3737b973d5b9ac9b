"""Checkpoints: nothing that is not whole is loaded, and every refusal names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scldm.errors import InputError
from scldm.model.vae import VAE, VAEConfig
from scldm.train import checkpoint
from scldm.train.optim import OptimConfig
from tests.scldm.train.small_runs import N_GENES, make_dit, make_vae, small_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 12 steps that validated, and found its best, at steps 4, 8 and 12."""
    small_run("vae", tmp_path / "run", steps=12, validate_every=4, save_every=12)
    return tmp_path / "run"


def latest(run: Path) -> Path:
    target = checkpoint.pointed(run / "checkpoints" / "latest")
    assert target is not None
    return target


def test_the_averaged_weights_come_back(run: Path) -> None:
    finished = small_run("vae", run, steps=12, validate_every=4, save_every=12)  # loads, and has nothing to do
    assert finished.loader.read == []
    module = make_vae()
    assert checkpoint.load_averaged(module, run, "latest") == 12
    stored = checkpoint.read_tensors(latest(run), checkpoint.read_state(latest(run)))
    live = dict(finished.engine.module.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, stored[f"ema/{name}"])
        assert torch.equal(live[name], stored[f"weight/{name}"])
    assert not torch.equal(stored["ema/token.weight"], stored["weight/token.weight"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda at: damage(at / "part-0-of-1.safetensors"), "part-0-of-1.safetensors is damaged"),
        (lambda at: (at / "part-0-of-1.safetensors").unlink(), "part-0-of-1.safetensors is missing"),
        (lambda at: (at / "state.json").unlink(), "not a whole checkpoint: state.json is missing"),
        (lambda at: (at / "state.json").write_text('{"step": 1'), "state.json"),
        (lambda at: at.rename(at.with_name("gone")), "step-00000012 is not a whole checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(run: Path, harm, said: str) -> None:
    harm(latest(run))
    for use in (
        lambda: small_run("vae", run, steps=12, validate_every=4, save_every=12),
        lambda: checkpoint.load_averaged(make_vae(), run, "latest"),
    ):
        with pytest.raises(InputError, match=said) as refusal:
            use()
        assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_another_network_is_refused(run: Path) -> None:
    wider = VAE(VAEConfig(32, 2, 4, 1, 2, 1, 0.01), N_GENES)
    for module in (make_dit(), wider):
        with pytest.raises(InputError, match="another model"):
            checkpoint.load_averaged(module, run, "latest")
    with pytest.raises(InputError, match="another model"):
        small_run("ldm", run)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no best checkpoint yet; train it first"):
        checkpoint.load_averaged(make_vae(), tmp_path, "best")


def test_a_folder_that_was_never_renamed_is_never_loaded(run: Path) -> None:
    aside = latest(run).with_name("step-00000099.partial")
    aside.mkdir()
    (aside / "part-0-of-1.safetensors").write_bytes(b"half")
    assert small_run("vae", run, steps=12, validate_every=4, save_every=12).loader.read == []
    checkpoint.retain(run / "checkpoints", 1)
    assert latest(run).is_dir()


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    """At this rate the loss rises after the first validation, so that the best lies far behind."""
    wild = OptimConfig(lr=0.3, warmup=0.0, clip=1e9)
    small_run("vae", tmp_path, steps=12, validate_every=2, save_every=1, keep=2, optim=wild)
    best = checkpoint.pointed(tmp_path / "checkpoints" / "best")
    assert best is not None
    assert int(best.name[5:]) <= 8
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted(["best", "latest", best.name, "step-00000011", "step-00000012"])
    checkpoint.load_averaged(make_vae(), tmp_path, "best")
