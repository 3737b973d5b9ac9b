"""AnnData on the disk, h5ad or zarr, opened by h5py alone. So a name that a file does not have is refused within a
tenth of a second. What reads it is in cells_file.py.

Reading order: open_cells, reading, frame_of, column_names, check_columns, layer_in, check_key, check_out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from scldm.errors import InputError
from scldm.files import check_writable

ZARR_MARKS = ("zarr.json", ".zgroup", ".zmetadata")  # of version 3, and of version 2
NO_STORE = "a folder, and no zarr store. An AnnData file ends in .h5ad or .zarr"
MOST_NAMES = 30  # in a message


def is_zarr(path: str | Path) -> bool:
    """Whether a zarr store lies in a folder."""
    return any((Path(path) / mark).is_file() for mark in ZARR_MARKS)


def is_cells_file(path: str | Path) -> bool:
    """Whether a path is, or by its name would be, a file of cells and no SOMA experiment."""
    endings = (".h5ad", ".h5", ".zarr", ".loom", ".mtx", ".mtx.gz", ".csv", ".tsv", ".txt")
    return str(path).rstrip("/").endswith(endings) or Path(path).is_file() or is_zarr(path) or _is_mtx(path)


def _is_mtx(path: str | Path) -> bool:
    return any(Path(path).glob("*matrix.mtx*")) if Path(path).is_dir() else ".mtx" in Path(path).suffixes


class ZarrFile(AbstractContextManager["ZarrFile"]):
    """A zarr group that is opened, read and closed as an h5py.File."""

    def __init__(self, group: Any, path: str | Path) -> None:
        self.group, self.attrs, self.filename = group, group.attrs, str(path)

    def __getitem__(self, name: str) -> Any:
        return self.group[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.group.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def __iter__(self) -> Iterator[str]:
        return iter(self.group)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.group.store.close()


def open_cells(path: str | Path) -> Any:
    """An h5py.File or a ZarrFile, to read. Typed Any, as h5py's stubs make a union of every node.

    Raises: InputError for what is not there, is none, is locked by a writer, or is a format that scanpy reads.
    """
    if is_zarr(path):
        import zarr  # anndata brings it

        with reading(path):
            return ZarrFile(zarr.open_group(str(path), mode="r"), path)
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    if convert := _by_scanpy(Path(path)):
        raise InputError(f"{path}: {convert}")
    if Path(path).is_dir():
        raise InputError(f"{path}: {NO_STORE}")
    import h5py  # which who asks for less needs nothing of

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        text = str(error)
        if "unable to lock" in text:
            raise InputError(f"{path}: locked: another process has it open for writing. Wait for it to close") from None
        why = "truncated" if "truncated" in text else "not an HDF5 file, damaged, or not permitted to be read"
        raise InputError(f"{path}: can't be opened: {why}") from None
    with reading(path):
        is_10x = "obs" not in file and "matrix" in file
    if is_10x:
        file.close()
        raise InputError(f"{path}: {_told('a 10x file', 'read_10x_h5', Path(path))}")
    return file


def _by_scanpy(path: Path) -> str:
    """What to type where another library reads a format. Empty for h5ad."""
    if path.name.endswith(".loom"):
        return _told("a loom file", "read_loom", path, "anndata.io")
    if _is_mtx(path):
        return _told("10x matrices", "read_10x_mtx", path if path.is_dir() else path.parent)
    if path.suffix in (".csv", ".tsv", ".txt"):
        return _told("a table", "read_csv", path)
    return ""


def _told(what: str, function: str, path: Path, module: str = "scanpy") -> str:
    code = f"import {module} as r; a = r.{function}({str(path)!r}); a.var_names_make_unique(); "
    return f'{what}, no AnnData file. Write one: python -c "{code}a.write_h5ad({str(path.with_suffix(".h5ad"))!r})"'


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what the libraries say about a damaged file into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: can't be read: damaged or truncated ({why})") from None
    except Exception as error:  # anndata has a class for elements that it does not know
        if "anndata" not in type(error).__module__:
            raise
        raise InputError(f"{path}: can't be read: {str(error).splitlines()[0]}") from None


# --- names in a file --------------------------------------------------------------------------------------------------


def is_array(node: Any) -> bool:
    """Whether a node of h5ad or zarr is an array, not a group."""
    return hasattr(node, "shape")


def frame_of(file: Any, name: str, path: str | Path) -> Any:
    """The group of obs, var or raw/var. Raises: InputError for a layout that nothing reads any more."""
    if name not in file:
        raise InputError(f"{path}: not an AnnData file: it has no {name}")
    if is_array(file[name]):
        raise InputError(f"{path}: its layout is that of anndata before 0.7. Read and write it with a newer one")
    return file[name]


def column_names(group: Any) -> list[str]:
    """The columns of obs or var."""
    index = group.attrs.get("_index", "")
    return [str(n) for n in group.attrs.get("column-order", [k for k in group if k not in (index, "__categories")])]


def check_columns(obs: Any, columns: Iterable[str], path: str | Path) -> None:
    """Raises: InputError for a column that obs, as in a file, has not."""
    for name in columns:
        if name not in obs:
            raise no_column(path, name, column_names(obs))


def no_column(path: str | Path, name: str, names: Sequence[str], of: str = "obs") -> InputError:
    """The error that says so. names: the columns that there are"""
    there = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "") or "none"
    return InputError(f"{path}: {of} has no column {name!r}. It has {there}")


def matrix_name(layer: str, there: Collection[str]) -> str:
    """What a user means by X, raw, raw/X, NAME or layers/NAME. Without an AnnData's raw, `raw` is the layer."""
    if layer in ("X", "raw/X") or (layer == "raw" and "raw/X" in there):
        return "raw/X" if layer == "raw" else layer
    return f"layers/{layer.removeprefix('layers/')}"


def matrices(file: Any) -> list[str]:
    """Those of a file, by their names."""
    names = ["X", *(f"layers/{n}" for n in file.get("layers", ())), "raw/X"]
    return [n for n in names if _has_matrix(file, n)]


def _has_matrix(file: Any, name: str) -> bool:
    folder = name.rpartition("/")[0]  # "raw" is an array where it says that there is none
    return (not folder or (folder in file and not is_array(file[folder]))) and name in file and _is_matrix(file[name])


def _is_matrix(node: Any) -> bool:
    return node.ndim == 2 if is_array(node) else {"data", "indices", "indptr"} <= set(node)


def layer_in(file: Any, layer: str, path: str | Path, key: str = "source.layer") -> str:
    """The name of a file's matrix that a user means. Raises: InputError where it has none such."""
    there = matrices(file)
    name = matrix_name(layer, there)
    if name not in there:
        raise InputError(f"{path}: {key}={layer!r} is not in the file. It has {', '.join(there) or 'none'}")
    return name


def check_key(file: Any, key: str, path: str | Path) -> None:
    """Raises: InputError for a key that obsm of a file has not."""
    there = list(file["obsm"]) if "obsm" in file else []
    if key not in there:
        raise InputError(f"{path}: obsm has no key={key}. It has {', '.join(there) or 'none'}")


# --- before a file is written -----------------------------------------------------------------------------------------


def check_out(out: str | Path, endings: Sequence[str], **inputs: str) -> None:
    """Raises: InputError for a file to write that is an input, has another ending, or whose folder can't be written.

    inputs: by their keys
    """
    path = Path(out)
    if path.suffix not in endings:
        raise InputError(f"out={out} must end in {', '.join(endings)}: that says what is written")
    for key, given in inputs.items():
        if given and path.resolve() == Path(given).resolve():
            raise InputError(f"out={out} is {key}={given}, which would be lost. Choose another out")
    if path.is_dir() and path.suffix == ".h5ad":  # of others the writer says whether it goes on
        raise InputError(f"out={out}: {path} can't be written to")
    check_writable("out", str(out), is_file=True)
