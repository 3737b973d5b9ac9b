"""Cells that a loaded model generates: their numbers, whatever is asked for with them; how wrong tables are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scldm import draws, networks, pretrained
from scldm.errors import InputError
from scldm.flow.generate import generate_latents
from scldm.flow.sampler import SamplerConfig
from scldm.library_size import LibrarySizeModel, LogNormal
from scldm.model.dit import DiT, DiTConfig
from scldm.model.predicted import Predicted
from scldm.pretrained import Pretrained, written
from scldm.request.wanted import distinct
from tests.scldm.small_model import FEW, GENES, G, L, Z, of_doses, wanted


def test_generated_cells_are_integer_csr_with_categorical_obs_and_the_sources_ids(model: Pretrained) -> None:
    made: Any = model.generate(wanted(), seed=0, sampler=FEW)
    assert sp.issparse(made.X)
    assert made.X.format == "csr"
    assert np.issubdtype(made.X.dtype, np.integer)
    assert made.X.min() >= 0
    assert list(made.var_names) == list(GENES.ids)
    assert list(made.obs["type"]) == ["T cell", "B cell"] * 5
    assert list(made.obs["type"].cat.categories) == ["T cell", "B cell", "NK"]
    assert set(made.obs["donor"]) == {"not given"}
    # library sizes are those fitted: e^5 and e^7
    sizes = made.X.sum(1).A1 if hasattr(made.X.sum(1), "A1") else np.asarray(made.X.sum(1)).ravel()
    assert 90 < sizes[::2].mean() < 250
    assert 700 < sizes[1::2].mean() < 1_700


def test_the_same_seed_makes_the_same_cells_whatever_the_batch(model: Pretrained) -> None:
    first: Any = model.generate(wanted(), seed=3, sampler=FEW)
    again: Any = replace(model, batch=3).generate(wanted(), seed=3, sampler=FEW)
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    # and whatever cells come after it, or which genes are written
    few: Any = model.generate(wanted(4), seed=3, sampler=FEW, genes=[GENES.ids[7], GENES.ids[2]])
    assert (few.X != first.X[:4][:, [7, 2]]).nnz == 0
    assert list(few.var_names) == [GENES.ids[7], GENES.ids[2]]
    assert few.uns["scldm"]["n_evaluations"] == 4 * 3
    other: Any = model.generate(wanted(), seed=4, sampler=FEW)
    assert (first.X != other.X).nnz > 20
    assert not np.allclose(first.obs["library_size"], other.obs["library_size"])


@pytest.mark.parametrize("kind", ["counts", "means"])
def test_rows_are_the_same_bit_for_bit_whatever_is_asked_for_with_them(
    model: Pretrained, kind: pretrained.Kind
) -> None:
    """A batch of 64 rows and one of 6 sum floats in another order: 64 x 6 is filled up."""
    n, columns = 2 * networks.BATCH_CELLS + 6, np.arange(G)[::-1]
    ticks: list[int] = []
    asked = model.check_conditions(wanted(n), seed=5)
    whole, n_evaluations_n = model.make(asked, range(n), columns, FEW, kind, ticks.append)
    assert n_evaluations_n.tolist() == [3] * n
    assert (whole.shape, sum(ticks), whole.dtype) == ((n, G), n, np.int32 if kind == "counts" else np.float32)
    parts = [(0, 64), (64, 134), (3, 70), (133, 134)]
    more = model.check_conditions(wanted(n + 40), seed=5)
    for low, high in parts:
        for of in (asked, more):
            part, _ = model.make(of, range(low, high), columns, FEW, kind, ticks.append)
            assert (part != whole[low:high]).nnz == 0
            np.testing.assert_array_equal(of.library_size(range(low, high)), asked.library_size(range(n))[low:high])


@pytest.mark.parametrize("kind", ["counts", "means"])
def test_ten_genes_asked_are_a_slice_of_all(model: Pretrained, kind: pretrained.Kind) -> None:
    """Bit for bit: shares are of all genes' total, and a gene's count is drawn by its own number."""
    n, columns = 2 * networks.BATCH_CELLS + 6, np.random.default_rng(0).permutation(G)[:10]
    asked = model.check_conditions(wanted(n), seed=7)
    whole, some = (model.make(asked, range(n), of, FEW, kind, lambda _: None).matrix for of in (np.arange(G), columns))
    assert some.nnz > n
    assert (some != whole[:, columns]).nnz == 0


@pytest.mark.parametrize("sampler", [FEW, SamplerConfig("heun", 4, guidance_scale=2.0), SamplerConfig("sde_heun", 4)])
def test_bfloat16_makes_nearly_the_same_cells_and_says_so(model: Pretrained, sampler: SamplerConfig) -> None:
    coarse = replace(model, precision="bfloat16", batch=5)
    fine, made = (of.generate(wanted(), seed=0, sampler=sampler, kind="means") for of in (model, coarse))
    assert made.X.dtype == np.float32
    assert 1e-4 < np.abs(made.X.toarray() / fine.X.toarray() - 1).max() < 0.1
    assert (made.uns["scldm"]["precision"], made.uns["scldm"]["batch"]) == ("bfloat16", 5)
    counts: Any = coarse.generate(wanted(), seed=0, sampler=sampler)
    assert counts.X.dtype == np.int32


@pytest.mark.heavy
def test_the_adaptive_solver_goes_on_in_bfloat16(model: Pretrained) -> None:
    pytest.importorskip("torchdiffeq", reason="needs the extra `ode`")
    sampler, both = SamplerConfig("adaptive", tolerance=1e-3), wanted(4).assign(donor="d1")
    fine, made = (
        of.generate(both, seed=0, sampler=sampler, kind="means").X.toarray()
        for of in (model, replace(model, precision="bfloat16"))
    )
    assert 1e-4 < np.abs(made / fine - 1).max() < 0.5


def test_means_are_what_counts_are_drawn_from(model: Pretrained) -> None:
    table = pd.DataFrame({"type": ["T cell"] * 400, "library_size": 300.0})
    counts: Any = model.generate(table, seed=0, sampler=FEW)
    means: Any = model.generate(table, seed=0, sampler=FEW, kind="means", genes=GENES.ids[5:0:-1])
    assert means.X.dtype == np.float32
    assert list(means.var_names) == list(GENES.ids[5:0:-1])
    expected = means.X.toarray()
    assert expected.min() > 0
    drawn = counts[:, means.var_names].X.toarray()
    # the sum of 400 draws of NB(mu, theta) is off by its standard deviation, of which 4.5 are never seen
    theta = model.vae.log_theta.weight.exp().numpy()[[model.genes.index_of[g] for g in means.var_names], 0]
    spread = np.sqrt((expected + expected**2 / theta).sum(0))
    assert (np.abs(drawn.sum(0) - expected.sum(0)) < 4.5 * spread).all()


def test_a_table_is_held_as_its_distinct_rows(model: Pretrained) -> None:
    table = pd.DataFrame({"donor": ["d1", "d2", "d1", "d1"], "type": pd.Categorical(["NK", "NK", "B cell", "NK"])})
    code_n, labels = distinct(table, {})
    assert [tuple(labels.iloc[k]) for k in code_n] == list(zip(table["donor"], table["type"]))
    assert len(labels) == 3
    code_n, labels = distinct(pd.DataFrame(index=range(3)), {})
    assert (list(code_n), labels.shape) == ([0, 0, 0], (1, 0))


def test_names_are_those_of_the_call(model: Pretrained) -> None:
    """Cells of several calls are joined without two of one name, and the same call gives the same names."""
    of: dict[str, Any] = {"n": 3, "sampler": FEW}
    once = list(model.generate({"type": "T cell"}, **of).obs_names)
    assert list(model.generate({"type": "T cell"}, kind="means", genes=GENES.ids[:2], **of).obs_names) == once
    assert once[2].endswith("-2")
    others = [
        *model.generate({"type": "B cell"}, **of).obs_names,
        *model.generate({"type": "T cell"}, seed=1, **of).obs_names,
        *model.generate({"type": "T cell"}, n=3, sampler=replace(FEW, n_steps=2)).obs_names,
        *replace(model, hash="another").generate({"type": "T cell"}, **of).obs_names,
    ]
    assert len({*once, *others}) == 15


def test_a_missing_value_has_the_label_that_training_gave_it(model: Pretrained) -> None:
    knows = replace(model, origin={**model.origin, "missing": "NK"})
    sizes = {"library_size": [50.0] * 4}
    table = pd.DataFrame({"type": ["T cell", None, "", np.nan], **sizes})
    for asked in (table, table.assign(type=table["type"].astype("category"))):
        made = knows.generate(asked, sampler=FEW)
        assert list(made.obs["type"]) == ["T cell", "NK", "NK", "NK"]
        named = knows.generate(pd.DataFrame({"type": ["T cell", "NK", "NK", "NK"], **sizes}), sampler=FEW)
        assert (made.X != named.X).nnz == 0
        assert list(made.obs_names) == list(named.obs_names)
    with pytest.raises(InputError, match="column type, row 1: no label is given, and the model was trained on no miss"):
        model.generate(table, sampler=FEW)
    with pytest.raises(InputError, match="column donor, row 0: no label"):  # which has no label NK
        knows.generate(pd.DataFrame({"donor": [None], "library_size": [50.0]}), sampler=FEW)


def test_own_library_sizes_are_taken_and_need_no_fit(model: Pretrained) -> None:
    table = pd.DataFrame({"type": ["NK"] * 4, "library_size": [50.0, 50, 5_000, 5_000]})
    made: Any = model.generate(table, seed=0, sampler=FEW)
    totals = np.asarray(made.X.sum(1)).ravel()
    assert totals[:2].max() < 250
    assert totals[2:].min() > 1_000
    assert list(made.obs["library_size"]) == [50, 50, 5_000, 5_000]


@pytest.mark.parametrize(
    "table, seed, said",
    [
        ({"typ": ["T cell"]}, 0, "condition 'typ' is unknown. The model knows type, donor"),
        ({"type": ["T cell", "t-cell"]}, 0, "condition 'type' has no label 't-cell'. It has 'T cell', 'B cell', 'NK'"),
        ({"type": ["T cell", None]}, 0, "column type, row 1: no label"),
        ({"type": pd.Categorical(["T cell", None])}, 0, "column type, row 1: no label"),
        ({"type": ["NK"]}, 0, "no library sizes were fitted for type=NK"),
        ({"type": []}, 0, "the table of conditions is empty"),
        ({"library_size": [10.0, -1]}, 0, "column library_size, row 1: -1.0 must be a number above 0"),
        ({"library_size": [10.0, np.nan]}, 0, "column library_size, row 1: nan must be a number"),
        ({"library_size": ["many"]}, 0, "column library_size, row 0: many must be a number"),
        ({"library_size": [1e30]}, 0, r"row 0: 1e\+30 must be a number above 0 and at most 100,000,000"),
        ({"type": ["T cell"]}, -1, "seed=-1"),
    ],
)
def test_what_can_not_be_generated_is_said_in_one_line(model: Pretrained, table: dict, seed: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        model.generate(pd.DataFrame(table), seed=seed, sampler=FEW)
    assert "\n" not in str(refusal.value)


def test_an_untrained_combination_takes_the_library_sizes_of_its_parts_and_says_so(
    model: Pretrained, capsys: pytest.CaptureFixture
) -> None:
    """T cells of d2: T cells alone are 5 and donor 2 alone 4; donor 2 varies as little, so the first choice stays."""
    table = pd.DataFrame({"type": ["T cell", "T cell"], "donor": ["d2", "d1"]})
    made: Any = model.generate(table, seed=0, sampler=FEW)
    said = capsys.readouterr().err
    assert "library sizes of type=T cell, donor=d2: no training cell has this combination" in said
    assert "taken from the 5 with type=T cell" in said
    assert said.count("no training cell") == 1
    assert 90 < made.obs["library_size"].mean() < 250


def origin_of(**hidden: float) -> dict[str, Any]:
    return {"ldm": {"config": {"guidance": hidden}}}


@pytest.mark.parametrize(
    "hidden, table, sampler, said",
    [
        ((0.1, 0.0), {"type": ["T cell"]}, {}, "without the others, which the model never saw: .*drop_each=0"),
        ((0.1, 0.0), {"type": ["T cell"], "donor": ["d1"]}, {"guidance": "additive"}, "drop_each=0"),
        ((0.0, 0.0), {"type": ["T cell"], "donor": ["d1"]}, {"guidance_scale": 2.0}, "never saw: .*drop_all=0"),
        ((0.0, 0.0), {"library_size": [9.0]}, {}, "drop_all=0"),
        ((0.1, 0.1), {"type": ["T cell"]}, {"guidance": "compositional"}, "names no combinations"),
        (
            (0.1, 0.1),
            {"type": ["T cell"]},
            {"guidance": "additive", "guidance_weights": {"typ": 1.0}},
            "sampler.guidance_weights: condition 'typ' is unknown. The model knows type, donor",
        ),
    ],
)
def test_guidance_that_the_model_was_not_trained_for_is_refused(
    model: Pretrained, hidden: tuple, table: dict, sampler: dict, said: str
) -> None:
    asked = replace(model, origin=origin_of(drop_all=hidden[0], drop_each=hidden[1]))
    with pytest.raises(InputError, match=said):
        asked.generate(pd.DataFrame(table), seed=0, sampler=SamplerConfig("euler", 2, **sampler))
    # what it was trained for goes on
    both = pd.DataFrame({"type": ["T cell"], "donor": ["d1"]})
    assert asked.generate(both, seed=0, sampler=FEW).n_obs == 1


@pytest.mark.parametrize("genes, said", [(["nix"], "gene 'nix' is not among"), ([GENES.ids[1]] * 2, "stands twice")])
def test_asked_genes_must_be_known_and_once(model: Pretrained, genes: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        model.generate(wanted(), seed=0, sampler=FEW, genes=genes)


def test_what_is_not_a_number_is_no_count() -> None:
    """A comparison with NaN is false, and so would be that a gene is expressed."""
    value_BQ = torch.tensor([[-1.0, -0.5], [-1.0, torch.nan]])
    keys_BQ = draws.keys(0, "counts", torch.arange(2), torch.arange(1, 3))
    for kind in ("counts", "means"):
        with pytest.raises(InputError, match="1 of 2 cells of a batch have no expected counts"):
            written(Predicted("nb", value_BQ, torch.ones(2)), kind, torch.full((2,), 1e3), keys_BQ)


def test_conditions_dropped_one_by_one_were_at_times_all_dropped(model: Pretrained) -> None:
    """But for a model of one condition, which is dropped by drop_all alone."""
    asked = replace(model, origin=origin_of(drop_all=0.0, drop_each=0.1))
    guided = SamplerConfig("euler", 2, guidance_scale=2.0)
    assert asked.generate(pd.DataFrame({"type": ["T cell"], "donor": ["d1"]}), seed=0, sampler=guided).n_obs == 1
    torch.manual_seed(0)
    alone = replace(asked, dit=DiT(DiTConfig(16, 1, 2), L, Z, {"type": 3}))
    with pytest.raises(InputError, match="never saw: .*drop_all=0"):
        alone.generate(pd.DataFrame({"type": ["T cell"]}), seed=0, sampler=guided)


def test_a_combination_that_is_drawn_as_another_is_told(model: Pretrained) -> None:
    trained = torch.tensor([[0, 0], [0, 1], [1, 0]])
    dit = DiT(DiTConfig(16, 1, 2), L, Z, {"type": 3, "donor": 2}, combinations_KC=trained).eval()
    dit.means.fit(trained, torch.full((3,), 1e5), torch.tensor([0.0, 1.0, 5.0])[:, None, None].expand(-1, L, Z))
    model = replace(model, dit=dit.requires_grad_(False))
    table = pd.DataFrame({"type": ["B cell", "T cell", "B cell"], "donor": ["d2", "d2", "d2"]})
    told = [note for note in model.check_conditions(table, 0).notes if "library" not in note]
    assert told == [
        "type=B cell, donor=d2: no training cell has this combination. "
        "It is drawn as donor=d1, and moved by the difference"
    ]
    joint = model.check_conditions(table, 0, SamplerConfig(guidance="joint")).notes
    assert not [note for note in joint if "moved" in note]


def test_each_cell_of_a_batch_goes_its_own_way(model: Pretrained) -> None:
    """Whichever combination it has, and whatever stands beside it, as where its latents are asked for directly."""
    trained, labels = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0]]), {"type": 3, "donor": 2}
    dit = DiT(DiTConfig(16, 1, 2), L, Z, labels, combinations_KC=trained).eval().requires_grad_(False)
    place_K = torch.tensor([0.0, 1.0, 5.0, 9.0]).double()
    dit.fit_means(trained, torch.full((4,), 1e5).double(), place_K[:, None, None].expand(-1, L, Z), 1.0)
    model = replace(model, dit=dit, batch=2)
    rows = [("B cell", "d2", 1, 1), ("T cell", "d2", 0, 1), ("NK", "d2", 2, 1), ("B cell", "d1", 1, 0)]
    table = pd.DataFrame({"type": [r[0] for r in rows], "donor": [r[1] for r in rows], "library_size": 500.0})
    made: Any = model.generate(table, seed=3, sampler=FEW, kind="means")
    ids = {"type": torch.tensor([r[2] for r in rows]), "donor": torch.tensor([r[3] for r in rows])}
    drawn = generate_latents(dit, ids, torch.arange(4), 3, replace(FEW, guidance="shift"))
    every = torch.arange(1, G + 1)
    with torch.no_grad():
        expected = model.vae.decode(model.vae.normalised(drawn.latent_BLZ), every).expected(torch.full((4,), 500.0))
    np.testing.assert_allclose(made.X.toarray(), expected.numpy(), rtol=1e-4)
    joint: Any = model.generate(table, seed=3, sampler=replace(FEW, guidance="joint"), kind="means")
    moved = np.abs(made.X.toarray() - joint.X.toarray()).sum(1) > 1
    assert moved.tolist() == [True, False, True, False]


@pytest.mark.parametrize("given", [False, True])
def test_the_network_is_told_the_library_sizes_that_the_labels_it_is_asked_for_have(
    model: Pretrained, given: bool
) -> None:
    """Drawn as d1, cells have e^-3 times the counts that they have as d2. They are decoded with those of d2."""
    trained, labels = torch.tensor([[0, 0], [0, 1], [1, 0]]), {"type": 3, "donor": 2}
    dit = DiT(DiTConfig(16, 1, 2, library_size=True), L, Z, labels, combinations_KC=trained).eval()
    dit.means.fit(trained, torch.full((3,), 1e5), torch.tensor([0.0, 1.0, 5.0])[:, None, None].expand(-1, L, Z))
    of_pair = {("T cell", "d2"): LogNormal(20, 6.0, 0.1), ("B cell", "d1"): LogNormal(20, 4.0, 0.1)}
    fitted = {("donor",): {("d2",): LogNormal(20, 7.0, 0.1)}, ("type", "donor"): of_pair}
    sizes = LibrarySizeModel(("type", "donor"), {**fitted, ("type",): {("B cell",): LogNormal(20, 4.0, 0.9)}})
    model = replace(model, dit=dit.requires_grad_(False), library_sizes=sizes, batch=2)
    told: list[torch.Tensor] = []
    dit.register_forward_pre_hook(lambda _, __, named: told.append(named["size_B"]), with_kwargs=True)
    table = pd.DataFrame({"type": ["B cell", "T cell"], "donor": ["d2", "d2"]})
    table = table.assign(library_size=[900.0, 400.0]) if given else table
    made: Any = model.generate(table, seed=0, sampler=SamplerConfig("euler", 1))
    size_n = made.obs["library_size"].to_numpy()
    np.testing.assert_allclose(told[0], size_n * np.exp([-3.0, 0.0]), rtol=1e-5)
    expected = [900, 400] if given else np.exp([7.0, 6.0])
    np.testing.assert_allclose(size_n, expected, rtol=1e-5 if given else 0.4)
    told.clear()
    model.generate(table, seed=0, sampler=SamplerConfig("euler", 1, guidance="joint"))
    np.testing.assert_allclose(told[0], size_n, rtol=1e-5)


def test_a_library_size_unlike_all_of_its_kind_is_told_as_the_nearest_and_said(model: Pretrained, capsys) -> None:
    """Else the network makes cells of a kind that has such sizes. Counts have the size that was given."""
    told: list[torch.Tensor] = []
    hook = model.dit.register_forward_pre_hook(lambda _, __, named: told.append(named["size_B"]), with_kwargs=True)
    of_type = {("T cell",): LogNormal(50, 5.0, 0.1), ("B cell",): LogNormal(50, 7.0, 0.1)}
    every = {(): {(): LogNormal(100, 6.0, 1.0)}, ("type",): of_type}
    model = replace(model, library_sizes=LibrarySizeModel(("type",), every), batch=3)
    table = pd.DataFrame({"type": ["T cell", "B cell", "NK"], "library_size": [5_000.0, 1_000.0, 4.0]})
    made: Any = model.generate(table, seed=0, sampler=SamplerConfig("euler", 1))
    hook.remove()
    np.testing.assert_allclose(told[0], [np.exp(5.2), 1_000, np.exp(4.0)], rtol=1e-5)  # of NK nothing is known
    assert made.obs["library_size"].tolist() == [5_000.0, 1_000.0, 4.0]
    assert made.X[0].sum() > 1_000
    note = (
        "2 of 3 cells have a library size unlike their kind's, such as 5,000, where most training cells of type=T cell"
    )
    assert f"{note} have 122 to 181" in capsys.readouterr().err
    assert "unlike their kind's" in made.uns["scldm"]["notes"]


# --- conditions that are more than a label -------------------------------------------------------------------------


def test_values_and_labels_never_trained_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = of_doses(tmp_path)
    table = pd.DataFrame({"dose": ["1", "2.5"], "type": ["T cell", "NK"], "donor": ["d1", "d1"]})
    wanted = model.check_conditions(table, 0)
    assert wanted.ids["dose"].tolist() == [1.0, 2.5]
    # 1 is the label 1.0, so this combination has library sizes and a token; of the other only the donor is known
    assert [note.split(":")[0] for note in wanted.notes] == [
        "dose=2.5, type=NK, donor=d1", "library sizes of dose=2.5, type=NK, donor=d1",
    ]  # fmt: skip
    assert wanted.log_mean is not None
    assert wanted.log_mean.tolist() == [5.0, 6.0]
    made: Any = model.generate(table, seed=0, sampler=FEW)
    assert made.obs["dose"].tolist() == [1.0, 2.5]
    assert "no token of its own. It uses the sum" in capsys.readouterr().err
    none: Any = model.generate(table[["type"]].assign(library_size=9.0), seed=0, sampler=FEW)
    assert none.obs["dose"].isna().all()
    for dose, said in (("20", "20 lies beyond the values that were trained, 0 to 10"), ("high", "'high' is no number")):
        with pytest.raises(InputError, match=said):
            model.generate(table.assign(dose=dose), seed=0, sampler=FEW)
    with pytest.raises(InputError, match="condition 'donor': no training cell had the label 'held out'"):
        model.generate(table.assign(donor="held out"), seed=0, sampler=FEW)
