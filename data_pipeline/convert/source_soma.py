"""SOMA experiments and the Census: obs and var by their filters, counts by whole ranges of joinids.

Reading order: opening, kind_of, open_soma_source, SomaMatrix.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tiledbsoma

from data_pipeline.convert.config import SourceConfig
from data_pipeline.convert.genes import SourceGenes
from data_pipeline.convert.narrow import Coordinates, RowBuffers, Rows, coo_to_rows
from data_pipeline.convert.source import OpenSource, SourceSpec, spans
from scldm.errors import Busy, InputError
from scldm.label_text import as_labels

TILEDB: dict[str, Any] = {
    # a read hands its result over in tables of this size. The default of 1 GiB a column would break any memory bound
    "soma.init_buffer_bytes": 64 << 20,
    # else a read ends the process now and then (once in some 10,000 small ones): TileDB 2.28 to 2.30 frees what the
    # threads that merge tiles still use (TileDB pull request 5723)
    "sm.query.sparse_global_order.preprocess_tile_merge": 0,
}
TILE_ROWS = 2048  # of the Census and of what tiledbsoma writes


def context() -> tiledbsoma.SOMATileDBContext:
    return tiledbsoma.SOMATileDBContext(tiledb_config=TILEDB)


def open_collection(uri: str, census_version: str) -> Any:
    """What lies at a URI, or a Census version on the net, opened for reading.

    Raises: InputError for a URI where no SOMA object lies, an unknown version.
    """
    if census_version and not uri:
        with explained(f"source.census_version={census_version!r} can't be opened"):
            import cellxgene_census  # half a second of imports that a SOMA experiment needs nothing of

            return cellxgene_census.open_soma(census_version=census_version, tiledb_config=TILEDB)
    with explained(f"source.paths: {uri} can't be opened"):  # a Census too: cellxgene_census would send no credentials
        absolute = uri if "://" in uri else str(Path(uri).absolute())  # TileDB finds nothing at `./atlas`
        return tiledbsoma.open(absolute, context=context())


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises: InputError for an error of TileDB, Busy where an object store failed: another start may succeed."""
    try:
        yield
    except InputError:
        raise
    except (tiledbsoma.SOMAError, RuntimeError, ValueError, OSError) as error:
        why = str(error).splitlines()[0].removeprefix("[TileDB::Task] Error: Caught std::exception: ")
        why = re.sub(r"\s*\[(Error Type|Remote IP|Request ID|Headers): [^\]]*\]", "", why)
        failed = re.search(r"HTTP Response Code: (5..|-1)|curlCode", why)
        raise (Busy if failed else InputError)(f"{what}: {why}") from None


def census_release(version: str) -> str:
    """The release date that a Census version stands for today (`stable`, `latest`). A date stands for itself.

    Raises: InputError for a name that is unknown, and where the list of versions can't be had.
    """
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", version):
        return version
    import cellxgene_census

    try:
        return str(cellxgene_census.get_census_version_description(version)["release_build"])
    except (ValueError, OSError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"source.census_version={version!r} can't be looked up: {why}") from None


def kind_of(uri: str) -> Literal["soma", "census"]:
    """Whether a SOMA experiment or a Census lies at a URI. Raises: InputError for neither."""
    with open_collection(uri, "") as found:
        if isinstance(found, tiledbsoma.Experiment):
            return "soma"
        if isinstance(found, tiledbsoma.Collection) and "census_data" in found:
            return "census"
    raise InputError(f"source.paths: {uri}: neither a SOMA experiment nor a Census (a collection with census_data)")


def open_experiment(uri: str, kind: str, organism: str, census_version: str) -> tuple[Any, Any]:
    """The collection to close, and its experiment."""
    if kind == "soma":
        found = open_collection(uri, "")
        if not isinstance(found, tiledbsoma.Experiment):
            raise InputError(f"source.paths: {uri}: a {type(found).__name__}, not a SOMA experiment")
        return found, found
    census = open_collection(uri, census_version)
    if "census_data" not in census:
        raise InputError(f"source.paths: {uri}: not a Census: it has no census_data")
    data = census["census_data"]
    if organism not in data:
        raise InputError(f"source.organism={organism!r} is not in the Census. It has {', '.join(data)}")
    return census, data[organism]


def open_soma_source(uri: str, kind: str, config: SourceConfig, columns: tuple[str, ...], missing: str) -> OpenSource:
    """Raises: InputError for a measurement, layer, column or filter that doesn't fit the experiment."""
    version = "" if uri else census_release(config.census_version)
    name = uri or f"Census {version}"
    collection, experiment = open_experiment(uri, kind, config.organism, version)
    with collection, explained(f"{name} can't be read"):
        matrix, layer = _matrix(experiment, config.measurement, config.layer, name)
        var_schema = experiment.ms[config.measurement].var.schema.names
        gene_column = config.gene_column or next((c for c in ("feature_id", "var_id") if c in var_schema), "")
        if gene_column not in var_schema:
            raise InputError(
                f"{name}: var has no column {gene_column or 'feature_id'!r}. Give as source.gene_column one of "
                f"{', '.join(var_schema)}"
            )
        var = experiment.ms[config.measurement].var.read(column_names=["soma_joinid", gene_column]).concat().to_pandas()
        n_rows, n_columns = matrix.shape
        if (var["soma_joinid"].to_numpy() != np.arange(len(var))).any() or len(var) > n_columns:
            raise InputError(f"{name}: var's soma_joinids are not 0 ... {n_columns - 1} in order: it can't be read")
        keep_gene = np.ones(len(var), bool)
        if config.var_filter:
            of_var = experiment.ms[config.measurement].var
            query = _read(of_var, ["soma_joinid"], config.var_filter, name, "source.var_filter")
            keep_gene[:] = False
            keep_gene[query["soma_joinid"].to_numpy()] = True
        schema = experiment.obs.schema.names
        for column in columns:
            if column not in schema:
                raise InputError(f"{name}: obs has no column {column!r}. It has {', '.join(schema)}")
        obs_filter = config.obs_filter
        if config.primary_data_only:
            if "is_primary_data" not in schema:
                raise InputError(f"{name}: source.primary_data_only: obs has no column is_primary_data")
            obs_filter = f"({obs_filter}) and is_primary_data == True" if obs_filter else "is_primary_data == True"
        wanted = list(dict.fromkeys(["soma_joinid", *columns]))
        table = _read(experiment.obs, wanted, obs_filter, name, "source.obs_filter")
        table = table.sort_values("soma_joinid", ignore_index=True)
        rows = table["soma_joinid"].to_numpy().astype(np.int64)
        obs = pd.DataFrame(index=range(len(rows)))
        for column in columns:
            obs[column] = as_labels(pd.Series(table[column]), name, missing)
        n_obs, mean_nonzeros = experiment.obs.count, _mean_nonzeros(matrix, rows)
    spec = SourceSpec(
        kind, uri, layer, n_rows, n_columns, mean_nonzeros, measurement=config.measurement,
        organism=config.organism if kind == "census" else "", census_version=version,
    )  # fmt: skip
    report = {"cells_not_selected": n_obs - len(rows), "genes_not_selected": int((~keep_gene).sum())}
    return OpenSource(spec, SourceGenes.of(name, var[gene_column]), keep_gene, rows, obs, report)


def _matrix(experiment: Any, measurement: str, layer: str, name: str) -> tuple[Any, str]:
    if measurement not in experiment.ms:
        raise InputError(f"{name}: source.measurement={measurement!r} is not there. It has {', '.join(experiment.ms)}")
    layers = experiment.ms[measurement].X
    if not layer:
        layer = "raw" if "raw" in layers else next(iter(layers)) if len(layers) == 1 else ""
    if layer not in layers:
        raise InputError(
            f"{name}: source.layer={layer or 'raw'!r} is not in X of {measurement}. It has {', '.join(layers)}"
        )
    if not isinstance(layers[layer], tiledbsoma.SparseNDArray):
        found = type(layers[layer]).__name__
        raise InputError(f"{name}: layer {layer!r} is a {found}. It must be a SparseNDArray")
    return layers[layer], layer


def _mean_nonzeros(matrix: Any, rows: np.ndarray) -> float:
    """Stored values a row, from up to 512 rows in two places: what plans memory and disk. The exact number may cost as
    much as reading the layer."""
    places = [len(rows) // 4, 3 * len(rows) // 4]
    sample = np.unique(np.concatenate([rows[p : p + 256] for p in places]) if len(rows) > 512 else rows)
    if not len(sample):
        return 0.0
    return sum(table.num_rows for table in matrix.read((sample,)).tables()) / len(sample)


def _read(frame: Any, columns: list[str], value_filter: str, name: str, key: str) -> pd.DataFrame:
    try:
        return frame.read(column_names=columns, value_filter=value_filter or None).concat().to_pandas()
    except Exception as error:  # its parser raises SyntaxError, KeyError, SOMAError and others
        if not value_filter:
            raise
        raise InputError(f"{name}: {key}={value_filter!r} can't be applied: {str(error).splitlines()[0]}") from None


class SomaMatrix:
    """A layer of an experiment, by chunks of rows."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.collection, experiment = open_experiment(spec.uri, spec.kind, spec.organism, spec.census_version)
        with explained(f"{spec.uri} can't be read"):
            self.obs = experiment.obs
            self.matrix, _ = _matrix(experiment, spec.measurement, spec.layer, spec.uri)

    def read(self, rows: np.ndarray, chunk_bytes: int) -> Iterator[Rows]:
        """By ranges of joinids. Where memory allows it, the next one is read while this one is worked on."""
        # two int64 coordinates and a value, and a sorted copy
        row_bytes = 28 * max(self.spec.mean_nonzeros, 1.0)
        n_ahead = int(chunk_bytes >= 2 * TILE_ROWS * row_bytes)
        buffers = RowBuffers()
        ranges = list(self._ranges(rows, max(int(chunk_bytes / (1 + n_ahead) / row_bytes), 1)))
        with ThreadPoolExecutor(1) as thread:
            coming = deque(thread.submit(self._read_range, rows[a:b]) for a, b in ranges[:n_ahead])
            for k, (a, b) in enumerate(ranges):
                coming += [thread.submit(self._read_range, rows[c:d]) for c, d in ranges[k + n_ahead : k + n_ahead + 1]]
                low, parts = coming.popleft().result()
                row_of = np.full(int(rows[b - 1]) + 1 - low, -1, np.int32)
                row_of[rows[a:b] - low] = np.arange(b - a, dtype=np.int32)
                found = coo_to_rows(rows[a:b], row_of, low, parts, buffers)
                del parts
                yield found

    def _ranges(self, rows: np.ndarray, fitting: int) -> Iterator[tuple[int, int]]:
        """Positions among `rows` of ranges of at most `fitting` rows. They end where tiles end, if they can: a tile is
        decoded whole for any part of it."""
        step = fitting // TILE_ROWS * TILE_ROWS or fitting
        tile = rows // step
        # unwanted rows cost their reading, a range of its own costs about a millisecond: some hundred rows
        for a, b in spans(tile, tile, tile + 1, 1, gap=0):
            for c, d in spans(rows[a:b], rows[a:b], rows[a:b] + 1, step, gap=256):
                yield a + c, a + d

    def _read_range(self, rows: np.ndarray) -> tuple[int, list[Coordinates]]:
        low, high = int(rows[0]), int(rows[-1])
        with explained(f"{self.spec.uri}: rows {low} to {high} can't be read"):
            tables = self.matrix.read((slice(low, high),)).tables()
            columns = ("soma_dim_0", "soma_dim_1", "soma_data")
            return low, [tuple(t.column(c).to_numpy() for c in columns) for t in tables]

    def row_name(self, row: int) -> str:
        return f"soma_joinid {row}"

    def close(self) -> None:
        self.collection.close()
