"""Which rows of a table an expression chooses, as SOMA's filters do: comparisons of columns, `in`, and, or, not.

A comparison with a missing value is neither true nor false, and only rows of which all is true are chosen. Nothing else
of Python is evaluated.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from scldm.errors import InputError

QUOTED = "_quoted_"  # begins a name that stood in backticks
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def matches(frame: pd.DataFrame, expression: str, path: str, key: str) -> np.ndarray:
    """The rows that an expression chooses, bool (rows,).

    Raises: InputError for what is no such expression, and for one that is not true or false.
    """
    what, names = f"{path}: {key}={expression!r}", list[str]()
    text = TOKENS.sub(lambda found: _as_python(found, names), expression).strip()
    try:
        value = Expression(frame, names).value(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        why = "an assignment. == compares" if re.search(r"(?<![=!<>])=(?!=)", text) else error.msg
        raise InputError(f"{what} can't be applied: {why}") from None
    except (TypeError, ValueError, RecursionError, MemoryError) as error:  # what is nested too deep may be any of them
        raise InputError(f"{what} can't be applied: {(str(error).splitlines() or ['nested too deep'])[0]}") from None
    return where_true(value if isinstance(value, pd.Series) else pd.Series([value] * len(frame)), what)


# text, which stays as it is. Names with blanks in backticks, and && and ||, which Python does not know
TOKENS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`([^`]+)`|&&|\|\|""")


def _as_python(found: re.Match[str], names: list[str]) -> str:
    if found[1] is None:
        return {"&&": " and ", "||": " or "}.get(found[0], found[0])
    names.append(found[1])
    return f"{QUOTED}{len(names) - 1}"


def where_true(values: Any, what: str) -> np.ndarray:
    """Which of some booleans are true. Missing ones are not.

    Raises: InputError for anything but booleans: text and most numbers would all count as true.
    """
    column = pd.Series(values)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if len(column) and pd.api.types.infer_dtype(column) != "boolean":
        present = column.dropna()
        raise InputError(
            f"{what} gives {present.tolist()[0] if len(present) else 'no value'!r}, not true or false. Compare it with "
            'something, as in "n_genes > 500"'
        )
    return column.astype("boolean").to_numpy(bool, na_value=False)


class Expression:
    """The value of a parsed expression: a column, a constant, or booleans that may be missing."""

    def __init__(self, frame: pd.DataFrame, quoted: list[str]) -> None:
        self.frame, self.quoted = frame, quoted

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Name():
                return self.column(node.id)
            case ast.List() | ast.Tuple() | ast.Set():
                return [self.value(of) for of in node.elts]
            case ast.UnaryOp(op=ast.Not() | ast.Invert()):
                return ~self.truth(node.operand)
            case ast.BoolOp():
                found = self.truth(node.values[0])
                for of in node.values[1:]:
                    found = found & self.truth(of) if isinstance(node.op, ast.And) else found | self.truth(of)
                return found
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                left, right = self.truth(node.left), self.truth(node.right)
                return left & right if isinstance(node.op, ast.BitAnd) else left | right
            case ast.Compare():
                return self.compared(node)
            case ast.Call(func=ast.Attribute(attr="isin", value=of), args=[among], keywords=[]):
                return self.contained(self.value(of), self.value(among))
        raise ValueError(f"{ast.unparse(node)!r} is none of: comparisons of columns, in, and, or, not")

    def column(self, name: str) -> pd.Series:
        if (number := name.removeprefix(QUOTED)) != name and number.isdigit() and int(number) < len(self.quoted):
            name = self.quoted[int(number)]
        if name == "index" and name not in self.frame:  # the names of cells or genes
            return pd.Series(self.frame.index.astype(object), range(len(self.frame)))
        if name not in self.frame:
            raise ValueError(f"there is no column {name!r}. There are {', '.join(map(str, self.frame.columns[:30]))}")
        return pd.Series(self.frame[name]).reset_index(drop=True)

    def truth(self, node: ast.expr) -> pd.Series:
        value = self.value(node)
        column = value if isinstance(value, pd.Series) else pd.Series([value] * len(self.frame))
        absent = column.isna()
        found = pd.Series(where_true(column, ast.unparse(node)), dtype="boolean")
        found[absent] = pd.NA
        return found

    def compared(self, node: ast.Compare) -> pd.Series:
        found, left = None, self.value(node.left)
        for op, of in zip(node.ops, node.comparators, strict=True):
            right = self.value(of)
            if isinstance(op, ast.In | ast.NotIn):
                one = self.contained(left, right)
                one = ~one if isinstance(op, ast.NotIn) else one
            elif type(op) in COMPARE:
                one = self.one(COMPARE[type(op)], left, right)
            else:
                raise ValueError("`is` compares nothing here. Write ==")
            found, left = one if found is None else found & one, right
        assert found is not None
        return found

    def one(self, compare: Callable[[Any, Any], Any], left: Any, right: Any) -> pd.Series:
        if not isinstance(left, pd.Series) and not isinstance(right, pd.Series):
            raise ValueError("a comparison needs a column")
        sides = [_plain(of) for of in (left, right)]
        kinds = {kind for of in sides if (kind := _kind(of))}
        if len(kinds) > 1:
            raise ValueError(f"it compares {' with '.join(sorted(kinds))}")
        absent = np.zeros(len(self.frame), bool)
        for of in sides:
            absent |= np.asarray(pd.isna(of), bool)
        filled = [of.astype(object).where(~absent, next(iter(of[~absent]), None)) if isinstance(of, pd.Series)
                  and of.dtype == object else of for of in sides]  # fmt: skip
        found = pd.Series(compare(*filled), dtype="boolean")
        found[absent] = pd.NA
        return found

    def contained(self, column: Any, among: Any) -> pd.Series:
        if not isinstance(column, pd.Series) or not isinstance(among, list):
            raise ValueError("`in` needs a column and a list, as in: tissue in ['lung', 'liver']")
        found = pd.Series(False, index=range(len(self.frame)), dtype="boolean")
        for value in among:
            found = found | self.one(operator.eq, column, value)
        found[column.isna().to_numpy()] = pd.NA
        return found


def _plain(of: Any) -> Any:
    """A column of categories as its values."""
    if isinstance(of, pd.Series) and isinstance(of.dtype, pd.CategoricalDtype):
        return of.astype(object)
    return of


def _kind(of: Any) -> str:
    """Text, numbers or booleans. Nothing where values differ or are missing."""
    values = of if isinstance(of, pd.Series) else pd.Series([of])
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return "numbers"
    return {"string": "text", "boolean": "true or false"}.get(kind, "")
