"""shards verify names shard and block of every kind of damage; shards info and the page of it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

from data_pipeline.convert.verify import verify_shards
from data_pipeline.convert.write_shards import write_shards
from data_pipeline.format.describe import describe_text
from data_pipeline.format.page import describe_html
from data_pipeline.format.read_shards import ShardSet
from data_pipeline.format.schema import read_manifest
from data_pipeline.format.statistics import compute_statistics
from launch.cli import main
from scldm.errors import InputError
from scldm.vocab import ConditionVocab
from tests.data_pipeline.atlases import atlas, config, counts


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    atlas(500, 300).write_h5ad(folder / "atlas.h5ad")
    write_shards(config(folder / "set", folder / "atlas.h5ad", conditions=("cell_type", "donor")))
    return folder / "set"


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def faults(path: Path) -> list[str]:
    return [str(f) for f in verify_shards(str(path)).faults]


def test_a_sound_set_is_sound(sound, capsys):
    assert main(["shards", "verify", f"path={sound}"]) == 0
    assert "sound: 500 cells in 17 blocks, 256 cells compared" in capsys.readouterr().out


@pytest.mark.heavy
def test_every_flipped_bit_is_found_and_its_block_named(copy):
    """One bit anywhere in a tar: block data, a member's header, padding, the end."""
    blocks = np.load(copy / "index/blocks.npy")
    tar = copy / "shards/train-000001.tar"
    whole = tar.read_bytes()
    mine = blocks[blocks["shard"] == 1]
    first = int(np.flatnonzero(blocks["shard"] == 1)[0])
    rng = np.random.default_rng(0)
    for at in [0, 100, len(whole) - 1, *rng.integers(0, len(whole), 25)]:
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        tar.write_bytes(broken)
        (fault,) = faults(copy)
        inside = np.flatnonzero((mine["offset"] <= at) & (at < mine["offset"] + mine["length"]))
        if len(inside):
            assert fault.startswith(f"shards/train-000001.tar: block {first + inside[0]}: its checksum")
        else:
            assert fault.startswith("shards/train-000001.tar: ")


def test_what_is_missing_or_cut_is_named(copy):
    tar = copy / "shards/train-000000.tar"
    tar.write_bytes(tar.read_bytes()[: int(np.load(copy / "index/blocks.npy")["offset"][2]) + 10])
    (copy / "shards/test-000000.tar").unlink()
    found = faults(copy)
    assert re.match(r"shards/train-000000.tar: block 2: truncated: the tar ends after \d+ of \d+ bytes", found[0])
    assert found[1:] == ["shards/test-000000.tar: missing"]
    (copy / "index/cells.row.npy").unlink()
    data = bytearray((copy / "index/blocks.npy").read_bytes())
    data[-1] ^= 1
    (copy / "index/blocks.npy").write_bytes(data)
    found = faults(copy)
    assert "index/blocks.npy: its SHA-256 is not the manifest's: changed or damaged" in found
    assert "index/cells.row.npy: missing" in found
    assert "shards/test-000000.tar: missing" in found


def sealed_again(folder: Path, change) -> None:
    """Change the manifest and make its hash agree, as a program with a bug would, or one that means ill."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(folder: Path, name: str, change) -> None:
    """Change an index file and make the manifest agree, as a program with a bug would."""
    array = np.load(folder / f"index/{name}.npy")
    change(array)
    buffer = io.BytesIO()
    np.save(buffer, array)
    replace_index(folder, name, buffer.getvalue())


def replace_index(folder: Path, name: str, data: bytes) -> None:
    (folder / f"index/{name}.npy").write_bytes(data)

    def note(manifest):
        entry = next(e for e in manifest["index"] if e["path"] == f"index/{name}.npy")
        entry["sha256"], entry["bytes"] = hashlib.sha256(data).hexdigest(), len(data)

    sealed_again(folder, note)


def test_an_index_file_of_others_runs_nothing_and_takes_no_memory(copy):
    """Of objects, of a shape that no file has, an archive: all with the right hashes."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    whole = (copy / "index/cells.row.npy").read_bytes()
    archive = io.BytesIO()
    np.savez(archive, a=np.arange(3))
    for data in (buffer.getvalue(), whole.replace(b"(500,)", b"(1<<9)"), archive.getvalue(), b"", whole[:20]):
        replace_index(copy, "cells.row", data)
        assert any(f.startswith("index/cells.row.npy: not a .npy file") for f in faults(copy))
        with closing(ShardSet(str(copy))) as shards, pytest.raises(InputError, match="cells.row.npy: not a .npy file"):
            shards.cell_column("row")
    replace_index(copy, "cells.row", whole.replace(b"(500,), }    ", b"(500000000,)}"))
    assert any("index/cells.row.npy: " in f for f in faults(copy))


def test_an_index_that_lies_is_found(copy):
    def double(rows):
        rows[1], rows[3] = rows[2], rows[0]

    rewrite(copy, "cells.row", double)
    found = faults(copy)
    assert "shards/train-000000.tar: block 0: its row is not the index's" in found
    assert any(re.match(r"index: 2 cells stand more than once in the set, the first is \(0, \d+\)", f) for f in found)
    assert any("not in the order of its seed" in f for f in found)

    def more(totals):
        totals[40] += 1

    rewrite(copy, "cells.total_counts", more)
    assert "shards/train-000000.tar: block 1: its total_counts is not the index's" in faults(copy)


def test_statistics_that_lie_are_found(copy):
    def lie(manifest):
        statistics = manifest["statistics"]
        statistics["library_sizes"][0]["log_mean"][0] += 0.01
        statistics["largest_count"] = 69_999
        statistics["combinations"]["n"][0][0] += 1
        statistics["combinations"]["n"][1][0] -= 1

    sealed_again(copy, lie)
    assert [f.split(" is not")[0].split(" by ")[0] for f in faults(copy)] == [
        "manifest.json: statistics.combinations",
        "manifest.json: statistics.largest_count",
        "manifest.json: statistics.library_sizes",
    ]


def test_splits_that_are_other_cells_are_refused(copy):
    """Readers take a split's cells by its bounds: with others, validation would read training cells."""

    def shift(key):
        def change(manifest):
            manifest["splits"][1][key] -= 1

        return change

    for key in ("first_cell", "first_block", "n_cells", "n_blocks"):
        before = (copy / "manifest.json").read_text()
        sealed_again(copy, shift(key))
        with pytest.raises(InputError, match=r"manifest.json: split \w+: "):
            verify_shards(str(copy))
        with pytest.raises(InputError, match=r"manifest.json: split \w+: "):
            ShardSet(str(copy))
        (copy / "manifest.json").write_text(before)


@pytest.mark.heavy
def test_swapped_labels_are_found(copy):
    """By the manifest's hash; with a hash that fits them, by the sources."""

    def swap(manifest):
        labels = manifest["conditions"]["cell_type"]
        labels[0], labels[1] = labels[1], labels[0]

    manifest = json.loads((copy / "manifest.json").read_text())
    swap(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json: its SHA-256 is not that of what it says"):
        verify_shards(str(copy))
    sealed_again(copy, lambda manifest: None)
    assert all("the labels of cell" in fault for fault in faults(copy))
    assert faults(copy)


def test_a_manifest_without_a_hash_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json: it has no sha256 of its own, as what .* Make it again"):
        verify_shards(str(copy))


def test_a_source_that_says_otherwise_is_found(tmp_path):
    """Another count, another label; and a source that is gone is said, not failed on."""
    path = tmp_path / "a.h5ad"
    adata = atlas(80, 60)
    adata.write_h5ad(path)
    write_shards(config(tmp_path / "set", path))
    changed = adata.copy()
    x = counts(80, 60)
    x.data[x.indptr[7]] += 1
    changed.X = x
    labels = list(adata.obs["cell_type"])
    labels[9] = "NK" if labels[9] == "B" else "B"
    changed.obs["cell_type"] = labels
    changed.write_h5ad(path)
    found = faults(tmp_path / "set")
    assert sorted(f.split(": ")[1] for f in found) == [
        "the counts of cell cell7 (row 7) are not the set's",
        "the labels of cell cell9 (row 9) are not the set's",
    ]
    path.unlink()
    verdict = verify_shards(str(tmp_path / "set"))
    assert verdict.faults == ()
    assert "no such file" in verdict.notes[0]


def test_files_of_nobody_are_listed(copy):
    shutil.copy(copy / "shards/train-000000.tar", copy / "shards/train-000009.tar")
    (copy / "index/cells.age.npy").touch()
    verdict = verify_shards(str(copy))
    assert [str(f) for f in verdict.faults] == [
        "shards/train-000009.tar: is not in the manifest: another set's, or one that was added"
    ]
    assert verdict.notes == ("index/cells.age.npy: is not in the manifest",)


def test_a_gene_table_that_is_gone_is_said(tmp_path):
    """Its source has symbols; the set is as sound without the table that translated them."""
    adata = atlas(80, 60)
    adata.write_h5ad(tmp_path / "a.h5ad")
    table = tmp_path / "table.csv"
    lines = [f"ENSG{k:011d},{symbol}" for k, symbol in enumerate(adata.var_names)]
    table.write_text("\n".join(["ensembl,symbol", *lines]))
    source = {"gene_table": str(table), "namespace": "ensembl"}
    translated = adata.copy()
    translated.var_names = [line.split(",")[0] for line in lines]
    translated.write_h5ad(tmp_path / "b.h5ad")
    write_shards(config(tmp_path / "set", tmp_path / "b.h5ad", tmp_path / "a.h5ad", source=source))
    assert verify_shards(str(tmp_path / "set")).n_compared == 160
    table.unlink()
    verdict = verify_shards(str(tmp_path / "set"))
    assert verdict.faults == ()
    assert "source.gene_table" in verdict.notes[0]


def test_combinations_beyond_one_number():
    """Five conditions of 20,000 labels have 3e21 combinations: more than an int64 names."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20_000, (300, 5), dtype=np.uint16)
    ids[:, 0] %= 2
    ids[0], ids[1] = 19_999, ids[2]
    conditions = {f"c{k}": ids[:, k] for k in range(5)}
    ones = np.ones(300, np.uint64)
    found = compute_statistics(np.zeros(300, np.uint8), 1, conditions, ones, ones, 1).combinations
    rows, n = np.unique(ids, axis=0, return_counts=True)
    assert found.ids == tuple(map(tuple, rows.tolist()))
    assert [k for (k,) in found.n] == n.tolist()


def test_what_is_no_set(tmp_path, capsys):
    with pytest.raises(InputError, match="not a shard set, or one that is not finished"):
        verify_shards(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "scldm-shards", "version": 4}')
    assert main(["shards", "verify", f"path={tmp_path}"]) == 2
    assert "version 4 is unknown. This scldm reads version 3" in capsys.readouterr().err
    for url, data, message in (
        (tmp_path, b"{", "not JSON"),
        (tmp_path, b'{"\xff": 1}', "not JSON"),
        (tmp_path / "manifest.json", b"", "not a shard set"),
        ("bogus://set", b"", "Protocol not known: bogus"),
    ):
        (tmp_path / "manifest.json").write_bytes(data)
        assert main(["shards", "info", f"path={url}"]) == 2
        assert message in capsys.readouterr().err


def test_info(sound, tmp_path, capsys):
    """The numbers of the text are the set's; the page is whole and needs nothing from elsewhere."""
    assert main(["shards", "info", f"path={sound}", f"html={tmp_path / 'info.html'}"]) == 0
    text = capsys.readouterr().out
    assert "500 cells x 300 genes" in text
    adata = anndata.read_h5ad(sound.parent / "atlas.h5ad")
    n = (adata.obs["cell_type"] == "NK").sum()
    line = next(line for line in text.splitlines() if line.split()[:1] == ["NK"])
    assert sum(map(int, line.split()[1:])) == n
    assert main(["shards", "info", f"path={sound}", f"html={tmp_path / 'nowhere/info.html'}"]) == 2
    page = (tmp_path / "info.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 5
    assert not re.search(r"(src|href)=", page)
    manifest = read_manifest(str(sound))
    assert describe_text(str(sound), manifest) in text
    assert describe_html(str(sound), manifest) == page
    column = sound / "index" / "genes.mean.npy"
    whole = column.read_bytes()
    column.write_bytes(b"damaged")
    assert main(["shards", "info", f"path={sound}", f"html={tmp_path / 'other.html'}"]) == 2
    assert "index/genes.mean.npy is damaged" in capsys.readouterr().err
    column.write_bytes(whole)


def test_hostile_names_are_text_on_the_page(sound):
    """Of labels, of conditions and of the set itself."""
    hostile = "</text><script>alert(1)</script> $x$ & \"'"
    manifest = read_manifest(str(sound))
    name, *others = manifest.conditions.names
    labels = {of: manifest.conditions.labels[of] for of in others}
    first, *rest = manifest.conditions.labels[name]
    combinations = manifest.statistics.combinations
    by = tuple(hostile if of == name else of for of in combinations.by)
    strange = replace(
        manifest,
        conditions=ConditionVocab({hostile: (f"<i>{first}", *rest), **labels}),
        statistics=replace(manifest.statistics, combinations=replace(combinations, by=by)),
    )
    page = describe_html(str(sound), strange)
    assert "<script" not in page
    assert "<i>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; $x$ &amp; &#34;&#39;") == 2  # in the text and in a figure
    assert f"&lt;i&gt;{first}" in page
