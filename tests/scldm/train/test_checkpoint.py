"""Checkpoints: nothing that is not whole is loaded, and every refusal names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from scldm.errors import InputError
from scldm.given_json import hash_of
from scldm.model.vae import VAE, VAEConfig
from scldm.parallel.dist import World
from scldm.train import checkpoint, steps
from scldm.train.optim import OptimConfig
from scldm.weights import network_of
from tests.scldm.train.small_runs import ALONE, N_GENES, make_dit, make_vae, small_run, stored


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 12 steps that validated, and found its best, at steps 4, 8 and 12."""
    small_run("vae", tmp_path / "run", steps=12, validate_every=4, save_every=12)
    return tmp_path / "run"


def latest(run: Path) -> Path:
    target = steps.pointed(run / "checkpoints" / "latest")
    assert target is not None
    return target


@pytest.mark.heavy
def test_the_ema_comes_back(run: Path) -> None:
    finished = small_run("vae", run, steps=12, validate_every=4, save_every=12)  # loads, and has nothing to do
    assert finished.loader.read == []
    found = checkpoint.read_ema(run, "latest")
    assert (found.checkpoint.step, found.checkpoint.folder) == (12, latest(run))
    module = network_of(make_vae, found, str(latest(run)))
    _, tensors = stored(run)
    live = dict(finished.engine.module.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tensors[f"ema/{name}"])
        assert torch.equal(live[name], tensors[f"weight/{name}"])
    assert not torch.equal(tensors["ema/token.count"], tensors["weight/token.count"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lose(at: Path) -> None:
    """Its part no longer says that it has a parameter, and the hash agrees."""
    stored = json.loads((at / "state.json").read_text())
    del stored["state"]["parts"]["part-0-of-1.safetensors"]["ranges"]["token.count"]
    (at / "state.json").write_text(json.dumps({**stored, "sha256": hash_of(stored["state"])}))


HARMS = [
    (lambda at: damage(at / "part-0-of-1.safetensors"), "part-0-of-1.safetensors is damaged: its SHA-256"),
    (lambda at: cut(at / "part-0-of-1.safetensors"), "part-0-of-1.safetensors is damaged: it has"),
    (lambda at: (at / "part-0-of-1.safetensors").unlink(), "part-0-of-1.safetensors is missing"),
    (lambda at: (at / "state.json").unlink(), "not a whole checkpoint: state.json is missing"),
    (lambda at: (at / "state.json").write_text('{"step": 1'), "state.json is damaged"),
    (lambda at: (at / "state.json").write_text((at / "state.json").read_text().replace("12", "13")), "state.json"),
    (lose, "its parts do not hold every number of token.count once"),
    (lambda at: at.rename(at.with_name("gone")), "step-00000012 is not a whole checkpoint"),
]


@pytest.mark.heavy
@pytest.mark.parametrize("harm, said", HARMS[2:4])
def test_a_checkpoint_that_is_just_not_seen_is_not_taken_for_broken(run: Path, harm, said: str) -> None:
    """It may be the cache of one host's network file system: the checkpoint stays where it is."""
    harm(latest(run))
    small_run("vae", run, steps=12, validate_every=4, save_every=12)
    assert not list(run.rglob("*.broken"))


@pytest.mark.parametrize("name", ["part-0-of-1.safetensors", "state.json"])
def test_what_another_host_wrote_may_be_seen_a_while_later(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(checkpoint, "SEEN_S", 20.0)
    part = latest(run) / name
    hidden = part.rename(part.with_suffix(".hidden"))
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: hidden.exists() and hidden.rename(part))
    assert small_run("vae", run, steps=12, validate_every=4, save_every=12).loader.read == []


def test_the_first_rank_reads_the_note_for_all(run: Path) -> None:
    target = latest(run)
    note = checkpoint.read_note(target)
    (target / "state.json").unlink()
    found, told, _ = checkpoint._checked_share(target, note, World(1, 2, torch.device("cpu")))
    assert found is not None
    assert (found.step, told) == (12, "")
    assert checkpoint._checked_share(target, None, ALONE)[1:] == (
        f"{target} is not a whole checkpoint: state.json is missing",
        False,
    )


@pytest.mark.heavy
@pytest.mark.parametrize("harm, said", HARMS)
def test_a_checkpoint_that_is_not_whole_is_passed_over_by_name_for_the_one_before_it(
    run: Path, harm, said: str, capsys: pytest.CaptureFixture
) -> None:
    """And what is trained from there is what was; for export, whose user chose it, it is refused."""
    whole = stored(run)
    harm(latest(run))
    with pytest.raises(InputError, match=said) as refusal:
        checkpoint.read_ema(run, "latest")
    assert "\n" not in str(refusal.value)
    capsys.readouterr()
    again = small_run("vae", run, steps=12, validate_every=4, save_every=12)
    assert [step for step, _ in again.loader.read] == [8, 9, 10, 11]
    told = capsys.readouterr().err
    assert f"step-00000012 is passed over: {run}" in told
    assert said in told
    state, tensors = stored(run)
    assert state == whole[0]
    assert all(torch.equal(tensors[key], whole[1][key]) for key in tensors)


@pytest.mark.heavy
def test_where_no_checkpoint_is_whole_nothing_begins_again_by_itself(run: Path) -> None:
    for target in (run / "checkpoints").glob("step-*"):
        damage(target / "part-0-of-1.safetensors")
    for _ in range(2):
        with pytest.raises(InputError, match=r"no whole checkpoint is left .*. Copy one back, or choose another"):
            small_run("vae", run, steps=12, validate_every=4, save_every=12)


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(run: Path) -> None:
    damage(latest(run) / "part-0-of-1.safetensors")
    small_run("vae", run, steps=10, validate_every=20, save_every=1, keep=1)
    names = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert "step-00000012.broken" in names
    assert latest(run).name == "step-00000010"
    stored(run)


def test_a_checkpoint_of_a_later_version_is_refused_and_left_alone(run: Path) -> None:
    path = latest(run) / "state.json"
    state = {**json.loads(path.read_text())["state"], "format": 99}
    path.write_text(json.dumps({"sha256": hash_of(state), "state": state}))
    with pytest.raises(InputError, match=r"checkpoint format 99. This version of scldm reads 5"):
        small_run("vae", run, steps=12)
    assert path.is_file()


@pytest.mark.heavy
def test_a_checkpoint_of_another_network_is_refused(run: Path) -> None:
    wider = VAE(VAEConfig(32, 2, 4, 1, 2, 1, 0.01), N_GENES)
    found, target = checkpoint.read_ema(run, "latest"), latest(run)
    for module in (make_dit(), wider):
        with pytest.raises(InputError, match="step-00000012: weights, config and vocabularies do not belong together"):
            network_of(lambda module=module: module, found, str(target))
    with pytest.raises(InputError, match="another model"):
        small_run("ldm", run)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no best checkpoint yet. Train it first"):
        checkpoint.read_ema(tmp_path, "best")


@pytest.mark.heavy
def test_a_folder_that_was_never_renamed_is_never_loaded(run: Path) -> None:
    aside = latest(run).with_name("step-00000099.partial")
    aside.mkdir()
    (aside / "part-0-of-1.safetensors").write_bytes(b"half")
    before = latest(run).with_name(".step-00000012.before.0123456789ab.partial")  # of a save over another, cut short
    before.mkdir()
    assert small_run("vae", run, steps=12, validate_every=4, save_every=12).loader.read == []
    assert not before.exists()
    assert not aside.exists()
    steps.retain(run / "checkpoints", 1)
    assert latest(run).is_dir()


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    """At this rate the loss rises after the first validation, so that the best lies far behind."""
    wild = OptimConfig(lr=0.3, warmup=0.0, clip=1e9)
    small_run("vae", tmp_path, steps=12, validate_every=2, save_every=1, keep=2, optim=wild)
    best = steps.pointed(tmp_path / "checkpoints" / "best")
    assert best is not None
    assert int(best.name[5:]) <= 8
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted(["best", "latest", best.name, "step-00000011", "step-00000012"])
    checkpoint.read_ema(tmp_path, "best")


def test_checkpoints_after_the_latest_do_not_count_as_kept(tmp_path: Path) -> None:
    """Of a run that went on from before them: no resume would use them, so two others are to be there."""
    for step in (1, 2, 3, 8, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "latest").write_text("step-00000003")
    assert steps.retain(tmp_path, 2) == []
    left = [p.name for p in steps.candidates(tmp_path)]
    assert left == ["step-00000003", "step-00000002"]


def test_what_could_not_be_removed_is_removed_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real, refused = shutil.rmtree, list[Path]()

    def refuse_once(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "step-00000001.partial" and not ignore_errors and not refused:
            refused.append(path)
            raise OSError("device busy")
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", refuse_once)
    small_run("vae", tmp_path, steps=4, validate_every=20, save_every=1, keep=1)
    assert refused
    assert "an old checkpoint can't be removed: device busy" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial"))


def test_a_state_is_json_before_anything_was_validated(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    small_run("vae", tmp_path, steps=3, validate_every=20, save_every=1, keep=9)
    for path in sorted(tmp_path.glob("checkpoints/*/state.json")):
        state = json.loads(path.read_text(), parse_constant=refuse)["state"]
        assert state["best"] is None or state["step"] == 3


def test_every_kth_is_kept(tmp_path: Path) -> None:
    small_run("vae", tmp_path, steps=12, validate_every=20, save_every=2, keep=1, keep_every=4)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000008", "step-00000012"]
