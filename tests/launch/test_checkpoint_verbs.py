"""`scldm checkpoint inspect|verify|convert`, and the benchmark, on a run of a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from benchmarks import checkpoint as bench
from launch.cli import main as scldm
from scldm.train import steps
from tests.scldm.train.small_runs import make_vae, small_run, stored

pytestmark = pytest.mark.heavy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"hardware": {"zero_stage": 2}}))
    small_run("vae", run_dir, steps=12, validate_every=4, save_every=12)
    return run_dir


def test_inspect_tells_what_a_checkpoint_holds(run: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert scldm(["checkpoint", "inspect", f"at={run}", "json=true", "parameters=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    module = make_vae()
    assert told["step"] == 12
    assert told["n_parameters"] == sum(p.numel() for p in module.parameters())
    assert told["parameters"]["token.count"] == "x".join(map(str, module.get_parameter("token.count").shape))
    assert told["hardware"] == {"zero_stage": 2}  # of the copy in the checkpoint
    assert scldm(["checkpoint", "inspect", f"at={run}", "which=8"]) == 0
    assert "step: 8\n" in capsys.readouterr().out
    assert scldm(["checkpoint", "inspect", f"at={run}", "which=9"]) == 2
    assert "no checkpoint which=9. It has steps 8, 12" in capsys.readouterr().err
    assert scldm(["checkpoint", "inspect", f"at={run}", "which=²"]) == 2  # a digit that int() does not know
    assert "which=²: it must be latest, best or the number of a step" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["part-0-of-1.safetensors", "state.json", "config.json"])
def test_verify_finds_one_bit(run: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    assert scldm(["checkpoint", "verify", f"at={run}"]) == 0
    assert capsys.readouterr().out.count(": whole, ") == 2
    path = run / "checkpoints" / "step-00000008" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert scldm(["checkpoint", "verify", f"at={run}"]) == 2
    out, err = capsys.readouterr()
    assert f"step-00000008: DAMAGED: {path}" in out
    assert "step-00000012: whole" in out
    assert "1 of 2 checkpoints are damaged: step-00000008" in err
    assert scldm(["checkpoint", "verify", f"at={run}/checkpoints/step-00000012"]) == 0
    assert scldm(["checkpoint", "convert", f"at={run}", "which=8", f"out={run}/out"]) == 2
    assert not (run / "out").exists()


def test_convert_writes_what_other_tools_read(run: Path, tmp_path: Path) -> None:
    _, tensors = stored(run)
    for kind, weights in (("ema", "ema"), ("weight", "raw")):
        expected = {key.split("/", 1)[1]: v for key, v in tensors.items() if key.split("/")[0] in (kind, "buffer")}
        words = ["checkpoint", "convert", f"at={run}", f"weights={weights}"]
        assert scldm([*words, f"out={tmp_path}/a/plain.safetensors"]) == 0
        assert scldm([*words, "file_gb=0.00002", f"out={tmp_path}/{weights}/hub"]) == 0
        assert scldm([*words, "to=dcp", f"out={tmp_path}/{weights}/dcp"]) == 0
        index = json.loads((tmp_path / weights / "hub" / "model.safetensors.index.json").read_text())
        files = sorted((tmp_path / weights / "hub").glob("model-*.safetensors"))
        assert len(files) > 2
        assert max(path.stat().st_size for path in files[:-1]) < 30_000
        in_files = {
            name: load_file(tmp_path / weights / "hub" / file)[name] for name, file in index["weight_map"].items()
        }
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in in_files.values())
        distributed = {name: torch.empty_like(tensor) for name, tensor in make_vae().state_dict().items()}
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            dcp.load(distributed, checkpoint_id=tmp_path / weights / "dcp", no_dist=True)
        (tmp_path / "new").touch()
        mode = (tmp_path / "new").stat().st_mode  # colleagues can read what they can read of any new file
        assert all(path.stat().st_mode == mode for path in (tmp_path / "a").iterdir())
        for found in (
            load_file(tmp_path / "a" / "plain.safetensors"),
            in_files,
            distributed,
        ):
            make_vae().load_state_dict(found)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [[], ["file_gb=1"], ["to=dcp"], ["to=checkpoint"]])
def test_a_folder_that_is_there_is_not_replaced(run: Path, tmp_path: Path, kind: list[str], capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert scldm(["checkpoint", "convert", f"at={run}", *kind, f"out={tmp_path}/mine"]) == 2
    assert f"out={tmp_path}/mine exists already" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_checkpoint_in_other_parts_is_the_same_and_resumes(run: Path, tmp_path: Path) -> None:
    before = stored(run)
    at = run / "checkpoints" / "step-00000012"
    words = ["checkpoint", "convert", f"at={run}", "to=checkpoint", "parts=3", f"out={tmp_path}/moved/step-00000012"]
    assert scldm(words) == 0
    assert scldm(words) == 2  # never over another
    steps.remove(at)
    (tmp_path / "moved" / "step-00000012").rename(at)
    state, tensors = stored(run)
    assert len(list(at.glob("part-*"))) == len(state["parts"]) == 3
    assert {**state, "parts": 0} == {**before[0], "parts": 0}
    assert all(torch.equal(tensors[key], before[1][key]) for key in before[1])
    assert scldm(["checkpoint", "verify", f"at={at}"]) == 0
    assert small_run("vae", run, steps=12, validate_every=4, save_every=12).loader.read == []


def test_bench_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = bench.BenchCheckpointConfig(n_parameters=1, folder=str(tmp_path), repeats=1, save=str(tmp_path / "r.json"))
    bench.main(config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["training waits / torch.save and fsync"]["target"] == "<= 0.2"
    assert all(row["value"] > 0 for row in rows.values())
    assert "load, hashes checked" in capsys.readouterr().out
