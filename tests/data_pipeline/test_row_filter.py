"""Filters choose rows, and are nothing more: those of a manifest that a stranger wrote are applied too."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_pipeline.convert.row_filter import matches
from scldm.errors import InputError

FRAME = pd.DataFrame(
    {"tissue": ["lung", "skin", "lung", "gut"], "n_genes": [900, 400, 100, 700], "cell type": ["a", "b", "c", "a"]}
)


@pytest.mark.parametrize(
    "expression, rows",
    [
        ("tissue == 'lung' and n_genes > 500", [0]),
        ("tissue == 'lung' && n_genes > 500 || tissue == 'gut'", [0, 3]),
        ("tissue in ['lung', 'gut']", [0, 2, 3]),
        ("tissue not in ('lung', 'gut')", [1]),
        ("tissue.isin(['skin'])", [1]),
        ("not (n_genes > 500) and 50 < n_genes < 200", [2]),
        ("(n_genes > 500) & ~(tissue == 'gut')", [0]),
        ("`cell type` == 'a'", [0, 3]),
        ("tissue == '@import(`x`)' or n_genes == 400", [1]),
    ],
)
def test_a_filter_chooses(expression: str, rows: list[int]) -> None:
    assert np.flatnonzero(matches(FRAME, expression, "a.h5ad", "key")).tolist() == rows


@pytest.mark.parametrize(
    "expression",
    [
        "@pd.read_pickle('/tmp/x')",
        "n_genes > @np.iinfo('i4').max",
        "__pd_eval_local_frame == 1",
        "tissue.map(print) == 1",
        "tissue.str.len() > 3",
        "n_genes.isin(open('/etc/passwd'))",
        "n_genes.isin(values=[1])",
        "tissue.__class__.__mro__ == 1",
        "n_genes.to_csv('/tmp/x') == 1",
        "sin(n_genes) > 0",
        "n_genes > 10**10**10",
        "(lambda: 1)() == 1",
        "[k for k in tissue] == 1",
        "n_genes = 3",
        "x = n_genes > 3\ny = 4",
        "tissue['a'] == 1",
        f"{'(' * 500}n_genes{')' * 500} > 1",
    ],
)
def test_whatever_else_pandas_would_do_is_refused(expression: str) -> None:
    with pytest.raises(InputError, match=r"a.h5ad: key=.* can't be applied: "):
        matches(FRAME, expression, "a.h5ad", "key")
