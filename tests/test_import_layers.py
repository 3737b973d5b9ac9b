"""Who may import whom, held against the code; imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parent.parent
OURS = ("benchmarks", "data_pipeline", "launch", "scldm")

# may be imported by all, and know no more than what an error is; draws is numbers, nothing else
EVERYWHERE = {f"scldm.{name}" for name in ("checked", "errors", "files", "given_json", "progress", "version")}
EVERYWHERE |= {"scldm.environment", "scldm.draws", "scldm.hdf5"}
LEAVES = EVERYWHERE | {
    "scldm.arguments",
    "scldm.batch",
    "scldm.vocab",
    "scldm.label_text",
    "scldm.cells_file",
    "scldm.cells_opened",
    "scldm.count_matrix",
    "scldm.likelihood",
    "scldm.count_basis",
    "scldm.count_draws",
    "scldm.library_size",
    "scldm.micro_batches",
    "scldm.model_files",
    "scldm.tf32",
    "scldm.weights",
    "scldm.evaluate",
    "scldm.kernels",
    "scldm.parallel",
}
FOR_DATA = {"scldm.batch", "scldm.cells_file", "scldm.cells_opened", "scldm.count_matrix", "scldm.label_text"}
FOR_DATA |= {"scldm.micro_batches", "scldm.vocab"}
BESIDE_VERBS = {"launch.cli", "launch.config", "launch.failure", "launch.own_cells", "launch.staged"}
BESIDE_VERBS |= {
    "launch.checkpoints",
    "launch.followed",
    "launch.inputs",
    "launch.judged",
    "launch.planned",
    "launch.together",
    "launch.keys",
    "launch.registry",
    "launch.run_data",
    "launch.trained",
    "launch.training",
    "launch.verbs",
}
LAUNCH = BESIDE_VERBS | {"launch.cluster", "launch.evaluation", "launch.planning"}
ANYTHING = {"data_pipeline", "scldm"}  # every room of these
# a verb is wiring: this one alone needs the keys of other verbs
ABOVE_VERBS = {"launch.quickstart"}
# room -> the rooms of ours that it may import besides itself and EVERYWHERE
MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES - EVERYWHERE},
    "scldm.evaluate": {"scldm.label_text", "scldm.likelihood", "scldm.vocab"},
    "scldm.cells_file": {"scldm.cells_opened", "scldm.count_matrix"},
    "scldm.count_matrix": {"scldm.cells_opened"},
    "scldm.vocab": {"scldm.label_text"},
    "scldm.kernels": {"scldm.count_basis", "scldm.tf32"},
    "scldm.parallel": {"scldm.micro_batches", "scldm.tf32"},
    "scldm.model": LEAVES - {"scldm.parallel"},
    "scldm.flow": LEAVES | {"scldm.model"},
    "scldm.train": LEAVES | {"scldm.flow", "scldm.model"},
    "scldm.model_folder": LEAVES | {"scldm.model"},
    "scldm.request": LEAVES | {"scldm.flow", "scldm.model"},
    "scldm.networks": LEAVES | {"scldm.flow", "scldm.model", "scldm.request"},
    "scldm.own_cells": LEAVES | {"scldm.networks"},
    "scldm.shown": {"scldm.networks"},
    "scldm.comparison": LEAVES | {"scldm.networks"},
    "scldm.pretrained": LEAVES
    | {"scldm.comparison", "scldm.flow", "scldm.model", "scldm.model_folder", "scldm.networks", "scldm.own_cells"}
    | {"scldm.request", "scldm.shown"},
    # what trains an AnnData is what the verbs run. fit and its cells alone know them, when called
    "scldm.fitting": {"scldm.cells_to_fit", "scldm.pretrained", "data_pipeline", *LEAVES, *LAUNCH, "launch"},
    "scldm.cells_to_fit": {"data_pipeline", *LEAVES},
    "scldm.examples": set(),
    "scldm.served": {"scldm.arguments", "scldm.pretrained"},
    "scldm": {"scldm.fitting", "scldm.flow", "scldm.pretrained"},  # scldm/__init__.py, when a name is first used
    "data_pipeline.stores": set(),
    "data_pipeline.format": FOR_DATA | {"data_pipeline.stores"},
    "data_pipeline.convert": FOR_DATA | {"data_pipeline.stores", "data_pipeline.format"},
    "data_pipeline.stream": FOR_DATA | {"data_pipeline.format"},  # what reads knows nothing of what writes
    "data_pipeline.read_cells": {"data_pipeline.convert"},
    "data_pipeline.direct": {"data_pipeline.convert", "data_pipeline.format"},  # it writes a set, and reads it
    "data_pipeline.write_cells": {"data_pipeline.read_cells"},
    "data_pipeline.write_latents": {"data_pipeline.format", "data_pipeline.stream"},
    "data_pipeline.write_soma": {"data_pipeline.convert", "scldm.cells_file", "scldm.cells_opened"},
    "launch.config": set(),
    "launch.failure": set(),
    **dict.fromkeys(BESIDE_VERBS - {"launch.config", "launch.failure"}, ANYTHING | BESIDE_VERBS),
    "launch.evaluation": ANYTHING | BESIDE_VERBS,
    "launch.cluster": ANYTHING | LAUNCH,
    "launch.planning": ANYTHING | BESIDE_VERBS | {"launch"},  # the keys of a training
    "launch": ANYTHING | LAUNCH,  # a verb
    "benchmarks": ANYTHING | LAUNCH | {"launch"},
}
# package -> the only places that know it; a benchmark's control uses its rival as that one's users do
ONLY_IN = {
    "deepspeed": ("scldm.parallel",),
    "mlflow": ("scldm.train.mlflow_run", "launch.registry"),
    "omegaconf": ("launch.config",),
    "tiledbsoma": ("data_pipeline", "benchmarks"),
    "cellxgene_census": ("data_pipeline", "benchmarks"),
    "webdataset": ("benchmarks",),  # a control of the loader; a test reads shards with it
    "triton": ("scldm.kernels", "benchmarks.kernels_compiled"),
    "torchdiffeq": ("scldm.flow.solver", "benchmarks"),
}
NEVER_IN = {"pandas": ("scldm.flow", "scldm.model", "scldm.kernels")}  # tensors only


def violations(root: Path) -> list[str]:
    """One line for each import of the packages under `root` that the tables above forbid."""
    return [
        f"{path.relative_to(root)}:{line}: {wrong}"
        for path, module, line, target in all_imports(root)
        if (wrong := forbidden(module, target))
    ]


def all_imports(root: Path) -> Iterator[tuple[Path, str, int, str]]:
    """(file, its module, line, imported module) of every import of the packages under `root`."""
    for path in sorted(p for package in OURS for p in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = module if parts[-1] == "__init__" else module.rpartition(".")[0]
        for line, target in imports(ast.parse(path.read_text(), str(path)), package, root):
            yield path, module, line, target


def circle(root: Path) -> list[str]:
    """Modules of a circle of imports, late ones too; none where there is no circle."""
    graph: dict[str, set[str]] = defaultdict(set)
    for _, module, _, target in all_imports(root):
        if target.split(".")[0] in OURS and target != module:
            graph[module].add(target)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def imports(tree: ast.Module, package: str, root: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file; `from a import b` names a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                inner = root.joinpath(*base.split("."), name.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield node.lineno, f"{base}.{name.name}" if is_module else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def room(module: str) -> str:
    """`scldm.model.vae` -> `scldm.model`; the module of a verb, as `launch.encode`, -> `launch`."""
    found = ".".join(module.split(".")[:2])
    verb_or_benchmark = found.startswith("benchmarks.") or (found.startswith("launch.") and found not in LAUNCH)
    return found.split(".")[0] if verb_or_benchmark else found


def forbidden(module: str, target: str) -> str:
    """Why a module may not import a target; empty where it may."""
    top = target.split(".")[0]
    if top in ONLY_IN:
        allowed = any(f"{module}.".startswith(f"{place}.") for place in ONLY_IN[top])
        return "" if allowed else f"only {' and '.join(ONLY_IN[top])} may import {top}"
    if any(f"{module}.".startswith(f"{place}.") for place in NEVER_IN.get(top, ())):
        return f"{module} may not import {top}"
    if top not in OURS:
        return ""
    here, there = room(module), room(target)
    if here == there == "launch" and module != target and module not in ABOVE_VERBS:
        return f"{module} is a verb and imports no other, not {target}"
    if there in (here, "scldm.errors") or (there in EVERYWHERE and here not in EVERYWHERE):
        return ""
    if here in EVERYWHERE:
        is_error = there == "scldm.errors"
        return "" if is_error else f"{here} is a leaf and imports nothing of ours but scldm.errors, not {target}"
    if here not in MAY_IMPORT:
        return f"{here} has no row in the table of {Path(__file__).name}"
    allowed = MAY_IMPORT[here]
    return "" if there in allowed or there.split(".")[0] in allowed & ANYTHING else f"{here} may not import {target}"


def test_the_import_table_holds() -> None:
    assert violations(ROOT) == []


def test_no_imports_run_in_a_circle(tmp_path: Path) -> None:
    assert circle(ROOT) == []
    (tmp_path / "scldm/flow").mkdir(parents=True)
    (tmp_path / "scldm/flow/a.py").write_text("from scldm.flow import b")
    (tmp_path / "scldm/flow/b.py").write_text("def f():\n    import scldm.flow.a")
    assert len(circle(tmp_path)) == 3


@pytest.mark.parametrize(
    "path, text",
    [
        ("scldm/flow/a.py", "import pandas as pd"),
        ("data_pipeline/format/a.py", "from data_pipeline.stream import loader"),
        ("data_pipeline/convert/a.py", "import data_pipeline.write_cells"),
        ("data_pipeline/stream/a.py", "from data_pipeline.convert.write_shards import write_shards"),
        ("data_pipeline/read_cells.py", "from data_pipeline.write_cells import CellWriter"),
        ("launch/a.py", "from launch.b import main"),
        ("launch/evaluation/a.py", "from launch.b import main"),
        ("scldm/flow/a.py", "from scldm.request import labels"),
        ("scldm/model/a.py", "import scldm.train.loop"),
        ("scldm/model/a.py", "from scldm.parallel import dist"),
        ("scldm/flow/a.py", "def f():\n    from scldm import train"),
        ("scldm/flow/a.py", "from ..train import loop"),
        ("scldm/flow/a.py", "from scldm import load"),
        ("scldm/pretrained.py", "from data_pipeline import read_shards"),
        ("scldm/evaluate/a.py", "from scldm.model.vae import VAE"),
        ("scldm/likelihood.py", "from scldm.vocab import GeneVocab"),
        ("scldm/errors.py", "from scldm.progress import Progress"),
        ("scldm/train/loop.py", "import launch.config"),
        ("scldm/train/loop.py", "import mlflow.tracking"),
        ("scldm/train/loop.py", "def f():\n    import deepspeed"),
        ("scldm/train/loop.py", "import importlib\nimportlib.import_module('mlflow')"),
        ("scldm/brandnew.py", "import scldm.batch"),
        ("data_pipeline/a.py", "from scldm.likelihood import nb_log_prob"),
        ("data_pipeline/a.py", "import launch"),
        ("launch/a.py", "from omegaconf import OmegaConf"),
        ("launch/a.py", "import tiledbsoma.io"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str) -> None:
    for package in (
        "scldm/train",
        "scldm/flow",
        "scldm/request",
        "scldm/model",
        "scldm/parallel",
        "data_pipeline/stream",
        "launch",
    ):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
    (tmp_path / "scldm/train/loop.py").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert len(violations(tmp_path)) == 1


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_loading_a_model_needs_neither_deepspeed_mlflow_nor_tiledbsoma() -> None:
    unwanted = (
        "deepspeed",
        "mlflow",
        "tiledbsoma",
        "cellxgene_census",
        "webdataset",
        "scanpy",
        "data_pipeline",
        "launch",
    )
    code = f"import sys, scldm; scldm.load; print([m for m in {unwanted} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_the_data_pipeline_runs_without_torch_but_for_what_makes_batches() -> None:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "data_pipeline").rglob("*.py"))
    named = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    modules = sorted(named - {f"data_pipeline.stream.{makes}" for makes in ("collate", "loader")})
    assert len(modules) > 30
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name + " imports torch")
"""
    run_python(code)


def test_the_command_line_starts_without_torch() -> None:
    run_python("import sys, launch.cli; sys.exit('torch' in sys.modules)")
