"""A column of obs as labels is one thing everywhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scldm.errors import InputError
from scldm.label_text import known_label, labels_of

OBS = pd.DataFrame({"dose": [10.0, 0.1], "kind": pd.Categorical(["a", "b"]), "gap": ["x", None]})


def test_a_number_is_the_same_label_however_it_is_stored() -> None:
    for values in (OBS["dose"], OBS["dose"].astype("Float32"), OBS["dose"].astype("category"), ["10", "0.1"]):
        assert labels_of(pd.DataFrame({"dose": values}), "dose", "x").tolist() == ["10", "0.1"]
    assert labels_of(OBS, "kind", "x").dtype.kind == "U"


@pytest.mark.parametrize(
    "column, said",
    [("none", "x: obs has no column split='none'. It has dose, kind, gap"), ("gap", "'gap' has no value in 1 cells")],
)
def test_what_is_no_label_is_refused(column: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        labels_of(OBS, column, "x", "split")
    with pytest.raises(InputError, match="It has a, b"):
        labels_of(OBS, "none", "x", "split", np.array(["a", "b"]))


@pytest.mark.parametrize("gap", [None, "", "nan"])
def test_a_missing_value_is_refused_or_labelled(gap: str | None) -> None:
    obs = pd.DataFrame({"drug": ["x", gap]})
    with pytest.raises(InputError, match="x: obs column condition='drug' has no value in 1 cells. Leave them out"):
        labels_of(obs, "drug", "x", "condition")
    assert labels_of(obs, "drug", "x", "condition", missing="none").tolist() == ["x", "none"]


@pytest.mark.parametrize("typed, found", [("10.0", "10"), ("10.", "10"), ("-1.50", "-1.5"), ("10", "10")])
def test_a_typed_number_is_found_by_any_spelling(typed: str, found: str) -> None:
    assert known_label(typed, ["10", "-1.5", "1000"]) == found


@pytest.mark.parametrize("name", ["1_0", "1e3", "inf", "nan", "\u0661\u0660", " 10", "0x10"])
def test_a_name_that_only_python_reads_as_a_number_is_a_name(name: str) -> None:
    assert known_label(name, ["10", "1000", "inf", "nan", "16"]) == name
