"""The autoencoder of a cell: a set of (gene, count) -> a few latent tokens -> a distribution for each asked gene.

Source: Palla et al., arXiv 2511.02986. Equations have their number in v1.
Reading order: VAEConfig, chosen, VAE. What it says of a cell is in predicted.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scldm.batch import GeneCounts
from scldm.checked import Checked, check_divides, checked
from scldm.count_basis import TokenKind
from scldm.errors import InputError
from scldm.kernels import check_available, check_head, check_shape
from scldm.likelihood import LikelihoodKind, at_least_float32
from scldm.model import factorised, fused
from scldm.model.attention import AttentionKind, Choice, fastest
from scldm.model.blocks import TransformerBlock, Within
from scldm.model.gene_rows import by_vocabulary, rows_of
from scldm.model.mcab import MCAB
from scldm.model.predicted import Posterior, Predicted
from scldm.model.token import GeneToken

LOG_DISPERSION_AT_MOST = 18.4  # theta from 1e-8 to 1e8
LR_SCALE = "lr_scale"  # the attribute by which a parameter asks the optimizer for a multiple of the learning rate


@dataclass(frozen=True)
class VAEConfig(Checked):
    """Shape of the autoencoder.

    width: model width D
    n_latents: latent tokens L per cell
    latent_width: width Z of a latent token
    n_layers: transformer blocks in the encoder, and as many in the decoder
    n_heads: attention heads of the transformer blocks and of the encoder's cross-attention
    decoder_cross_heads: attention heads of the decoder's cross-attention
    kl_weight: beta of the KL term in the loss. 0 is a deterministic autoencoder whose latent tokens are normalised
    likelihood: of a gene's count: nb (negative binomial, a dispersion per gene), zinb (that, zero-inflated), poisson,
        or gaussian on log1p of counts scaled to 10,000 per cell
    token: how the encoder sees a gene's count: bins (soft ones of its logarithm), or linear (the paper's Eq. 9)
    direct: beside cross-attention, a linear way in and out. In: the mean of a cell's gene embeddings, weighted by log1p
        of the counts, goes to all latent tokens. Out: the inner product of the latent tokens' mean with the asked
        gene's embedding goes to its value. The paper has neither
    attention: how attention is computed, never what: auto (the fastest where it runs), plain (the formula), sdpa
        (torch's kernels), factorised (that, and cross-attention without a matrix product per cell and gene), fused
        (that in kernels of our own: NVIDIA GPUs)
    compile: torch.compile the transformer blocks. On a CPU that needs a C++ compiler
    recompute: keep a transformer block's input only, and compute the rest again in backward. Likewise a chunk of genes
    gene_chunk: genes that the decoder takes at once. 0 takes all
    """

    width: int = checked(128, at_least=1)
    n_latents: int = checked(128, at_least=1)
    latent_width: int = checked(16, at_least=1)
    n_layers: int = checked(2, at_least=0)
    n_heads: int = checked(4, at_least=1)
    decoder_cross_heads: int = checked(1, at_least=1)
    kl_weight: float = checked(0.0, at_least=0)
    likelihood: LikelihoodKind = "nb"
    token: TokenKind = "bins"
    direct: bool = True
    attention: AttentionKind = "auto"
    compile: bool = False
    recompute: bool = False
    gene_chunk: int = checked(0, at_least=0)

    @property
    def portable(self) -> VAEConfig:
        """The same network as any machine runs it fastest, however it was trained: attention `auto`, not compiled."""
        return replace(self, attention="auto", compile=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_heads", "decoder_cross_heads"):
            check_divides(self, name, "width", "model.")
        if self.attention == "fused":
            self.check_kernels()

    def check_kernels(self) -> None:
        """Raises: InputError for a shape that fused kernels don't take."""
        check_shape(self.decoder_cross_heads, self.n_latents)
        check_head(self.width // self.n_heads, self.n_latents)


def chosen(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> Choice:
    """How attention is computed on a device, with matrix products in a precision."""
    if config.attention != "auto":
        return Choice(config.attention, f"model.attention={config.attention}")
    return fastest(device.type, dtype, _refusal(config, device) if device.type == "cuda" else "")


@lru_cache
def _refusal(config: VAEConfig, device: torch.device) -> str:
    """Why fused kernels can't run. Empty where they can. It is asked at every forward pass."""
    try:
        config.check_kernels()
        check_available(device)
    except InputError as error:
        return str(error)
    return ""


class VAE(nn.Module):
    """Encoder and decoder share one table E of gene embeddings (row 0 is padding)."""

    def __init__(self, config: VAEConfig, n_genes: int) -> None:
        super().__init__()
        self.config, self.n_genes = config, n_genes
        D, Z, kind = config.width, config.latent_width, config.attention
        self.gene_embedding = nn.Embedding(n_genes + 1, D, padding_idx=0)
        self.token = GeneToken(D, config.token)
        self.latent_queries = nn.Parameter(torch.empty(config.n_latents, D))
        self.pool = MCAB(D, config.n_heads, kind)
        self.encoder = nn.ModuleList(TransformerBlock(D, config.n_heads, kind) for _ in range(config.n_layers))
        self.to_latent = nn.Linear(D, 2 * Z if config.kl_weight > 0 else Z)
        self.from_latent = nn.Linear(Z, D)
        self.decoder = nn.ModuleList(TransformerBlock(D, config.n_heads, kind) for _ in range(config.n_layers))
        self.unpool = MCAB(D, config.decoder_cross_heads, kind, bias_out=False)
        if config.direct:
            self.norm_genes, self.genes_in = nn.LayerNorm(D), nn.Linear(D, D)
            self.norm_cell, self.cell_out = nn.LayerNorm(D), nn.Linear(D, D)
        # a bias would cancel in the softmax over genes
        self.head = nn.Linear(D, 2 if config.likelihood == "zinb" else 1, bias=False)
        if config.likelihood != "gaussian":
            self.log_share = _per_gene(n_genes, lr_scale=1.0)
        if config.likelihood in ("nb", "zinb"):
            self.log_theta = _per_gene(n_genes)
        if config.likelihood == "gaussian":
            self.log_std = _per_gene(n_genes)
        if config.likelihood == "zinb":
            self.log_odds_dropout = _per_gene(n_genes)
        self.reads_genes, self.reads_latents = Within(), Within()
        self.initialise()
        if config.compile:
            for block in self.blocks:
                block.compile()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start where the latents are felt. With embeddings and queries of unit scale, the first 1,000 steps learn
        nothing but the mean cell. What differs between cells is then a small part of every token and query.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.token.gene.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.token.count, std=0.02)
        nn.init.normal_(self.latent_queries, std=0.02)
        nn.init.normal_(self.gene_embedding.weight, std=0.02)
        self.gene_embedding.weight[0].zero_()
        # with `start_at` the decoder says nearly the mean cell: genes' logits spread by 0.2 at any width and depth.
        # Started at 0, the direct way learns later
        if self.config.direct:
            nn.init.zeros_(self.head.weight)
            nn.init.normal_(self.cell_out.weight, std=0.2 / (0.02 * self.config.width))
        for name, start in (("log_share", 0.0), ("log_theta", 0.0), ("log_std", 0.0), ("log_odds_dropout", -2.0)):
            if hasattr(self, name):
                nn.init.constant_(getattr(self, name).weight, start)

    @torch.no_grad()
    def start_at(self, mean_G: Tensor) -> None:
        """Let the decoder say the mean cell until it learns what cells differ by.

        mean_G: mean raw count of every gene of the vocabulary, (n_genes,), positive
        """
        if self.config.likelihood != "gaussian":
            self.log_share.weight[1:, 0] = (mean_G / mean_G.sum()).log()

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, in their order."""
        return [*self.encoder, *self.decoder]

    @property
    def attention(self) -> Choice:
        """How attention is computed where the weights lie, in the precision around the call."""
        weight = self.head.weight
        return chosen(self.config, weight.device, factorised.compute_dtype(weight))

    def forward(
        self, given: GeneCounts, asked_ids: Tensor, noise_BLZ: Tensor | None = None
    ) -> tuple[Posterior, Predicted]:
        embedded = self._embedded(given.gene_ids)
        posterior = self.encode(given, embedded)
        latent_BLZ = posterior.sample(noise_BLZ)
        return posterior, self.decode(latent_BLZ, asked_ids, embedded=embedded if asked_ids is given.gene_ids else None)

    def _embedded(self, gene_ids: Tensor) -> Tensor | None:
        """Embeddings of these genes, looked up once for all who ask: a lookup's gradient is as large as the table. None
        where everyone takes the table itself."""
        if self.attention.way in ("factorised", "fused") and by_vocabulary(gene_ids, self.gene_embedding):
            return None
        return self.gene_embedding(gene_ids)

    def encode(self, given: GeneCounts, embedded: Tensor | None = None) -> Posterior:
        """Eq. 8: the posterior over L latent tokens of Z numbers. The order of the genes and padding change nothing.

        embedded: embeddings of the given genes, if the caller has them
        """
        embedded = self._embedded(given.gene_ids) if embedded is None else embedded
        return self.posterior(self.reads_genes(self._pooled, given, embedded))

    def _pooled(self, given: GeneCounts, embedded: Tensor | None) -> Tensor:
        x_BLD = self._attended(given, embedded)
        return x_BLD + self.direct_in(given, embedded)[:, None] if self.config.direct else x_BLD

    def direct_in(self, given: GeneCounts, embedded: Tensor | None = None) -> Tensor:
        """What every latent token gets of the cell's genes beside what it attends to, (B, D)."""
        table_GD, wide = self.gene_embedding.weight, self.gene_embedding.weight.dtype
        if embedded is None and given.gene_ids.ndim == 1:
            embedded = self.gene_embedding(given.gene_ids)
        c_BS = torch.log1p(given.counts_BS.to(wide)) * given.mask
        total_B1 = c_BS.sum(1, keepdim=True)
        c_BS = c_BS / total_B1.where(total_B1 > 0, 1)  # shares, none in a cell without counts
        with torch.autocast(c_BS.device.type, enabled=False):  # a sum over thousands of genes
            if embedded is not None:
                mean_BD = c_BS @ embedded if embedded.ndim == 2 else (c_BS[:, None] @ embedded)[:, 0]
            else:
                mean_BD = F.embedding_bag(given.gene_ids, table_GD, per_sample_weights=c_BS, mode="sum", padding_idx=0)
        return self.genes_in(self.norm_genes(mean_BD))

    def _attended(self, given: GeneCounts, embedded: Tensor | None) -> Tensor:
        way = self.attention.way
        if way in ("factorised", "fused"):
            read = fused.read_genes if way == "fused" else factorised.read_genes
            rows = rows_of(given.gene_ids, self.gene_embedding, embedded)
            return factorised.pool(self.pool, self.latent_queries, self.token, rows, given, read)
        assert embedded is not None
        tokens_BSD = self.token(embedded, given.counts_BS)
        return self.pool(self.latent_queries, tokens_BSD, given.mask if given.padded else None)

    def posterior(self, x_BLD: Tensor) -> Posterior:
        """From what was pooled of the genes, through the encoder's transformer blocks."""
        latent = self.to_latent(self._through(self.encoder, x_BLD))
        if self.config.kl_weight == 0:
            return Posterior(self.normalised(latent), None)
        mean_BLZ, log_var_BLZ = latent.chunk(2, dim=-1)
        return Posterior(mean_BLZ, log_var_BLZ.clamp(-20, 10))

    def normalised(self, latent_BLZ: Tensor) -> Tensor:
        """Latents as the decoder knows them: without a KL term every token has mean 0 and variance 1.

        Generated latents are near that, and nearer to cells when put there: FD 12.7 against 13.1 per type, 10.5 against
        10.7 pooled, W2 and MMD2 alike (means of 4 seeds on the quickstart's cells).
        """
        return F.layer_norm(latent_BLZ, latent_BLZ.shape[-1:]) if self.config.kl_weight == 0 else latent_BLZ

    def decode(
        self,
        latent_BLZ: Tensor,
        asked_ids: Tensor,
        among_ids: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> Predicted:
        """Eq. 10: the asked genes' embeddings read the latent tokens. A gene's share is a softmax over genes.

        asked_ids: (Q,) shared by the cells, or (B, Q). 0 is padding
        among_ids: (G,) the genes that the library size is for, and the softmax runs over. None takes the asked ones
        embedded: embeddings of the asked genes, if the caller has them
        """
        x_BLD = self._through(self.decoder, self.from_latent(latent_BLZ))
        out_BQK = self._read_out(x_BLD, asked_ids, embedded)
        value_BQ, *more_BQ = out_BQK.unbind(-1)
        if self.config.likelihood == "gaussian":
            return Predicted("gaussian", value_BQ, self._of_genes(self.log_std, asked_ids).exp())
        logit_BQ = (value_BQ + self._log_share(asked_ids)).masked_fill(asked_ids == 0, -torch.inf)
        if among_ids is None:
            log_share_BQ = logit_BQ.log_softmax(-1)
        else:
            among_BG = self._read_out(x_BLD, among_ids)[..., 0] + self._log_share(among_ids)
            log_share_BQ = logit_BQ - among_BG.logsumexp(-1, keepdim=True)
        if self.config.likelihood == "poisson":
            return Predicted("poisson", log_share_BQ)
        theta = self._of_genes(self.log_theta, asked_ids).exp()
        if self.config.likelihood == "nb":
            return Predicted("nb", log_share_BQ, theta)
        dropout_BQ = more_BQ[0] + self._of_genes(self.log_odds_dropout, asked_ids)
        return Predicted("zinb", log_share_BQ, theta, dropout_BQ)

    def library_size_B(self, total_B: Tensor, latent_BLZ: Tensor, given_ids: Tensor) -> Tensor:
        """The library size that a cell's counts of some genes are judged and expected with, (B,).

        Shares are of these genes, so it is their total. A value of the gaussian likelihood is one of the whole cell: of
        missing genes that has what the decoder expects.

        total_B: of the genes given_ids (S,)
        """
        if self.config.likelihood != "gaussian" or len(given_ids) == self.n_genes:
            return total_B
        every_G = torch.arange(1, self.n_genes + 1, device=given_ids.device)
        expected_BG = self.decode(latent_BLZ, every_G).expected(torch.ones_like(total_B))
        return total_B * expected_BG.sum(1) / expected_BG[:, given_ids - 1].sum(1).clamp_min(1e-12)

    def _through(self, blocks: nn.ModuleList, x_BLD: Tensor) -> Tensor:
        for block in blocks:
            if self.config.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, use_reentrant=False)
            else:
                x_BLD = block(x_BLD)
        return x_BLD

    def _read_out(self, x_BLD: Tensor, asked_ids: Tensor, embedded: Tensor | None = None) -> Tensor:
        """The head's numbers of every asked gene, (B, Q, K), at least in float32."""
        chunks = asked_ids.split(self.config.gene_chunk or max(asked_ids.shape[-1], 1), dim=-1)
        cell_BD = self._cell(x_BLD) if self.config.direct else None
        parts = []
        for ids in chunks:
            of_chunk = embedded if len(chunks) == 1 else None
            if self.config.recompute and torch.is_grad_enabled():
                read = (self._read_out_chunk, x_BLD, cell_BD, ids, of_chunk)
                parts.append(checkpoint(self.reads_latents, *read, use_reentrant=False))
            else:
                parts.append(self.reads_latents(self._read_out_chunk, x_BLD, cell_BD, ids, of_chunk))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _read_out_chunk(
        self, x_BLD: Tensor, cell_BD: Tensor | None, asked_ids: Tensor, embedded: Tensor | None
    ) -> Tensor:
        embedded = self._embedded(asked_ids) if embedded is None else embedded
        out_BQK = self._attended_out(x_BLD, asked_ids, embedded)
        if cell_BD is None:
            return out_BQK
        direct_BQ1 = self.direct_out(cell_BD, asked_ids, embedded)[..., None]
        if out_BQK.shape[-1] == 1:
            return out_BQK + direct_BQ1
        return torch.cat((out_BQK[..., :1] + direct_BQ1, out_BQK[..., 1:]), dim=-1)

    def _cell(self, x_BLD: Tensor) -> Tensor:
        """What genes' embeddings are multiplied with, (B, D), in full precision: it is a logit's own."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            return self.cell_out(self.norm_cell(x_BLD.to(self.cell_out.weight.dtype).mean(1)))

    def direct_out(self, cell_BD: Tensor, asked_ids: Tensor, embedded: Tensor | None) -> Tensor:
        """What an asked gene's logit gets of the cell beside what the gene attends to, (B, Q)."""
        table_GD = self.gene_embedding.weight
        with torch.autocast(cell_BD.device.type, enabled=False):
            cell_BD = cell_BD.to(table_GD.dtype)
            if embedded is None:  # once for each gene of the vocabulary, as for all of each cell
                return (cell_BD @ table_GD.T).gather(1, asked_ids)
            return cell_BD @ embedded.T if embedded.ndim == 2 else (embedded @ cell_BD[..., None])[..., 0]

    def _attended_out(self, x_BLD: Tensor, asked_ids: Tensor, embedded: Tensor | None) -> Tensor:
        way = self.attention.way
        if way in ("factorised", "fused"):
            unpool = fused.unpool if way == "fused" else factorised.unpool
            rows = rows_of(asked_ids, self.gene_embedding, embedded)
            return at_least_float32(unpool(self.unpool, self.head, rows, x_BLD))
        return at_least_float32(self.head(self.unpool(embedded, x_BLD)))

    def _log_share(self, ids: Tensor) -> Tensor:
        return at_least_float32(self.log_share(ids)).squeeze(-1)

    def _of_genes(self, table: nn.Embedding, asked_ids: Tensor) -> Tensor:
        log = at_least_float32(table(asked_ids)).squeeze(-1)
        return log.clamp(-LOG_DISPERSION_AT_MOST, LOG_DISPERSION_AT_MOST)


def _per_gene(n_genes: int, lr_scale: float = 10.0) -> nn.Embedding:
    """A number per gene on a log scale, (n_genes + 1, 1). At the network's rate a factor of e takes it more than 1,000
    steps: hence a rate of its own where it starts from nothing that is known of the gene."""
    table = nn.Embedding(n_genes + 1, 1)
    setattr(table.weight, LR_SCALE, lr_scale)
    return table
