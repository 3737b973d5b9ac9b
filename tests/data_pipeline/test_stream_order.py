"""The same stream for every world size and micro-batch, and resumed at any step; another one is refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.stream.gene_set_config import GeneSetConfig
from scldm.errors import InputError
from tests.data_pipeline.small_sets import known_cells, write_set
from tests.data_pipeline.streams import by_cell, flat, open_loader


@pytest.mark.heavy
@pytest.mark.parametrize("world, micro", [(2, 4), (3, 1), (4, 3), (8, 4), (24, 1), (64, 3)])
@pytest.mark.parametrize("policy", ["random", "weighted"])
def test_every_world_size_gives_every_cell_the_same_position_and_gene_sets(folder, world, micro, policy):
    """With a set for each cell: a position must draw alike in a micro-batch of any size."""
    changes = {
        "given": GeneSetConfig(policy, 20),
        "asked": GeneSetConfig("expressed_plus_zeros", 150),
        "global_batch": 192,
        "prefetch": 0,
    }
    with open_loader(folder, micro=192, **changes) as whole:
        loaders = [open_loader(folder, rank=r, world=world, micro=micro, **changes) for r in range(world)]
        for _ in range(whole.steps_per_epoch + 1):
            got = [b for loader in loaders for b in next(loader)]
            assert {len(b) for b in got} == {micro}
            assert by_cell(got) == by_cell(next(whole))
        for loader in loaders:
            loader.close()


def test_ranks_beyond_the_lanes_are_told_once_what_they_cost(folder, capsys):
    for rank in (0, 1):
        open_loader(folder, rank=rank, world=24, micro=1, lanes=8).close()
    said = capsys.readouterr().err
    assert said.count("data.lanes=8 are shared by 24 ranks: a block is read and decompressed by 3 of them") == 1
    open_loader(folder, world=8, lanes=8).close()
    open_loader(folder, world=24, micro=1, lanes=8, split="validation").close()
    open_loader(folder, world=24, micro=1, lanes=8, window_blocks=20).close()  # a rank holds all of so small a set
    assert not capsys.readouterr().err


@pytest.mark.heavy
def test_a_shared_gene_set_is_its_groups_whatever_the_micro_batch(folder):
    given_set = GeneSetConfig("random", 20, gene_set_group=12)
    with open_loader(folder, micro=12, given=given_set) as whole:
        others = [open_loader(folder, micro=m, given=given_set, rank=r, world=2) for m in (1, 3, 4) for r in (0, 1)]
        for _ in range(whole.steps_per_epoch + 1):
            expected = by_cell(next(whole))
            got = [b for other in others for b in next(other)]
            assert by_cell(got) == expected * 3
        for other in others:
            other.close()


def test_the_sides_draw_apart_and_every_epoch_anew_but_a_pass_in_order_never(folder):
    def sets(batches, side):
        return [row for b in batches for row in getattr(b, side).gene_ids.tolist()]

    drawn = GeneSetConfig("random", 20)
    with open_loader(folder, given=drawn, asked=drawn) as loader:
        epochs = [[b for _ in range(loader.steps_per_epoch) for b in next(loader)] for _ in range(2)]
        assert not any(a == b for a, b in zip(sets(epochs[0], "given"), sets(epochs[0], "asked")))
        assert not any(a == b for a, b in zip(sets(epochs[0], "given"), sets(epochs[1], "given")))
        first = by_cell(b for batches in loader.one_pass() for b in batches)
        next(loader)
        assert by_cell(b for batches in loader.one_pass() for b in batches) == first


@pytest.mark.heavy
@settings(max_examples=15, deadline=None)
@given(
    stop=st.integers(0, 14),
    more=st.integers(1, 6),
    threads=st.integers(1, 3),
    prefetch=st.integers(0, 2),
    ahead=st.integers(0, 9),
    small=st.booleans(),
    world=st.sampled_from([1, 2, 3, 8]),
)
def test_a_resumed_stream_goes_on_bit_for_bit(folder, stop, more, threads, prefetch, ahead, small, world):
    lanes = 64 if small else 8  # shuffled by the cell, or by the window
    with open_loader(folder, lanes=lanes) as loader:
        for _ in range(stop):
            next(loader)
        state = loader.state()
        expected = [[flat(b) for b in next(loader)] for _ in range(more)]
    assert all(isinstance(v, int | str) for v in state.values())
    others = [
        open_loader(folder, rank=r, world=world, lanes=lanes, read_threads=threads, prefetch=prefetch, read_ahead=ahead)
        for r in range(world)
    ]
    for other in others:
        other.load_state(state)
    for step in expected:
        assert [flat(b) for other in others for b in next(other)] == step
    for other in others:
        other.close()


def test_another_stream_of_the_same_loader_does_not_disturb_its_place(folder):
    with open_loader(folder) as loader, open_loader(folder) as undisturbed:
        for k in range(4):
            assert [flat(b) for b in next(loader)] == [flat(b) for b in next(undisturbed)]
            if k == 1:
                assert sum(len(b) for batches in loader.one_pass() for b in batches) == 480
            if k == 2:
                next(loader.one_pass())  # left in the middle


@pytest.mark.parametrize(
    "name, changes",
    [
        ("seed", {"seed": 2}),
        ("lanes", {"lanes": 4}),
        ("given", {"given": GeneSetConfig("random", 51, 4)}),
        ("select", {"select": {"type": ["a"]}}),
        ("balance", {"balance": ["type"]}),
    ],
)
def test_a_state_of_another_stream_is_refused_by_name(folder, name, changes):
    with open_loader(folder) as loader:
        state = loader.state()
    with open_loader(folder, **changes) as other, pytest.raises(InputError, match=f"{name} is"):
        other.load_state(state)


def test_a_balanced_and_selected_stream_is_resumed_however_its_conditions_are_ordered(folder):
    donors = [f"d{k}" for k in range(250)]
    one = {"balance": ["type", "donor"], "select": {"type": ["a", "b"], "donor": donors}}
    other = {"balance": ["donor", "type"], "select": {"donor": donors[::-1], "type": ["b", "a"]}}
    with open_loader(folder, global_batch=24, **one) as loader:
        n = loader.steps_per_epoch
        for _ in range(n - 2):
            next(loader)
        state = loader.state()
        expected = [[flat(b) for b in next(loader)] for _ in range(n)]  # on into the next epoch
    with open_loader(folder, global_batch=24, **other) as loader:
        loader.load_state(state)
        assert [[flat(b) for b in next(loader)] for _ in range(n)] == expected


def test_a_state_of_another_data_set_is_refused(folder, tmp_path):
    with open_loader(folder) as loader:
        state = loader.state()
    other = str(write_set(tmp_path / "other", known_cells(seed=1)))
    with open_loader(other) as loader, pytest.raises(InputError, match="data is"):
        loader.load_state(state)


@pytest.mark.heavy
def test_another_global_batch_in_mid_epoch_brings_every_cell_once_all_the_same(folder, capsys):
    """Twice in one epoch, at any world size; from the next epoch on, what a run of that batch draws there."""
    rows, state, place = [], None, 0
    for batch, n_steps, world in ((96, 2, 1), (36, 3, 3), (56, None, 2)):
        loaders = [open_loader(folder, rank=r, world=world, micro=4, global_batch=batch) for r in range(world)]
        for loader in loaders if state else []:
            loader.load_state(state)
        order = loaders[0].order
        place, n_steps = loaders[0].step, order.regular_from - loaders[0].step if n_steps is None else n_steps
        for _ in range(n_steps):
            got = [one for loader in loaders for (one) in next(loader)]
            n_real = int(sum(one.weight_B.sum() for one in got))
            assert {one.n_cells for one in got} == {n_real}
            rows += [cell for one in got for cell, w in zip(one.cell_ids_B2.tolist(), one.weight_B) if w]
        state = json.loads(json.dumps(loaders[0].state()))
        if batch == 56:
            expected = order.population.n_cells
            assert len(rows) == len({tuple(row) for row in rows}) == expected
            fresh = open_loader(folder, micro=4, global_batch=56)
            fresh.seek(fresh.steps_per_epoch)
            resumed = open_loader(folder, micro=4, global_batch=56)
            resumed.load_state(state)  # from past the epoch in which it was changed
            for _ in range(3):
                there = [flat(one) for one in next(fresh)]
                assert [flat(one) for one in next(resumed)] == there
                assert [flat(one) for loader in loaders for one in next(loader)] == there
            for loader in (fresh, resumed):
                loader.close()
        for loader in loaders:
            loader.close()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert f"was 36 until step {place} and is 56: the {expected - 192 - 108} cells left of epoch 0 come once" in told[1]


def test_another_global_batch_between_two_epochs_begins_the_next(folder):
    with open_loader(folder, global_batch=96) as loader:
        for _ in range(loader.steps_per_epoch):
            next(loader)
        state = loader.state()
    with open_loader(folder, global_batch=48) as changed, open_loader(folder, global_batch=48) as fresh:
        changed.load_state(state)
        fresh.seek(fresh.steps_per_epoch)
        for _ in range(3):
            assert [flat(b) for b in next(changed)] == [flat(b) for b in next(fresh)]


@pytest.mark.parametrize("name", ["step", "seed", "balance", "given"])
def test_a_state_of_other_keys_is_refused_by_their_names(folder, name):
    with open_loader(folder) as loader:
        state = loader.state()
        value = state.pop(name)
        with pytest.raises(InputError, match=f"resumed: the checkpoint's state lacks {name}"):
            loader.load_state(state)
        with pytest.raises(InputError, match="resumed: the checkpoint's state has colour, which is unknown"):
            loader.load_state({**state, name: value, "colour": 1})


@pytest.mark.parametrize(
    "key, value", [("step", -1), ("step", 2.5), ("step", "3"), ("step", None), ("global_batch", 0), ("regrouped", {})]
)
def test_a_state_without_a_place_in_the_stream_is_refused(folder, key, value):
    said = (
        "resumed: regrouped: key .epoch. is missing"
        if value == {}
        else f"the checkpoint's {key}={value!r} is no number"
    )
    with open_loader(folder) as loader, pytest.raises(InputError, match=said):
        loader.load_state({**loader.state(), key: value})


def test_a_rank_has_room_for_the_blocks_of_all_lanes_while_an_epoch_of_another_batch_ends(folder):
    size = {"world": 8, "micro": 4, "window_blocks": 1, "read_ahead": 0}
    with open_loader(folder, global_batch=96) as loader:
        next(loader)
        state = loader.state() | {"window_blocks": 1}
    with open_loader(folder, global_batch=32, **size) as loader:
        usual = loader.feed.n_slots
        loader.load_state(state)
        assert loader.feed.n_slots > usual
        begun, until = loader.step, loader.order.regular_from
        for _ in range(until - begun):
            next(loader)
        state = loader.state()
    with open_loader(folder, global_batch=32, **size) as loader:
        loader.load_state(state)
        assert loader.feed.n_slots == usual
