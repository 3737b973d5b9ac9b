"""What `bash benchmarks/gpu.sh` runs: benchmarks one after another, each bounded in time, all results in one JSON.

A step is a process of its own. One that fails, or runs past its bound, is recorded with the reason, and the next one
begins. One for which too little time is left is skipped. After every step gpu.json is written anew, so what was found
outlives a kill, and a step that is done for these sources is not repeated. Standard library alone, as it must also say
which packages are missing.
Reading order: Step, STEPS, main, run_all, run_step, machine, sources.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_wheels import missing
from benchmarks.report import commit
from scldm.errors import REFUSED
from scldm.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540  # nine minutes in all
CPU_BOUND = 10  # a rehearsal may take so many times a step's bound: two busy cores import for half a minute


@dataclass(frozen=True)
class Step:
    """A benchmark, as words after `python`; `save=FILE` is added, and what the step writes there is its result.

    seconds: after which it is ended; without so many left it is not begun
    on_cpu: words that are added to rehearse it on a CPU, at small sizes
    """

    name: str
    seconds: int
    words: tuple[str, ...]
    on_cpu: tuple[str, ...] = ()


def _bench(name: str, seconds: int, line: str, on_cpu: str) -> Step:
    benchmark, *words = shlex.split(line)
    return Step(name, seconds, ("-m", f"benchmarks.{benchmark}", *words), tuple(shlex.split(on_cpu)))


# on a CPU in float32, as bf16 is slow there
SMALL = "preset= model.width=16 model.n_latents=4 model.n_layers=1 model.n_heads=2 cells=2 compile=false repeats=1"
SMALL_STEP = f"{SMALL} precision=fp32 n_genes=80 n_given=40 n_asked=40"
# the first is the one that all others rest on; then what users wait for, then what is compared
STEPS = (
    Step(
        "parity",
        100,
        ("-m", "benchmarks.gpu_parity"),
        ("-k", "test_on_gpu or test_reading_out", "-m", "not slow", "-n", "0"),
    ),
    Step(
        "profile",
        45,
        ("-m", "benchmarks.gpu_profile", "preset=20m", "cells=32,128", "genes=8192"),
        tuple(f"{SMALL} precision=fp32 genes=40 n_genes=80 steps=1".split()),
    ),
    _bench(
        "dentate",
        25,
        "vae_step preset=dentate_gyrus cells=128 n_genes=17002 n_given=4096 n_asked=4096 precision=bf16 repeats=3",
        SMALL_STEP,
    ),
    _bench(
        "generate",
        55,
        "generate random=70m genes=3699 batch=64,512,2048 precision=float32,bfloat16 compile=true",
        "random=tiny random_ldm=tiny genes=50 batch=2 precision=float32 repeats=1 sampler.n_steps=1 compile=false",
    ),
    _bench(
        "generate-census",
        35,
        "generate random=70m genes=36130 batch=64,256 precision=float32,bfloat16",
        "random=tiny random_ldm=tiny genes=60 batch=2 precision=float32 repeats=1 sampler.n_steps=1",
    ),
    _bench(
        "train",
        85,
        "train steps=10 rounds=2 precision=bf16 cells=128 n_genes=2048 compile=[ldm/base]",
        "steps=3 rounds=1 precision=fp32 cells=2 n_genes=20 model.width=16 model.n_layers=1",
    ),
    # two graphs of the whole network and two of a block are compiled
    _bench(
        "step-128",
        110,
        "vae_step preset=20m cells=128 n_genes=36130 n_given=8192 n_asked=8192 precision=bf16 compile=true repeats=3",
        SMALL_STEP,
    ),
    _bench(
        "step-census",
        30,
        "vae_step preset=20m cells=32 n_genes=36130 n_given=8000 n_asked=36130 precision=bf16 repeats=3",
        SMALL_STEP,
    ),
    _bench(
        "mcab",
        35,
        "mcab preset=20m cells=128 given=2048,8192 asked=8192,36130 n_genes=36130 cells_encoded=0 precision=bf16 "
        "repeats=3",
        f"{SMALL} precision=fp32 given=30 asked=30 n_genes=80",
    ),
)


@dataclass
class Run:
    """What is known so far, and where it is kept.

    head: the machine and the sources
    found: step -> its record
    """

    out: Path
    head: dict[str, Any]
    ends_at: float
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def left(self) -> float:
        return self.ends_at - time.monotonic()

    def write(self) -> None:
        write_json(self.out / "gpu.json", {**self.head, "steps": self.found})


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """0 where every step is done; 1 where one is not; 2 without a GPU."""
    options = _options(argv)
    steps = [step for step in steps if not options.only or step.name in options.only.split(",")]
    if options.cpu:
        steps = [replace(step, seconds=CPU_BOUND * step.seconds) for step in steps]
    ends_at = time.monotonic() + options.seconds * (CPU_BOUND if options.cpu else 1) - options.spent
    on = machine()
    if not on.get("cuda") and not options.cpu:
        why = on.get("why") or f"torch {on.get('torch')} finds no CUDA GPU"
        print(f"gpu.sh: error: {why}; --cpu rehearses the steps at small sizes on a CPU", file=sys.stderr)
        return REFUSED
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    head = {"commit": options.commit or commit(), "sources": sources(), "rehearsal": options.cpu, "machine": on}
    run = Run(out, {**head, "missing_packages": missing()}, ends_at)
    run.found = earlier(out / "gpu.json", run.head)
    run_all(run, steps, options.cpu)
    undone = [step.name for step in steps if run.found[step.name]["status"] != "done"]
    print(f"{len(steps) - len(undone)} of {len(steps)} steps are done: {out / 'gpu.json'}")
    return int(bool(undone))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu.sh", description="Settle the open figures of a GPU.")
    parser.add_argument("--out", default="runs/gpu", help="folder of gpu.json and gpu.log")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all; what does not fit is skipped")
    parser.add_argument("--spent", type=float, default=0.0, help="of those, before this began")
    parser.add_argument("--only", default="", help="names of steps, with commas; the default is all")
    parser.add_argument("--commit", default="", help="of these sources, where they are no git checkout")
    parser.add_argument("--cpu", action="store_true", help="rehearse the steps at small sizes on a CPU")
    return parser.parse_args(argv)


def earlier(path: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The steps that are done, of the same sources on the same machine."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    same = all(found.get(key) == head[key] for key in ("sources", "rehearsal", "machine"))
    return {name: step for name, step in found["steps"].items() if step["status"] == "done"} if same else {}


def run_all(run: Run, steps: Sequence[Step], on_cpu: bool) -> None:
    """Each of the steps that is not done yet, in order."""
    with (run.out / "gpu.log").open("a") as log:
        for step in steps:
            if step.name in run.found:
                print(f"== {step.name}: done before", flush=True)
                continue
            if run.left() < step.seconds:
                why = f"{max(run.left(), 0):.0f} s are left, and it may take {step.seconds}; run again to resume"
                run.found[step.name] = {"status": "skipped", "why": why}
            else:
                run.found[step.name] = run_step(step, log, on_cpu)
            run.write()
            record = run.found[step.name]
            took = f" in {record['seconds']:.0f} s" if "seconds" in record else ""
            print(f"== {step.name}: {record['status']}{took} {record.get('why', '')}".rstrip(), flush=True)


def run_step(step: Step, log: IO[str], on_cpu: bool) -> dict[str, Any]:
    """Its record: command, status (done, failed or timed out), why, seconds, and the JSON that it saved."""
    with tempfile.TemporaryDirectory(prefix="scldm-gpu-") as folder:
        saved = Path(folder) / "result.json"
        words = [*step.words, *(step.on_cpu if on_cpu else ())]
        record: dict[str, Any] = {"command": shlex.join(["python", *words]), "status": "done"}
        log.write(f"\n== {step.name}: {record['command']}\n")
        log.flush()
        start, began = log.tell(), time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *words, f"save={saved}"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended with all that it started
            env=os.environ | _environment(),
        )
        try:
            code = process.wait(step.seconds)
            if code:
                record |= {"status": "failed", "why": f"exit code {code}: {_end_of(log, start)}"}
        except subprocess.TimeoutExpired:
            record |= {"status": "timed out", "why": f"ended after {step.seconds} s: {_end_of(log, start)}"}
        finally:
            _end(process)
        record["seconds"] = round(time.monotonic() - began, 1)
        try:
            record["result"] = json.loads(saved.read_text())
        except (OSError, ValueError):
            if record["status"] == "done":
                record |= {"status": "failed", "why": "it saved no result"}
    return record


def _environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4"}


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(log: IO[str], start: int) -> str:
    """The last line that a step printed, as far as it says why."""
    with open(log.name, errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


MACHINE = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.cuda.is_available()}
found["cuda_version"] = torch.version.cuda
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
if found["cuda"]:
    gpu = torch.cuda.get_device_properties(0)
    found |= {"device": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)}
    found |= {"capability": f"{gpu.major}.{gpu.minor}", "multiprocessors": gpu.multi_processor_count}
print(json.dumps(found))
"""


def machine() -> dict[str, Any]:
    """GPU, driver, and the versions of Python, torch and triton; `why` where torch can't be asked."""
    try:
        done = subprocess.run([sys.executable, "-c", MACHINE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"why": "importing torch took more than 120 s"}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["torch can't be imported"])[-1]}
    return json.loads(done.stdout.splitlines()[-1]) | {"driver": driver()}


def driver() -> str | None:
    """The NVIDIA driver's version, where nvidia-smi tells one."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def sources() -> str:
    """A hash of the code, tests and presets: a copy of the sources that is no git checkout has no commit to go by."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "configs", "data_pipeline", "launch", "scldm", "tests"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
