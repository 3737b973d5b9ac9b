"""Trained weights on other genes and labels: old rows unchanged, new rows new, the same function of what is old."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scldm.batch import GeneCounts
from scldm.errors import InputError
from scldm.model.dit import DiT, DiTConfig
from scldm.model.vae import VAE, VAEConfig
from scldm.train.init_from import dit_from, vae_from
from scldm.vocab import MIN_GENE_SHARE, ConditionVocab, GeneVocab

SHAPE = VAEConfig(width=16, n_latents=2, latent_width=4, n_layers=1, n_heads=2, likelihood="zinb")
OLD = GeneVocab(("A", "B", "C", "D"), "symbol")
NEW = GeneVocab(("X", "C", "A", "Y", "B"), "symbol")


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def trained_vae() -> VAE:
    vae = VAE(SHAPE, OLD.n_genes)
    randomised(vae)
    vae.gene_embedding.weight.data[0] = 0
    return vae


def test_genes_are_joined_by_name() -> None:
    trained, vae = trained_vae(), VAE(SHAPE, NEW.n_genes)
    start = {name: p.detach().clone() for name, p in vae.named_parameters()}
    (joined,) = vae_from(vae, NEW, trained, OLD, MIN_GENE_SHARE)
    assert (joined.known, joined.new, joined.left_out) == (3, ("X", "Y"), ("D",))
    assert str(joined) == "genes: 3 known, 2 new (X, Y), 1 left out (D)"
    for name in ("gene_embedding", "log_theta", "log_odds_dropout"):
        found, before = getattr(vae, name).weight, getattr(trained, name).weight
        for gene in ("A", "B", "C"):
            assert torch.equal(found[NEW.index_of[gene]], before[OLD.index_of[gene]])
        for gene in ("X", "Y"):
            assert torch.equal(found[NEW.index_of[gene]], start[f"{name}.weight"][NEW.index_of[gene]])
        assert torch.equal(found[0], before[0])  # of padding
    # of genes that both know it is the same network
    counts = torch.tensor([[3, 0, 7]])
    outcomes = []
    for network, genes in ((trained, OLD), (vae, NEW)):
        ids = torch.tensor([genes.index_of[gene] for gene in ("A", "B", "C")])
        posterior, predicted = network(GeneCounts(ids, counts), ids)
        outcomes.append((posterior.mean_BLZ, predicted.value_BQ, predicted.dropout_BQ))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_too_few_genes_are_refused_with_a_guess_at_the_cause() -> None:
    """One of twenty by chance, as between the symbols of two species."""
    old = GeneVocab((*(f"Gene{k}" for k in range(19)), "X"), "symbol")
    new = GeneVocab((*(f"GENE{k}" for k in range(19)), "X"), "symbol")
    with pytest.raises(
        InputError, match=r"1 of 20 genes matched, .* \(min_gene_share=0.1\).* 20 match but for upper and lower case"
    ):
        vae_from(VAE(SHAPE, 20), new, VAE(SHAPE, 20), old, 0.1)
    assert vae_from(VAE(SHAPE, 20), new, VAE(SHAPE, 20), old, 0.05)[0].known == 1


def test_new_genes_have_the_share_beside_known_ones_that_they_start_with() -> None:
    """The trained shares are of another vocabulary and have drifted since: only their differences mean anything."""
    trained, vae = trained_vae(), VAE(SHAPE, NEW.n_genes)
    trained.log_share.weight.data += 3.0
    share_G = torch.tensor([0.2, 0.1, 0.3, 0.2, 0.2])  # of X, C, A, Y, B
    vae.start_at(share_G)
    vae_from(vae, NEW, trained, OLD, MIN_GENE_SHARE)
    found_G = vae.log_share.weight[1:, 0].softmax(0)
    torch.testing.assert_close(found_G[[0, 3]], share_G[[0, 3]])
    assert vae.log_share.weight[NEW.index_of["A"]] == trained.log_share.weight[OLD.index_of["A"]]


def test_an_autoencoder_without_the_direct_ways_is_none_to_start_from_with_them() -> None:
    with pytest.raises(InputError, match="it was trained with model.direct=True"):
        vae_from(VAE(replace(SHAPE, direct=False), NEW.n_genes), NEW, trained_vae(), OLD, MIN_GENE_SHARE)


@pytest.mark.parametrize(
    "shape, genes, said",
    [
        (replace(SHAPE, width=32), NEW, r"its latent_queries is \(2, 16\), that of model is \(2, 32\)"),
        (replace(SHAPE, n_layers=2), NEW, "its encoder.1.* is missing"),
        (
            SHAPE,
            GeneVocab(("X", "Y"), "symbol"),
            "0 of 2 genes matched, and at least 10 % are needed .* Those of data.shards are",
        ),
        (SHAPE, GeneVocab(("A", "B"), "ensembl"), "its genes are symbol ids, those of data.shards ensembl"),
    ],
)
def test_what_does_not_fit_is_refused(shape: VAEConfig, genes: GeneVocab, said: str) -> None:
    with pytest.raises(InputError, match=said):
        vae_from(VAE(shape, genes.n_genes), genes, trained_vae(), OLD, MIN_GENE_SHARE)


def test_labels_and_conditions_are_joined_by_name() -> None:
    before = ConditionVocab({"type": ("B", "T", "NK"), "donor": ("d1", "d2")})
    now = ConditionVocab({"batch": ("b1",), "type": ("NK", "Mono", "B")})

    def dit_of(vocab: ConditionVocab, **more) -> DiT:
        return DiT(DiTConfig(16, 1, 2, **more), 2, 4, {name: vocab.n_labels(name) for name in vocab.names})

    trained, dit = dit_of(before), dit_of(now)
    randomised(trained)
    start = [table.weight.detach().clone() for table in dit.condition]
    report = {joined.what: joined for joined in dit_from(dit, now, trained, before)}
    assert (report["type"].known, report["type"].new, report["type"].left_out) == (2, ("Mono",), ("T",))
    assert (report["batch"].known, report["batch"].new) == (0, ("b1",))
    assert (report["donor"].known, report["donor"].left_out) == (0, ("d1", "d2"))
    of_type, known = dit.condition[1].weight, trained.condition[0].weight
    # NK, Mono, B, not given
    assert torch.equal(of_type[[0, 2, 3]], known[[2, 0, 3]])
    assert torch.equal(of_type[1], start[1][1])
    assert torch.equal(dit.condition[0].weight, start[0])
    assert torch.equal(dit.to_velocity.weight, trained.to_velocity.weight)
    with pytest.raises(InputError, match="combination_tokens"):
        dit_from(dit_of(now, combination_tokens=True), now, trained, before)


def test_weights_that_knew_conditions_otherwise_are_refused() -> None:
    """Weights trained beside shifts, or on a log scale, fit into a network without, and say something else there."""
    vocab = ConditionVocab({"type": ("B", "T"), "dose": ("1", "10")})

    def dit_of(scale: str = "log", **more) -> DiT:
        config = DiTConfig(16, 1, 2, continuous={"dose": scale}, **more)
        return DiT(config, 2, 4, {"type": 2, "dose": 2}, values={"dose": torch.tensor([1.0, 10.0])})

    for trained, dit, said in (
        (dit_of(condition_means=True), dit_of(), "trained with model.condition_means=True, not False"),
        (dit_of(), dit_of(condition_means=True), "trained with model.condition_means=False, not True"),
        (dit_of(library_size=True), dit_of(), "trained with model.library_size=True, not False"),
        (dit_of("log"), dit_of("linear"), "trained with model.continuous.dose=log, not linear"),
    ):
        with pytest.raises(InputError, match=said):
            dit_from(dit, vocab, trained, vocab)
    assert len(dit_from(dit_of(condition_means=True), vocab, dit_of(condition_means=True), vocab)) == 2


def test_library_sizes_are_told_on_the_scale_that_was_trained() -> None:
    vocab = ConditionVocab({"type": ("B", "T")})
    dit, trained = (DiT(DiTConfig(16, 1, 2, library_size=True), 2, 4, {"type": 2}) for _ in range(2))
    trained.size.log_moments.copy_(torch.tensor([9.0, 0.5]))
    randomised(trained)
    dit_from(dit, vocab, trained, vocab)
    size_B = torch.tensor([1e3, 1e4])
    assert torch.equal(dit.size(size_B), trained.size(size_B))
