"""An exported model in MLflow's registry: as pyfunc, with its code, in the run that trained it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scldm import pretrained
from scldm.errors import Busy, InputError
from scldm.model_folder import read_config
from scldm.pretrained import Pretrained
from scldm.train.mlflow_run import MLFLOW_ENVIRONMENT, Sender, cause_of, may_pass
from scldm.train.tracked import check_followed, check_trusted, followed_alone, read_note

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


def register(folder: Path, run: Path, name: str, alias: str = "") -> str:
    """Send a model folder to the MLflow run of the folder `run`, and register it. Returns its URI.

    Raises: InputError for a run without MLflow and for what a server refuses, Busy for one that is away.
    """
    check_followed(run)
    of_rows = MLFLOW_ENVIRONMENT[TIMEOUT]
    if os.environ.get(TIMEOUT, of_rows) == of_rows:  # the user gave none
        os.environ[TIMEOUT] = "120"  # a model is larger than a row, and waited for
    try:
        return _registered(folder, run, name, alias)
    except InputError:
        raise
    except Exception as error:  # MLflow's, and those of the stores behind it
        uri = (read_note(run) or {}).get("uri", "")
        kind, what = (Busy, "Run the same command again") if may_pass(error) else (InputError, "Mend that")
        raise kind(
            f"register={name}: the model folder {folder} is written, MLflow at {uri} failed: "
            f"{cause_of(error, uri).rstrip('.')}. {what}"
        ) from error


def _registered(folder: Path, run: Path, name: str, alias: str) -> str:
    at = f"model-{read_config(folder).weights[:12]}"  # a version stays what it was
    with followed_alone(run):
        sender = Sender(run, check=functools.partial(check_trusted, [], ""))
        sender.send()  # the run may be new to the store
        client = sender.client
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as place:
            save_pyfunc(folder, Path(place) / "model")
            client.log_artifacts(sender.run_id, str(Path(place) / "model"), at)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(sender.run_id).info.artifact_uri}/{at}"
        version = client.create_model_version(name, source, run_id=sender.run_id)
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
        return f"models:/{name}/{version.version}"


def save_pyfunc(folder: Path, out: Path) -> None:
    """Write a model folder as a pyfunc model, with this scldm's code and the versions of what it needs."""
    import mlflow.pyfunc

    model = pretrained.load(folder)
    mlflow.pyfunc.save_model(
        str(out),
        loader_module="scldm.served",
        data_path=str(folder),
        code_paths=[str(Path(pretrained.__file__).parent)],
        signature=signature_of(model),
        input_example=example_of(model),
        pip_requirements=requirements(),
    )


def signature_of(model: Pretrained) -> Any:
    """Conditions and library sizes, none of which must be given, and counts of all genes. Other columns are dropped."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    assert model.dit is not None
    numbers = model.dit.config.continuous
    kinds = {name: "double" if name in numbers else "string" for name in model.dit.n_labels}
    kinds["library_size"] = "double"
    columns: Any = [ColSpec(kind, name, required=False) for name, kind in kinds.items()]
    counts = TensorSpec(np.dtype("int32"), (-1, model.genes.n_genes))
    return ModelSignature(Schema(columns), Schema([counts]), ParamSchema([ParamSpec("seed", "long", 0)]))


def example_of(model: Pretrained) -> pd.DataFrame:
    """A cell of every condition's first label."""
    assert model.dit is not None
    first = {name: model.conditions.labels[name][0] for name in model.dit.n_labels}
    return pd.DataFrame([{k: float(v) if k in model.dit.config.continuous else v for k, v in first.items()}])


def requirements() -> list[str]:
    """What scldm needs to generate, in the versions here. Of a local build, the release that it is of."""
    wanted = [line for line in importlib.metadata.requires("scldm") or [] if "extra ==" not in line]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted]
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]
