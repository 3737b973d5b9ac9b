"""Opens what a config names: h5ad files, SOMA experiments, the Census. Each kind's library is imported late. Who asks
what lies there waits for none.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scldm.cells_opened import NO_STORE, is_cells_file
from scldm.errors import InputError

if TYPE_CHECKING:  # it imports pandas
    from data_pipeline.convert.config import Kind, SourceConfig
    from data_pipeline.convert.source import Matrix, OpenSource, SourceSpec

OF_TILEDB = ("__group", "__tiledb_group.tdb", "__schema")  # one of them is in every SOMA folder
ANYWHERE = re.compile(r"[A-Za-z][\w+.-]*:")  # how a URL begins


def open_sources(config: SourceConfig, columns: tuple[str, ...], missing: str) -> list[OpenSource]:
    """The sources of a config, in an order that doesn't depend on how they were listed.

    columns: obs columns to read
    missing: label for missing values. Empty refuses them
    Raises: InputError for what can't be read or found, or a filter that selects nothing.
    """
    kind, uris = resolve(config)
    if kind == "h5ad":
        from data_pipeline.convert.source_h5ad import open_h5ad_source  # SOMA users need no h5py

        sources = [open_h5ad_source(uri, config, columns, missing) for uri in uris]
    else:
        from data_pipeline.convert.source_soma import open_soma_source  # h5ad users need no tiledbsoma

        sources = [open_soma_source(uri, kind, config, columns, missing) for uri in uris]
    if not sum(len(s.rows) for s in sources):
        raise InputError(f"source.obs_filter={config.obs_filter!r} selects no cell of {', '.join(uris[:3])}")
    return sources


def resolve(config: SourceConfig) -> tuple[Literal["h5ad", "soma", "census"], list[str]]:
    """The kind of the sources and their URIs, sorted, each source once. The Census on the net has the URI ''."""
    kind, uris = named(config)
    if kind == "auto":
        from data_pipeline.convert.source_soma import kind_of

        kind = kind_of(uris[0])
    assert kind != "auto"
    return kind, uris or [""]


def named(config: SourceConfig) -> tuple[Kind, list[str]]:
    """The URIs, and their kind by their names alone: auto is one of SOMA.

    Raises: InputError for a local file or folder that is not there, and for kinds that don't go together.
    """
    uris: list[str] = []
    for path in config.paths:
        if glob.has_magic(path) and not os.path.exists(path):  # `cells [v2].h5ad` is a name before it is a pattern
            found = glob.glob(path)
            if not found:
                raise InputError(f"source.paths: {path}: no file matches")
            uris += found
        else:
            uris.append(path.rstrip("/"))
    uris = list({_identity(uri): uri for uri in sorted(set(uris), reverse=True)}.values())[::-1]
    endings = {is_cells_file(u) for u in uris}
    kind = config.kind
    if kind == "auto" and not uris:
        if not config.census_version:
            raise InputError("source.paths must name h5ad or zarr files, or a SOMA URI. Or give source.census_version")
        kind = "census"
    if len(endings) == 2:
        raise InputError(
            "source.paths: AnnData files and SOMA URIs can't be mixed. `scldm soma write` writes files as SOMA"
        )
    if kind == "h5ad" or (kind == "auto" and endings == {True}):
        for uri in uris:
            if "://" in uri:
                raise InputError(f"source.paths: {uri}: AnnData files are read from a local disk. Copy it to one first")
            if not Path(uri).exists():
                raise InputError(f"source.paths: {uri}: no such file")
        if not uris:
            raise InputError("source.paths must name h5ad files")
        return "h5ad", uris
    if kind == "soma" and not uris:
        raise InputError("source.paths must name the URI of a SOMA experiment")
    if kind == "census" and not uris and not config.census_version:
        raise InputError("source.census_version must be given, such as 2025-01-30, or the Census's URI as source.paths")
    for uri in uris:
        if not ANYWHERE.match(uri) and not Path(uri).exists():
            raise InputError(f"source.paths: {uri}: no such file or folder")
        if os.path.isdir(uri) and not any(os.path.exists(os.path.join(uri, name)) for name in OF_TILEDB):
            raise InputError(f"source.paths: {uri}: {NO_STORE}. It is no SOMA experiment either")
    return kind, uris


def _identity(uri: str) -> object:
    """Equal for all names of a local file or folder: links, ./, file://."""
    try:
        stat = os.stat(uri.removeprefix("file://"))
    except OSError:
        return uri
    return stat.st_dev, stat.st_ino


def open_matrix(spec: SourceSpec, transposed: Path | None = None) -> Matrix:
    """The counts of a source. `transposed` holds a CSC matrix's rows. Raises: InputError where it can't be opened."""
    if spec.kind == "h5ad":
        from data_pipeline.convert.source_h5ad import H5adMatrix

        return H5adMatrix(spec, transposed)
    from data_pipeline.convert.source_soma import SomaMatrix

    return SomaMatrix(spec)


def csc_groups(spec: SourceSpec, chunk_bytes: int) -> list[tuple[int, int]]:
    """The groups of columns in which a CSC matrix must be transposed before its rows are read. Any other has none."""
    if spec.kind != "h5ad":
        return []
    from data_pipeline.convert.source_h5ad import groups_to_transpose

    return groups_to_transpose(spec, chunk_bytes)
