"""For pytest's -p: the numba kernels of data_pipeline that a session never ran are written to SCLDM_TEST_UNRUN."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

from numba.core.dispatcher import Dispatcher

import data_pipeline


def kernels() -> dict[str, Dispatcher]:
    """By module and name; those that are written into their callers are none of their own."""
    found = {}
    for info in pkgutil.walk_packages(data_pipeline.__path__, "data_pipeline."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, Dispatcher) and value.targetoptions.get("inline") != "always":
                found[f"{value.py_func.__module__}.{name}"] = value
    return found


def pytest_sessionfinish() -> None:
    unrun = [name for name, kernel in kernels().items() if not kernel.signatures]
    Path(os.environ["SCLDM_TEST_UNRUN"]).write_text("\n".join(unrun))
