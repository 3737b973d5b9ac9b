"""Every way of computing attention computes the same function: forward and gradients against the formula in float64."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from benchmarks.ways import of_preset
from scldm.batch import GeneCounts
from scldm.likelihood import LikelihoodKind
from scldm.model.attention import AttentionKind
from scldm.model.factorised import tiles, unpooling
from scldm.model.vae import VAE, VAEConfig
from tests.rounding import worse

CONFIG = VAEConfig(width=32, n_latents=6, latent_width=8, n_layers=1, n_heads=4)
N_GENES, B, S = 150, 5, 40
N_NETWORKS = 5  # a path's error in float32 is judged over so many


@dataclass(frozen=True)
class Case:
    """shape: of the network; what differs from five cells that share forty genes."""

    shape: VAEConfig = CONFIG
    n_genes: int = N_GENES
    per_cell: bool = False
    n_given: int = S
    n_cells: int = B
    large: bool = False
    padding: bool = False
    zero_cell: bool = False
    by_latents: bool | None = None
    by_table: bool | None = None
    tile: int = tiles.TILE_CPU

    def batch(self) -> GeneCounts:
        generator = torch.Generator().manual_seed(1)

        def drawn() -> Tensor:
            return torch.randperm(self.n_genes, generator=generator)[: self.n_given] + 1

        ids = torch.stack([drawn() for _ in range(self.n_cells)]) if self.per_cell else drawn()
        counts = torch.poisson(
            3 * torch.rand(self.n_cells, self.n_given, generator=generator), generator=generator
        ).int()
        if self.large:
            counts[:, :2] = 1_000_000
        if self.zero_cell:
            counts[1] = 0
        if self.padding:
            ids[..., -7:] = 0
            counts[:, -7:] = 0
        return GeneCounts(ids, counts)

    def choose(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The decoder's way, where the case names one."""
        if self.by_latents is not None:
            monkeypatch.setattr(unpooling, "PAYS", 1e9 if self.by_latents else 0.0)
        if self.by_table is not None:
            monkeypatch.setattr(unpooling, "pays_by_table", lambda *_: self.by_table)


CASES = {
    "shared, by latents": Case(by_latents=True),
    "shared, by gene": Case(by_latents=False),
    "shared, in tiles": Case(by_latents=True, tile=200),
    "shared, by gene in tiles": Case(by_latents=False, tile=200),
    "per cell": Case(per_cell=True, n_genes=1_000),
    "per cell, in tiles": Case(per_cell=True, n_genes=1_000, tile=200),
    "per cell, tables by vocabulary": Case(per_cell=True, by_table=False),
    "per cell, by table": Case(per_cell=True, by_table=True),
    "per cell, by table in tiles": Case(per_cell=True, by_table=True, tile=1_000),
    "per cell, by table, two heads, two numbers": Case(
        replace(CONFIG, decoder_cross_heads=2, likelihood="zinb"), per_cell=True, by_table=True
    ),
    "padding": Case(padding=True, by_latents=True),
    "padding per cell": Case(padding=True, per_cell=True, by_table=True),
    "one gene": Case(n_given=1, by_latents=True),
    "a cell of zeros": Case(zero_cell=True, by_latents=True),
    "counts of a million": Case(large=True, by_latents=True),
    "two decoder heads, KL": Case(replace(CONFIG, decoder_cross_heads=2, kl_weight=1e-3), by_latents=True),
    "two numbers a gene": Case(replace(CONFIG, likelihood="zinb"), by_latents=True),
    "two numbers a gene, by gene": Case(replace(CONFIG, likelihood="zinb"), by_latents=False),
    "the paper's": Case(replace(CONFIG, token="linear", direct=False), by_latents=True),
    "the paper's, per cell in tiles": Case(replace(CONFIG, token="linear", direct=False), per_cell=True, tile=200),
    "two layers": Case(replace(CONFIG, n_layers=2)),
}

# those in which the kernels do something else
FUSED = [name for name in CASES if not any(words in name for words in ("by gene", "by table", "tile"))]
QUICK = ["per cell"]
BF16 = ["padding", *(pytest.param(name, marks=pytest.mark.slow) for name in ("per cell", "two decoder heads, KL"))]
KINDS = ["plain", "sdpa", "factorised", pytest.param("fused", marks=pytest.mark.slow)]


def trained_like(shape: VAEConfig, n_genes: int, seed: int = 0) -> VAE:
    """Weights away from their start, at which attention is almost uniform."""
    torch.manual_seed(seed)
    vae = VAE(shape, n_genes).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.3 * parameter.std(correction=0).clamp_min(0.1) * torch.randn_like(parameter)
        vae.gene_embedding.weight.mul_(5)
        vae.gene_embedding.weight[0] = 0
    return vae


def outcome(
    vae: VAE, kind: AttentionKind, given: GeneCounts, dtype: torch.dtype, bf16: bool = False
) -> dict[str, Tensor]:
    """Latents, log shares and the gradient of every parameter, by name, as float64."""
    device = "cuda" if kind == "fused" and torch.cuda.is_available() else "cpu"
    network = VAE(replace(vae.config, attention=kind), vae.n_genes).to(device, dtype)
    network.load_state_dict(vae.state_dict())
    given = given.to(device)
    library_size_B = given.counts_BS.sum(1).to(dtype) + 1
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        posterior, predicted = network(given, given.gene_ids)
        loss = predicted.nll_B(given, library_size_B).mean() + posterior.mean_BLZ.square().mean()
    loss.backward()
    out = {"latent": posterior.mean_BLZ, "log share": predicted.value_BQ.where(given.mask, 0.0)}
    out |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: x.detach().double().cpu() for name, x in out.items()}


def relative_errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """By name, over norms; what is less than a thousandth of the whole gradient is judged against that thousandth."""
    whole = torch.stack([x.norm() for x in true.values()]).norm()
    return {name: float((found[name] - x).norm() / x.norm().clamp_min(1e-3 * whole)) for name, x in true.items()}


@pytest.fixture
def kernels():
    """Fused kernels run on a GPU where there is one, else in Triton's interpreter (conftest.py)."""
    pytest.importorskip("triton", reason="needs the package triton, which the extra `test` brings on Linux")


def only_where_it_runs(kind: AttentionKind, request: pytest.FixtureRequest) -> None:
    if kind == "fused":
        request.getfixturevalue("kernels")
        if torch.cuda.is_available():
            pytest.skip("float64 on a CPU: needs Triton's interpreter, which a machine with a GPU does not use")


def whole_errors(
    vae: VAE, kind: AttentionKind, given: GeneCounts, true: dict[str, Tensor], bf16: bool = False
) -> list[float]:
    """Relative, in float32 or bf16: of latents, log shares and the gradient."""
    found = outcome(vae, kind, given, torch.float32, bf16)
    gradient = [torch.cat([x[key].flatten() for key in true if "." in key]) for x in (found, true)]
    pairs = [(found[key], true[key]) for key in ("latent", "log share")] + [(gradient[0], gradient[1])]
    return [float((x - y).norm() / y.norm().clamp_min(1e-9)) for x, y in pairs]


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["sdpa", "factorised"])
def test_a_path_is_the_formula(kind, name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(tiles, "TILE_CPU", case.tile)
    monkeypatch.setattr(unpooling, "GENES", 64 if case.tile > 1_000 else 16)
    if case.tile < 1_000:  # the first tiles of the hidden layer are kept for backward, the others made again
        monkeypatch.setattr(tiles, "KEPT_CPU", 3 * case.tile)
    case.choose(monkeypatch)
    given = case.batch()
    plain: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    for seed in range(N_NETWORKS):
        vae = trained_like(case.shape, case.n_genes, seed)
        true = outcome(vae, "plain", given, torch.float64)
        if seed == 0:
            exact = relative_errors(outcome(vae, kind, given, torch.float64), true)
            assert max(exact.values()) < 1e-9, "in float64 it is the same function"
        for kept, path in ((plain, "plain"), (found, kind)):
            errors = relative_errors(outcome(vae, path, given, torch.float32), true)
            assert errors.keys() == true.keys(), "the same parameters have a gradient"
            for key, error in errors.items():
                kept.setdefault(key, []).append(error)
    assert not worse(found, plain, at_most=2 if kind == "factorised" else 10)  # what torch's kernels err by is not ours


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FUSED]
)
def test_fused_kernels_are_the_formula(name, kernels):
    """Parameter by parameter in float64; in float32 as a whole, as GPU and interpreter take exponentials to 2 ulp."""
    case = CASES[name]
    vae, given = trained_like(case.shape, case.n_genes), case.batch()
    true = outcome(vae, "plain", given, torch.float64)
    if not torch.cuda.is_available():  # whose matrix units take no float64
        found = outcome(vae, "fused", given, torch.float64)
        assert found.keys() == true.keys(), "the same parameters have a gradient"
        assert max(relative_errors(found, true).values()) < 1e-9, "in float64 it is the same function"
    plain = whole_errors(vae, "plain", given, true)
    for fused, formula in zip(whole_errors(vae, "fused", given, true), plain):
        assert fused <= 2 * max(formula, 1e-7)


@pytest.mark.parametrize(
    "name", ["shared, by latents", "shared, by gene", "per cell", "per cell, by table", "counts of a million"]
)
def test_bf16_errs_at_most_twice_as_much_as_the_formula(name, monkeypatch):
    case = CASES[name]
    case.choose(monkeypatch)
    check_bf16("factorised", case)


@pytest.mark.heavy
@pytest.mark.parametrize("name", BF16)
def test_fused_kernels_in_bf16_err_at_most_twice_as_much(name, kernels):
    check_bf16("fused", CASES[name])


def check_bf16(kind: AttentionKind, case: Case) -> None:
    vae, given = trained_like(case.shape, case.n_genes), case.batch()
    true = outcome(vae, "plain", given, torch.float64)
    plain = whole_errors(vae, "plain", given, true, bf16=True)
    for fast, formula in zip(whole_errors(vae, kind, given, true, bf16=True), plain):
        assert fast < 2 * formula


def at_preset(preset: str, n_cells: int, n_given: int, per_cell: bool) -> Case:
    """Width, latents and heads of a preset, without blocks; of the vocabulary a half is given."""
    return Case(replace(of_preset(preset, CONFIG), n_layers=0), 2 * n_given, per_cell, n_given, n_cells)


def check_preset(case: Case, bf16: bool) -> None:
    """In bf16 at most twice the formula's own error, in float32 likewise, or a float32's last digit."""
    vae, given = trained_like(case.shape, case.n_genes), case.batch()
    true = outcome(vae, "plain", given, torch.float64)
    found, plain = whole_errors(vae, "fused", given, true, bf16), whole_errors(vae, "plain", given, true, bf16)
    assert all(fused <= 2 * max(formula, 1e-7) for fused, formula in zip(found, plain)), (found, plain)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    os.environ.get("SCLDM_TEST_GPU") == "1", reason="needs Triton's interpreter: test_on_gpu.py has a GPU"
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_fused_kernels_at_the_shape_of_20m(bf16, kernels):
    check_preset(at_preset("20m", 2, 128, per_cell=False), bf16)


@pytest.mark.slow
def test_fused_kernels_of_larger_tiles_than_one(kernels, monkeypatch):
    """Several blocks of genes, of cells and of the hidden layer; backward in chunks; widths of no round number."""
    from scldm.kernels import unpool

    case = Case(VAEConfig(width=42, n_latents=20, latent_width=8, n_layers=1, n_heads=3), n_genes=140, n_given=80)
    monkeypatch.setattr(unpool, "CHUNK", 1)
    vae, given = trained_like(case.shape, case.n_genes), case.batch()
    true = outcome(vae, "plain", given, torch.float64)
    if torch.cuda.is_available():
        plain = whole_errors(vae, "plain", given, true)
        assert all(x < 2 * y for x, y in zip(whole_errors(vae, "fused", given, true), plain))
    else:
        assert max(relative_errors(outcome(vae, "fused", given, torch.float64), true).values()) < 1e-9


@pytest.mark.parametrize("kind", ["plain", "sdpa"])
def test_a_set_without_padding_needs_no_mask(kind, monkeypatch):
    """The same function; and torch's kernels get what they want on a GPU: four axes, equal batches and no mask."""
    calls = []
    compute = torch.nn.functional.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        calls.append((q.shape, k.shape, attn_mask is None))
        return compute(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    vae, given = trained_like(replace(CONFIG, attention=kind), N_GENES), Case().batch()
    masked = vae.encode(given).mean_BLZ
    calls.clear()
    bare = vae.encode(replace(given, padded=False)).mean_BLZ
    vae.decode(bare, given.gene_ids)
    torch.testing.assert_close(bare, masked, atol=1e-12, rtol=1e-12)
    assert len(calls) == (4 if kind == "sdpa" else 0), "two blocks and both cross-attentions"
    for q, k, without_mask in calls:
        assert len(q) == len(k) == 4
        assert q[:2] == k[:2] == (B, q[1])
        assert without_mask


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_set_reads_zero(kind, request):
    """One cell is given nothing but padding: its latents are finite, those of the others untouched."""
    only_where_it_runs(kind, request)
    vae = trained_like(CONFIG, N_GENES)
    network = VAE(replace(CONFIG, attention=kind), N_GENES).double()
    network.load_state_dict(vae.state_dict())
    given = CASES["per cell, tables by vocabulary"].batch()
    ids, counts = given.gene_ids.clone(), given.counts_BS.clone()
    ids[2], counts[2] = 0, 0
    latent_BLZ = network.encode(GeneCounts(ids, counts)).mean_BLZ
    query = network.pool.query(network.latent_queries)
    read = query + network.pool.out.bias
    x_BLD = (read + network.pool.mlp(network.pool.norm_mlp(read)))[None]
    x_BLD = x_BLD + network.genes_in(network.norm_genes(torch.zeros(CONFIG.width, dtype=torch.float64)))
    for block in network.encoder:
        x_BLD = block(x_BLD)
    expected = torch.nn.functional.layer_norm(network.to_latent(x_BLD), (CONFIG.latent_width,))
    torch.testing.assert_close(latent_BLZ[2], expected[0])
    others = [0, 1, 3, 4]
    alone = network.encode(GeneCounts(ids[others], counts[others])).mean_BLZ
    torch.testing.assert_close(latent_BLZ[others], alone)
    latent_BLZ.square().mul(torch.arange(8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True], ids=["float64", "bf16"])
@pytest.mark.parametrize("per_cell", [False, True], ids=["shared", "per cell"])
def test_order_and_padding_change_nothing(kind, bf16, per_cell, request):
    only_where_it_runs(kind, request)
    vae = VAE(replace(CONFIG, attention=kind), N_GENES)
    vae.load_state_dict(trained_like(CONFIG, N_GENES).state_dict())
    vae = vae if bf16 else vae.double()
    given = Case(per_cell=per_cell).batch()
    order = torch.randperm(S)
    zero = torch.zeros(B, 9, dtype=torch.int32)
    moved_ids, moved_counts = given.gene_ids[..., order], given.counts_BS[:, order]
    padded_ids = torch.cat((moved_ids, zero[:, :9].long() if per_cell else zero[0, :9].long()), dim=-1)
    moved = GeneCounts(padded_ids, torch.cat((moved_counts, zero), dim=1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        latent, again = vae.encode(given).mean_BLZ, vae.encode(moved).mean_BLZ
        share = vae.decode(latent, given.gene_ids).value_BQ
        share_moved = vae.decode(latent, padded_ids).value_BQ
    # bf16 rounds the terms of its sums, which come in another order: as far as the formula itself is off
    tolerance = 0.05 if bf16 else 1e-10
    torch.testing.assert_close(again, latent, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(share_moved[:, :S], share[:, order], atol=tolerance, rtol=tolerance)
    assert (share_moved[:, S:] == -torch.inf).all(), "padding has no share"


@pytest.mark.parametrize("likelihood", get_args(LikelihoodKind))
@pytest.mark.parametrize("kl_weight", [0.0, 1e-3])
def test_every_parameter_has_a_true_gradient(likelihood, kl_weight):
    """AdamW would turn the rounding noise of one without into full steps, different ones on different hardware."""
    vae = trained_like(replace(CONFIG, n_layers=2, kl_weight=kl_weight, likelihood=likelihood), N_GENES)
    true = outcome(vae, "plain", CASES["shared, by gene"].batch(), torch.float64)
    gradients = {name: float(true[name].abs().max()) for name, _ in vae.named_parameters()}
    whole = max(gradients.values())
    assert not {name: g for name, g in gradients.items() if g < 1e-9 * whole}


@pytest.mark.parametrize("attention", ["plain", "factorised", pytest.param("fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("by_latents", [True, False])
def test_less_memory_is_the_same_result(attention, by_latents, monkeypatch, request):
    """Blocks recomputed, genes in chunks of a size that does not divide them: outputs and every gradient."""
    only_where_it_runs(attention, request)
    monkeypatch.setattr(unpooling, "PAYS", 1e9 if by_latents else 0.0)
    vae, given = trained_like(CONFIG, N_GENES), Case(padding=True).batch()
    true = outcome(vae, attention, given, torch.float64)
    vae.config = replace(vae.config, recompute=True, gene_chunk=17)
    assert max(relative_errors(outcome(vae, attention, given, torch.float64), true).values()) < 1e-9


def test_recompute_keeps_less():
    """Tensors that wait for backward, in numbers: blocks and the decoder's genes."""

    def kept(**memory) -> int:
        vae = VAE(replace(CONFIG, n_layers=4, **memory), N_GENES)
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        given = Case().batch()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            vae(given, given.gene_ids)
        return sum(sizes.values())

    assert kept(recompute=True, gene_chunk=10) < 0.6 * kept()


@pytest.mark.parametrize("likelihood", get_args(LikelihoodKind))
def test_ten_genes_are_ten_rows_of_a_full_decode(likelihood):
    vae = trained_like(replace(CONFIG, likelihood=likelihood, gene_chunk=64), N_GENES)
    latent_BLZ, size_B = torch.randn(3, 6, 8, dtype=torch.float64), torch.tensor([500.0, 2e3, 1e4]).double()
    every = torch.arange(1, N_GENES + 1)
    ten = torch.randperm(N_GENES)[:10] + 1
    full, part = vae.decode(latent_BLZ, every), vae.decode(latent_BLZ, ten, among_ids=every)
    torch.testing.assert_close(part.mu(size_B), full.mu(size_B)[:, ten - 1], rtol=1e-9, atol=0)
    counts = torch.randint(0, 9, (3, N_GENES))
    log_p = full.log_prob_BQ(counts, size_B)[:, ten - 1]
    torch.testing.assert_close(part.log_prob_BQ(counts[:, ten - 1], size_B), log_p, rtol=1e-9, atol=1e-12)


@pytest.mark.exhaustive  # 90 s, of which torch compiles 85
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_blocks_are_the_same_network():
    vae, given = trained_like(CONFIG, N_GENES), Case().batch()
    true = outcome(vae, "factorised", given, torch.float64)
    vae.config = replace(vae.config, compile=True, recompute=True)
    assert max(relative_errors(outcome(vae, "factorised", given, torch.float64), true).values()) < 1e-9
