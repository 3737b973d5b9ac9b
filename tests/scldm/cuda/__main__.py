"""`python -m tests.scldm.cuda GUARD_LIBRARY` prints, as JSON, what each step of the product launches on a GPU and waits
for. torch must pretend to have one before the product is imported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.scldm.cuda.named import pretend


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    pretend(Path(sys.argv[1]))
    from tests.scldm.cuda.steps import every_step

    print(json.dumps(every_step(), indent=1))


main()
