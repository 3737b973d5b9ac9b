"""`bash benchmarks/gpu.sh` without a GPU: steps are bounded, recorded and not repeated, and all of them start."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_parity, gpu_profile, gpu_wheels
from benchmarks.gpu import SECONDS, STEPS, Step
from launch.cli import config_of
from scldm.model.vae import VAEConfig
from tests.packages import hide

ROOT = Path(__file__).resolve().parents[2]
SAVE = "import json, sys; json.dump({'rows': [1]}, open(sys.argv[1].removeprefix('save='), 'w'))"


def step(name: str, code: str, seconds: int = 60) -> Step:
    return Step(name, seconds, ("-c", code))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    machine = {"cuda": True, "device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0"}
    monkeypatch.setattr(gpu, "machine", lambda: machine)
    return machine


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())


# --- steps ---


@pytest.mark.heavy
def test_a_step_past_its_bound_is_ended_with_all_that_it_started(on_a_gpu: dict, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300']); print('begun', flush=True); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(300)"
    began = time.monotonic()
    assert gpu.main(["--out", str(tmp_path)], [step("long", child, seconds=5), step("next", SAVE)]) == 1
    assert time.monotonic() - began < 60
    steps = read(tmp_path)["steps"]
    assert (steps["long"]["status"], steps["long"]["why"]) == ("timed out", "ended after 5 s: begun")
    assert (steps["next"]["status"], steps["next"]["result"]) == ("done", {"rows": [1]})
    pid = (tmp_path / "pid").read_text()
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_fails_or_has_no_time_is_recorded_with_the_reason(on_a_gpu: dict, tmp_path: Path) -> None:
    steps = [
        step("broken", "raise SystemExit('no kernel image')"),
        step("silent", "pass"),
        step("fine", f"print('measured'); {SAVE}"),
        step("long", SAVE, seconds=10_000),
    ]
    assert gpu.main(["--out", str(tmp_path), "--commit", "abc"], steps) == 1
    found = read(tmp_path)
    assert found["machine"] == on_a_gpu
    assert found["commit"] == "abc"
    assert re.fullmatch(r"[0-9a-f]{16}", found["sources"])
    why = {name: (record["status"], record.get("why", "")) for name, record in found["steps"].items()}
    assert why["broken"] == ("failed", "exit code 1: no kernel image")
    assert why["silent"] == ("failed", "it saved no result")
    assert why["fine"] == ("done", "")
    assert why["long"][0] == "skipped"
    assert "it may take 10000; run again to resume" in why["long"][1]
    log = (tmp_path / "gpu.log").read_text()
    assert "== fine: python -c" in log
    assert log.rstrip().endswith("measured")


def test_a_step_that_is_done_is_not_repeated(on_a_gpu: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "runs"
    counted = f"open({str(mark)!r}, 'a').write('x'); {SAVE}"
    later = f"import os, sys; os.path.exists({str(tmp_path / 'ready')!r}) or sys.exit(1); {SAVE}"
    steps, out = [step("once", counted), step("later", later)], ["--out", str(tmp_path)]
    assert gpu.main(out, steps) == 1
    (tmp_path / "ready").touch()
    assert gpu.main(out, steps) == 0
    assert mark.read_text() == "x"
    assert gpu.main([*out, "--only", "later"], steps) == 0
    assert set(read(tmp_path)["steps"]) == {"once", "later"}
    monkeypatch.setattr(gpu, "sources", lambda: "of other code")
    assert gpu.main(out, steps) == 0
    assert mark.read_text() == "xx"
    on_a_gpu["device"] = "NVIDIA H200"
    (tmp_path / "gpu.json").write_text("{cut")
    assert gpu.main(out, steps) == 0
    assert mark.read_text() == "xxx"


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"cuda": False, "torch": "2.13.0+cpu"})
    assert gpu.main(["--out", str(tmp_path / "out")], [step("a", SAVE)]) == 2
    assert "torch 2.13.0+cpu finds no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_steps_fit_into_nine_minutes() -> None:
    assert sum(step.seconds for step in STEPS) + 20 <= SECONDS <= 540
    assert len({step.name for step in STEPS}) == len(STEPS)


@pytest.mark.parametrize("small", [False, True])
def test_every_step_has_words_that_its_benchmark_takes(small: bool) -> None:
    for step in STEPS:
        words = [*step.words[2:], *(step.on_cpu if small else ()), "save=x.json"]
        module = importlib.import_module(step.words[1])
        if module.__name__ == "benchmarks.gpu_parity":  # it passes them on to pytest
            assert step.words == ("-m", "benchmarks.gpu_parity")
        else:
            config_of(module, words)


# --- the script ---


def test_the_script_installs_wheels_into_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / ".whl").mkdir()
    (tmp_path / ".whl" / "a.whl").touch()
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\necho "$PWD|$PYTHONPATH|$*" >>{tmp_path}/calls\n[ "$2" != benchmarks.gpu ] || exit 3\n'
    )
    python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHON": str(python)}
    words = ["bash", str(tmp_path / "benchmarks" / "gpu.sh"), "--out", "o"]
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    pip, run = ((tmp_path / "calls").read_text()).splitlines()
    target = re.search(r"--target (\S+) \.whl/a\.whl$", pip)
    assert target
    assert "|-m pip install --quiet --no-index --no-deps " in pip
    assert re.fullmatch(rf"{tmp_path}\|{target[1]}\|-m benchmarks\.gpu --spent \d+ --out o", run)
    assert not Path(target[1]).exists()


# torch's own needs
OF_TORCH = {"torch", "torchgen", "functorch", "triton", "filelock", "typing_extensions", "sympy", "mpmath", "networkx"}
OF_TORCH |= {"jinja2", "markupsafe", "setuptools", "pkg_resources", "_distutils_hack", "nvidia", "cuda"}
# modules that come with pytest, PyYAML, hypothesis and anndata
BESIDES = {"_pytest", "py", "_yaml", "_hypothesis_pytestplugin", "testing"}
OURS = {"benchmarks", "data_pipeline", "launch", "scldm", "tests", "conftest", "sitecustomize"}


@pytest.mark.exhaustive
def test_the_wheels_are_all_that_a_rehearsal_imports(tmp_path: Path) -> None:
    """Every benchmark module, and the tests; parity alone is not done, as it must not pass without a GPU."""
    shown = OURS | OF_TORCH | set(gpu_wheels.NEEDED.values()) | BESIDES
    environment = os.environ | {"PYTHON": sys.executable}
    environment["PYTHONPATH"] = os.pathsep.join([hide(tmp_path / "site", shown), str(ROOT)])
    words = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    log = (tmp_path / "gpu.log").read_text()
    steps = read(tmp_path)["steps"]
    status = {name: record["status"] for name, record in steps.items()}
    assert status == {step.name: "done" if step.name != "parity" else "failed" for step in STEPS}, log[-3_000:]
    assert done.returncode == 1
    assert read(tmp_path)["missing_packages"] == []
    (name,) = [name for name in steps["parity"]["result"]["failed"] if name.endswith("test_kernels_run_on_cuda")]
    assert "finds no CUDA GPU" in steps["parity"]["result"]["failed"][name]
    rows = {row["name"]: row["value"] for row in steps["train"]["result"]["rows"]}
    assert rows["plain: a step"] > 0
    assert rows["deepspeed: a step: the package deepspeed is not installed"] is None


# --- parity ---

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.scldm.kernels.test_on_gpu" name="test_kernels_run_on_cuda"/>
<testcase classname="tests.a" name="test_fused"><failure message="assert 3 &lt; 2">trace</failure></testcase>
<testcase classname="tests.a" name="test_other"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


def test_parity_is_counted() -> None:
    found = gpu_parity.outcomes(JUNIT)
    assert found["tests.scldm.kernels.test_on_gpu::test_kernels_run_on_cuda"] == ("passed", "")
    assert found["tests.a::test_fused"] == ("failed", "assert 3 < 2")
    assert found["tests.a::test_other"] == ("skipped", "needs a GPU")


@pytest.mark.parametrize("first", ["<failure message='x'/>", "<skipped message='x'/>", ""])
def test_parity_is_not_done_unless_kernels_ran_on_cuda(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml = f"<a><testcase classname='tests.scldm.kernels.test_on_gpu' name='t'>{first}</testcase>"
    xml += "<testcase classname='tests.a' name='test_fused'/></a>"

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess:
        assert how["env"]["SCLDM_TEST_GPU"] == "1"
        (path,) = [word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml=")]
        Path(path).write_text(xml)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_parity.subprocess, "run", run)
    code = gpu_parity.main([f"save={tmp_path}/parity.json"])
    found = json.loads((tmp_path / "parity.json").read_text())
    assert (bool(code), found["on_cuda"]) == (first != "", first == "")
    assert found["fused"] == 1


# --- profile ---


@pytest.mark.heavy
def test_the_profile_says_what_a_step_is_made_of(tmp_path: Path) -> None:
    shape = VAEConfig(width=16, n_latents=4, n_layers=1, n_heads=2)
    config = gpu_profile.GPUProfileConfig(
        model=shape, cells=(2, 3), genes=30, n_genes=50, precision="fp32", steps=2, repeats=1, save=f"{tmp_path}/p.json"
    )
    gpu_profile.main(config)
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["settings"]["counted"] == "operations"
    rows = {row["name"]: row["value"] for row in found["rows"]}
    for cells in (2, 3):
        for way in ("plain", "sdpa", "factorised"):
            name = f"{way}, {cells} cells"
            assert 100 < rows[f"{name}: kernels a step"] < 5_000
            assert rows[f"{name}: kernels a step"] % 1 == 0, "two steps have the same operations"
            assert 0 <= rows[f"{name}: idle share of a step"] < 1
            listed = [value for row, value in rows.items() if row.startswith(f"{name}: ") and " x aten::" in row]
            assert len(listed) == config.top
            assert listed == sorted(listed, reverse=True)
            assert sum(listed) <= rows[f"{name}: kernels' time a step"]
    assert rows["fused, 2 cells: not measured on a GPU"] is None


# --- wheels ---


def test_every_wheel_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert [name for name in gpu_wheels.NEEDED if name.lower() not in pinned] == []
    assert set(gpu_wheels.THERE) < set(gpu_wheels.NEEDED)


def test_wheels_over_the_limit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a-1.whl").write_bytes(bytes(2**20))
    (tmp_path / "b-1.whl").write_bytes(bytes(2**19))
    assert gpu_wheels.judged(tmp_path, ["a", "b"], 1.5) == 0
    assert "1.50 MiB  2 wheels of 2 packages" in capsys.readouterr().out
    assert gpu_wheels.judged(tmp_path, ["a", "b"], 1.4) == 2
    assert "over the limit of 1.4 MiB" in capsys.readouterr().err


def test_wheels_of_another_time_are_not_mixed_with_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a-1.whl").touch()
    assert gpu_wheels.main(["--out", str(tmp_path)]) == 2
    assert "has wheels already" in capsys.readouterr().err
    assert gpu_wheels.main(["--there", "torch"]) == 2
    assert "torch is none of anndata" in capsys.readouterr().err
