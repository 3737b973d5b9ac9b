"""The loader's benchmark at a small size: every part runs, and what must hold at any size holds."""

import json

import pytest

from benchmarks.loader import main
from benchmarks.loader_behaviour import scale_task, write_index
from benchmarks.loader_cells import BenchLoaderConfig
from scldm.errors import InputError


@pytest.mark.exhaustive
def test_the_benchmark_runs_and_saves_its_rows(tmp_path):
    config = BenchLoaderConfig(
        folder=str(tmp_path / "data"), cells=6_000, genes=3_000, expressed=200, n_genes=300, rounds=1,
        controls=("mmap",), scale_cells=300_000, save=str(tmp_path / "rows.json"),
    )  # fmt: skip
    main(config)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    for name in (
        "zstd-1 / mmap",
        "growth from epoch 2 to 20",
        "first batch after a resume",
        "one core feeds, compact",
    ):
        assert name in rows
    for what in ("sampled ranks of 1 to 1,024 plan the same global batches", "every cell once over 64 ranks"):
        assert rows[f"300,000 cells: {what}"]["met"]
    for name in ("entropy of data set / random", "entropy of cell type / random"):
        assert rows[name]["value"] > 0.98
    for name in ("resident over import, most of 20 epochs", "growth from epoch 2 to 20"):
        assert rows[name]["met"], rows[name]
    with pytest.raises(InputError, match="holds other cells"):
        main(BenchLoaderConfig(folder=str(tmp_path / "data"), cells=1_000, parts=("speed",), controls=()))


@pytest.mark.exhaustive
def test_one_hundred_million_cells_over_a_thousand_ranks(tmp_path):
    config = BenchLoaderConfig(folder=str(tmp_path), scale_cells=100_000_000)
    write_index(tmp_path / "index-100000000", config.scale_cells)
    found = scale_task(config)
    assert found["same"]
    assert found["once"]
    assert max(max(seconds) for seconds in found["start"].values()) < 5
    assert max(found["resident"].values()) < 300


def test_unknown_parts_are_refused():
    with pytest.raises(InputError, match="parts='speeed' is unknown"):
        BenchLoaderConfig(folder="x", parts=("speeed",))
