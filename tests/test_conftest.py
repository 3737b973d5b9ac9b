"""What every test starts from holds on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

SHOW = "import os, tests.conftest; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('TRITON_INTERPRET'))"


@pytest.mark.parametrize("wanted, seen", [("", " 1"), ("1", "0 None")])
def test_gpus_are_hidden_unless_they_are_asked_for(wanted: str, seen: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "0", "SCLDM_TEST_GPU": wanted}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{seen}\n", done.stderr
