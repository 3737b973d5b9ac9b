"""Fused kernels against the plain formula on a GPU: the tests of kernels and attention, counted.

    python -m benchmarks.gpu_parity save=runs/parity.json

The tests compare in float32 against float64, and in bf16 ask for at most twice the formula's own error. One of them
fails where the kernels did not run on CUDA. This fails as well where that one did not run.
Reading order: main, outcomes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/scldm/kernels", "tests/scldm/model")
WORDS = "fused or plain or cuda"
TIMES_AT_ONCE = 4


def main(words: list[str]) -> int:
    """Run the tests; write how they ended. 0 where all passed and the kernels ran on CUDA.

    words: save=FILE, and pytest's own
    """
    save = next((word.removeprefix("save=") for word in words if word.startswith("save=")), "")
    rest = [word for word in words if not word.startswith("save=")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not exhaustive"]
        command += ["-k", WORDS, "-n", str(TIMES_AT_ONCE), "--dist", "loadfile", f"--junitxml={path}", *rest]
        environment = os.environ | {"SCLDM_TEST_GPU": "1"}
        code = subprocess.run([*command, *TESTS], cwd=ROOT, env=environment).returncode
        cases = outcomes(path.read_text()) if path.is_file() else {}
    counted = Counter(outcome for outcome, _ in cases.values())
    on_cuda = any("test_on_gpu" in name and outcome == "passed" for name, (outcome, _) in cases.items())
    found = {
        "on_cuda": on_cuda,
        "outcomes": dict(counted),
        "failed": {name: why for name, (outcome, why) in cases.items() if outcome == "failed"},
        "fused": sum("fused" in name and outcome == "passed" for name, (outcome, _) in cases.items()),
    }
    if save:
        Path(save).write_text(json.dumps(found, indent=1) + "\n")
    print(f"parity: {dict(counted)}; kernels ran on CUDA: {on_cuda}")
    return code or not (on_cuda and counted["passed"])


def outcomes(xml: str) -> dict[str, tuple[str, str]]:
    """Test -> passed, failed or skipped, and why, of a report as JUnit's."""
    found = {}
    for case in ET.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = ("passed", "")
        for node in case:
            if node.tag in ("failure", "error"):
                found[name] = ("failed", (node.get("message") or "")[:300])
            elif node.tag == "skipped":
                found[name] = ("skipped", (node.get("message") or "")[:300])
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
