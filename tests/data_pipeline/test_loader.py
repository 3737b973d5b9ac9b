"""The stream against cells whose every count is known: exact, whatever the gene sets, the selection and the balance.
Over sets of many small blocks, so that windows, lanes and their borders all occur."""

from contextlib import closing
from dataclasses import is_dataclass, replace

import numpy as np
import pytest
import torch

from data_pipeline.format.read_shards import ShardSet
from data_pipeline.stream.gene_set_config import GeneSetConfig
from data_pipeline.stream.loader import CellLoader, LoaderConfig, shard_batches
from launch.config import compose
from launch.train_vae import TrainVAEConfig
from scldm.batch import CellBatch, CompactCellBatch
from scldm.errors import InputError
from scldm.vocab import ConditionVocab
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.data_pipeline.streams import RANDOM, SAME, check, flat, open_loader


@pytest.fixture(scope="module")
def sets(tmp_path_factory, cells):
    """Two blocks of 256 and 164 training cells, one folder a codec."""
    root = tmp_path_factory.mktemp("codecs")
    return {codec: str(write_set(root / codec, cells, codec)) for codec in ("none", "lz4", "zstd")}


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("codec, form", [("none", "dense"), ("lz4", "dense"), ("zstd", "compact")])
@pytest.mark.parametrize(
    "given_set, asked_set",
    [
        (GeneSetConfig("all"), SAME),
        (GeneSetConfig("random", 64), SAME),
        (RANDOM, GeneSetConfig("random", 128, gene_set_group=48)),
        (GeneSetConfig("expressed"), GeneSetConfig("all")),
        (GeneSetConfig("expressed_plus_zeros", 300), GeneSetConfig("weighted", 100)),
        (GeneSetConfig("expressed", 30, overflow="sample"), SAME),
    ],
    ids=lambda c: c.policy,
)
def test_batches_hold_the_known_counts_of_every_cell_once(sets, cells, codec, form, given_set, asked_set):
    folder = sets[codec]
    with open_loader(folder, given=given_set, asked=asked_set, form=form) as loader:
        seen = []
        for _ in range(loader.steps_per_epoch):
            for batch in next(loader):
                dense = batch.to("cpu")
                rows = check(cells, dense)
                seen += rows[dense.weight_B.numpy() > 0].tolist()
                assert dense.n_cells in (96, 420 % 96)
        assert sorted(seen) == list(range(420))
        in_order = [r for batches in loader.one_pass() for b in batches for r in check(cells, b.to("cpu"))]
        assert in_order[:420] == list(range(420))


def test_a_pass_may_stop_after_some_whole_batches(folder):
    for most, seen in ((1, 96), (96, 96), (97, 192), (1_000, 420)):
        sizes = {"global_batch": 96, "micro_batch": 48, "world_size": 2}
        ranks = [CellLoader(LoaderConfig(folder), rank=k, most_cells=most, **sizes) for k in range(2)]
        for _ in range(2):  # and again from the start
            parts = [b.to("cpu") for loader in ranks for batches in loader.one_pass() for b in batches]
            ids = [tuple(cell) for b in parts for cell in b.cell_ids_B2[b.weight_B > 0].tolist()]
            assert len(set(ids)) == len(ids) == seen
        for loader in ranks:
            loader.close()


def tensors_of(value):
    """Every tensor of a batch, by identity."""
    if isinstance(value, torch.Tensor):
        return {id(value): value}
    parts = value.values() if isinstance(value, dict) else vars(value).values() if is_dataclass(value) else ()
    return {key: tensor for part in parts for key, tensor in tensors_of(part).items()}


@pytest.mark.parametrize("form, kind", [("auto", CompactCellBatch), ("dense", CellBatch)])
def test_a_batch_for_a_gpu_is_compact_and_every_tensor_of_it_pinned(folder, monkeypatch, form, kind):
    made = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: made.append(tensor.clone()) or made[-1])
    config = LoaderConfig(folder, lanes=8, given=GeneSetConfig("random", 50), form=form, prefetch=0)
    sizes = {"global_batch": 96, "micro_batch": 32}
    with CellLoader(config, device="cuda:0", **sizes) as loader, CellLoader(config, **sizes) as here:
        first, second, third = next(loader)
        for batch, expected in zip((first, second, third), next(here)):
            assert type(batch) is kind
            assert type(expected) is CellBatch  # for a CPU
            assert flat(batch.to("cpu")) == flat(expected)
    found = [tensor for batch in (first, second, third) for tensor in tensors_of(batch).values()]
    assert {id(t) for t in found} == {id(t) for t in made}
    assert len(made) == len(found)
    if isinstance(first, CompactCellBatch):
        assert first.given_ids is first.asked_ids
        assert {first.given_ids.dtype, first.csr.gene_ids_X.dtype} == {torch.int16}  # two bytes a gene
    made.clear()
    with closing(ShardSet(folder)) as shards:
        batches = list(shard_batches(shards, 0, micro_batch=96, device="cuda"))
    assert all(type(batch) is CompactCellBatch for batch in batches)
    assert len(made) == sum(len(tensors_of(batch)) for batch in batches)


def test_encoding_meets_the_cells_of_a_shard_in_set_order(folder, cells):
    shards = ShardSet(folder)
    rows = [
        r
        for shard in range(len(shards.manifest.shards))
        for batch in shard_batches(shards, shard, micro_batch=5, given=GeneSetConfig("expressed"))
        for r in check(cells, batch)
    ]
    assert rows == list(range(490))
    shards.close()


def test_drawn_zeros_of_a_cell_to_encode_are_its_own_whatever_the_batch(folder):
    """So that an interrupted set goes on as it began."""
    shards, given = ShardSet(folder), GeneSetConfig("expressed_plus_zeros", 300)

    def zeros(micro_batch: int) -> list[list[int]]:
        batches = [b.given for k in (0, 1) for b in shard_batches(shards, k, micro_batch=micro_batch, given=given)]
        return [
            ids[mask & (counts == 0)].tolist()
            for of in batches
            for ids, mask, counts in zip(of.gene_ids, of.mask, of.counts_BS)
        ]

    found = zeros(8)
    assert all(200 < len(cell) < 300 for cell in found)
    assert [sorted(c) for c in zeros(3)] == [sorted(c) for c in found]
    shards.close()


# --- choice of cells -----------------------------------------------------------------------------------------------


def test_select_meets_exactly_the_chosen_cells_and_reads_no_other_block(folder, cells, monkeypatch):
    fetched, fetch = set(), ShardSet.fetch
    monkeypatch.setattr(ShardSet, "fetch", lambda self, b, into=None: (fetched.add(b), fetch(self, b, into))[1])
    chosen = {"type": ["b", "c"], "donor": [f"d{k}" for k in range(0, 300, 2)]}
    with open_loader(folder, select=chosen) as loader:
        seen = [
            r
            for _ in range(loader.steps_per_epoch)
            for b in next(loader)
            for r, w in zip(check(cells, b), b.weight_B.tolist())
            if w
        ]
    train = np.arange(420)
    keep = np.isin(cells.labels["type"][train], [1, 2]) & (cells.labels["donor"][train] % 2 == 0)
    assert sorted(seen) == train[keep].tolist()
    assert fetched == set((train[keep] // 8).tolist())
    assert len(fetched) < 53


def test_labels_and_conditions_of_the_command_line_choose_their_cells(tmp_path):
    """Doses, which look like numbers, and one of them like a truth."""
    doses = ConditionVocab({**known_cells().conditions.labels, "type": ("0.10", "1e-3", "true")})
    folder = write_set(tmp_path / "set", replace(known_cells(), conditions=doses), block_cells=8)
    words = [f"data.shards={folder}", "run_dir=run", "data.select.type=[0.10,true]", "data.balance=type"]
    config = compose(TrainVAEConfig, [*words, "data.balance_max_repeats=50"])
    assert config.data.select == {"type": ["0.10", "true"]}
    with CellLoader(config.data, global_batch=60, micro_batch=60) as loader:
        batches = [b for _ in range(loader.steps_per_epoch) for b in next(loader)]
    found = np.bincount(np.concatenate([b.conditions["type"].numpy()[b.weight_B.numpy() > 0] for b in batches]))
    assert found[1] == 0
    assert found[0] == found[2] > 100


def test_balance_draws_conditions_equally_often(folder, cells):
    with open_loader(folder, balance=["type"], balance_max_repeats=50) as loader:
        batches = [b for _ in range(loader.steps_per_epoch) for b in next(loader)]
        types = np.concatenate([b.conditions["type"].numpy()[b.weight_B.numpy() > 0] for b in batches])
        for batch in batches:
            check(cells, batch)
    assert np.bincount(types).tolist() == [140, 140, 140]


def test_a_share_is_of_the_vocabularys_genes(folder):
    for share, n in ((0.5, 350), (0.0011, 1), (1.0, 700)):
        sets = GeneSetConfig("random", share=share, gene_set_group=4)
        same = GeneSetConfig("random", n, gene_set_group=4)
        with open_loader(folder, given=sets) as loader, open_loader(folder, given=same) as other:
            for batch, expected in zip(next(loader), next(other), strict=True):
                assert batch.given.gene_ids.shape == (n,)
                assert torch.equal(batch.given.gene_ids, expected.given.gene_ids)
    assert GeneSetConfig("random", 5, share=0.5).of(700).n_genes == 5


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"select": {"type": ["z"]}}, "no label 'z'"),
        ({"select": {"tissue": ["a"]}}, "condition 'tissue' is unknown"),
        ({"balance": ["tissue"]}, "condition 'tissue' is unknown"),
        ({"given": GeneSetConfig("random", 701)}, "given.n_genes=701 must lie in 1 ... 700"),
        ({"given": GeneSetConfig("random")}, "given.n_genes=0 must lie in 1 ... 700.*. given.share takes a part"),
        ({"given": GeneSetConfig("random", 5, gene_set_group=6)}, "Nearest: 4 or 8"),
        ({"given": GeneSetConfig("expressed", 20)}, "overflow=sample"),
        ({"given": SAME}, "given.policy=same"),
        ({"lanes": 0}, "lanes=0"),
        ({"balance": ["type"], "balance_max_repeats": 0}, "balance_max_repeats=0 must be from 1 to 65535"),
        ({"balance": ["type"], "balance_max_repeats": 65_536}, "balance_max_repeats=65536 must be from 1 to 65535"),
        ({"split": "test"}, "split 'test' is not in the shard set. It has train, validation"),
    ],
)
def test_what_the_set_cannot_serve_is_refused(folder, changes, text):
    with pytest.raises(InputError, match=text):
        open_loader(folder, **changes)
