"""Collect the wheels that a GPU machine without a package index needs for `bash benchmarks/gpu.sh`.

    python -m benchmarks.gpu_wheels [--out .whl] [--there NAME,...] [--limit-mib 64]

Run it where there is an index. Copy the folder to the checkout on the other machine. gpu.sh installs what lies there.
Versions are those of constraints.txt, for CPython 3.12 on x86-64 Linux. Left out are torch, which that machine has with
what it brings, and the packages in THERE, which images for deep learning mostly hold; `--there ""` collects those too.
DeepSpeed, MLflow and TileDB-SOMA are not needed: `benchmarks.train` then runs on the plain engine alone.
Reading order: NEEDED, THERE, main, missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scldm.errors import REFUSED

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MIB = 64.0
# distribution -> the module that it brings; of all that the steps of benchmarks/gpu.py import, torch's own needs aside
NEEDED = {
    "anndata": "anndata",
    "array-api-compat": "array_api_compat",
    "attrs": "attr",
    "cloudpickle": "cloudpickle",
    "donfig": "donfig",
    "execnet": "execnet",
    "fsspec": "fsspec",
    "google-crc32c": "google_crc32c",
    "h5py": "h5py",
    "hypothesis": "hypothesis",
    "iniconfig": "iniconfig",
    "isal": "isal",
    "joblib": "joblib",
    "legacy-api-wrap": "legacy_api_wrap",
    "llvmlite": "llvmlite",
    "lz4": "lz4",
    "markdown-it-py": "markdown_it",
    "mdurl": "mdurl",
    "narwhals": "narwhals",
    "natsort": "natsort",
    "numba": "numba",
    "numcodecs": "numcodecs",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "packaging": "packaging",
    "pandas": "pandas",
    "pluggy": "pluggy",
    "Pygments": "pygments",
    "pytest": "pytest",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "python-dateutil": "dateutil",
    "pytz": "pytz",
    "PyYAML": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "scverse-misc": "scverse_misc",
    "session-info2": "session_info2",
    "six": "six",
    "sortedcontainers": "sortedcontainers",
    "threadpoolctl": "threadpoolctl",
    "tzdata": "tzdata",
    "zarr": "zarr",
    "zstandard": "zstandard",
}
# of those, what images for deep learning mostly hold; pandas is not among them, as anndata wants one below 3
THERE = (
    *(
        "attrs",
        "cloudpickle",
        "execnet",
        "fsspec",
        "h5py",
        "hypothesis",
        "iniconfig",
        "joblib",
        "llvmlite",
        "markdown-it-py",
        "mdurl",
    ),
    *("narwhals", "numba", "numpy", "packaging", "pluggy", "Pygments", "pytest", "pytest-timeout", "pytest-xdist"),
    *("python-dateutil", "PyYAML", "rich", "safetensors", "scikit-learn", "scipy", "six", "sortedcontainers"),
    *("threadpoolctl",),
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def main(argv: Sequence[str] | None = None) -> int:
    """Download, and print the total; 2 where it is over the limit."""
    parser = argparse.ArgumentParser("gpu_wheels", description="Collect wheels for a machine without a package index.")
    parser.add_argument("--out", default=".whl", help="folder of the wheels")
    parser.add_argument("--there", default=",".join(THERE), help="packages that the machine has, with commas")
    parser.add_argument("--limit-mib", type=float, default=LIMIT_MIB, help="of all wheels together")
    options = parser.parse_args(argv)
    there = [name for name in options.there.split(",") if name]
    if unknown := [name for name in there if name not in NEEDED]:
        print(f"gpu_wheels: error: --there: {unknown[0]} is none of {', '.join(NEEDED)}", file=sys.stderr)
        return REFUSED
    wanted = [name for name in NEEDED if name not in there]
    out = Path(options.out)
    if any(out.glob("*.whl")):
        print(
            f"gpu_wheels: error: {out} has wheels already; two versions of one would clash: empty it", file=sys.stderr
        )
        return REFUSED
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *platforms]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), "-d", str(out), *wanted], check=True)
    return judged(out, wanted, options.limit_mib)


def judged(out: Path, wanted: Sequence[str], limit_mib: float) -> int:
    """Print what the wheels take; 2 where that is over the limit."""
    sizes = {path.name: path.stat().st_size / 2**20 for path in sorted(out.glob("*.whl"))}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total:8.2f} MiB  {len(sizes)} wheels of {len(wanted)} packages in {out}")
    if total > limit_mib:
        print(
            f"gpu_wheels: error: over the limit of {limit_mib:g} MiB: name in --there what the machine has",
            file=sys.stderr,
        )
        return REFUSED
    return 0


def missing() -> list[str]:
    """Of the needed packages, those that this Python can't find."""
    return [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]


if __name__ == "__main__":
    sys.exit(main())
