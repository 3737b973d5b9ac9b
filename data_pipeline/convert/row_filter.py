"""Filters of obs and var: names of columns, comparisons, and, or, not, in, isin. Others' filters run no code.

Reading order: matches, where_true, check_filter.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np
import pandas as pd

from scldm.errors import InputError

QUOTED = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|`([^`\n]*)`")
COMBINED = (ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.BinOp, ast.BitAnd, ast.BitOr)
COMPARED = (ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.USub)
VALUES = (ast.Expression, ast.Name, ast.Load, ast.List, ast.Tuple)


def matches(frame: pd.DataFrame, expression: str, path: str, key: str) -> np.ndarray:
    """Rows of a table that an expression chooses. Raises: InputError for one that is no filter, or can't be applied."""
    plain = expression.replace("&&", " and ").replace("||", " or ")
    check_filter(plain, f"{path}: {key}={expression!r}")
    try:
        result = frame.eval(plain)
    except Exception as error:  # pandas raises whatever its parser, its types or numexpr raise
        raise InputError(f"{path}: {key}={expression!r} can't be applied: {str(error).splitlines()[0]}") from None
    return where_true(
        pd.Series(result, range(len(frame))) if np.isscalar(result) else result, f"{path}: {key}={expression!r}"
    )


def where_true(values: Any, what: str) -> np.ndarray:
    """Which of some booleans are true; missing ones are not.

    Raises: InputError for anything but booleans: text and most numbers would all count as true.
    """
    column = pd.Series(values)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if pd.api.types.infer_dtype(column) != "boolean":
        present = column.dropna()
        raise InputError(
            f"{what} gives {present.tolist()[0] if len(present) else 'no value'!r}, not true or false; compare it with "
            'something, as in "n_genes > 500"'
        )
    return column.astype("boolean").to_numpy(bool, na_value=False)


def check_filter(expression: str, what: str) -> None:
    """Raises: InputError for more than a filter is made of: pandas would call functions and read our variables."""
    # pandas' quotes for names with blanks, which Python does not know
    text = QUOTED.sub(lambda quoted: quoted[0] if quoted[1] is None else "column", expression)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", "") or str(error)
        hint = "; == compares" if re.search(r"(?<![=!<>])=(?!=)", text) else ""
        raise InputError(f"{what} can't be applied: {why}{hint}") from None
    called: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_isin(node):
            called |= {node, node.func}
            continue
        is_value = isinstance(node, ast.Constant) and type(node.value) in (str, int, float, bool)
        is_known = is_value or node in called or isinstance(node, (*COMBINED, *COMPARED, *VALUES))
        if not is_known or (isinstance(node, ast.Name) and node.id.startswith("__pd_eval_local_")):  # pandas' `@`
            found = (ast.get_source_segment(text.strip(), node) or type(node).__name__)[:40]
            raise InputError(
                f"{what} can't be applied: {found!r} is no part of a filter, which has names of columns, values, "
                "comparisons, and, or, not, in, and COLUMN.isin([...])"
            )


def _is_isin(node: ast.Call) -> bool:
    of = node.func
    is_of_column = isinstance(of, ast.Attribute) and of.attr == "isin" and isinstance(of.value, ast.Name)
    return is_of_column and len(node.args) == 1 and isinstance(node.args[0], ast.List) and not node.keywords
