"""The multi-head cross-attention block: pools genes into latent tokens, and reads latent tokens out for genes."""

from __future__ import annotations

from torch import Tensor, nn

from scldm.model.attention import AttentionKind, attention, sdpa
from scldm.model.blocks import SwiGLU


class MCAB(nn.Module):
    """MCAB(S, X) = F + MLP(LN_F(F)), F = Q + Att(LN_Q(Q), K, V), Q = W_Q S, K = W_K LN_K(X), V = W_V LN_V(X).

    Invariant to the order of X, equivariant to the order of S. The residual is Q, not its norm.
    Source: paper, Eq. 3-7. The heads' outputs are joined by a projection W_O, as usual.

    kind: plain, or torch's attention kernels
    bias_out: False where the output meets a softmax over its M elements, in which the MLP's last bias cancels
    """

    def __init__(self, width: int, n_heads: int, kind: AttentionKind = "plain", bias_out: bool = True) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attend = attention if kind == "plain" else sdpa
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm_query = nn.LayerNorm(width)
        self.norm_key = nn.LayerNorm(width, bias=False)  # a shift has no effect (see attention.py)
        self.norm_value = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = SwiGLU(width, bias_out)

    def forward(self, pseudo_inputs: Tensor, x_BKD: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, M, D).

        pseudo_inputs: S, (M, D) shared by the cells or (B, M, D)
        x_BKD: the set that is read, (B, K, D)
        mask: (B, K) or (K,), True where an element of the set stands
        """
        query = self.query(pseudo_inputs)
        key, value = self.key(self.norm_key(x_BKD)), self.value(self.norm_value(x_BKD))
        read_BMD = query + self.out(self.attend(self.norm_query(query), key, value, self.n_heads, mask))
        return read_BMD + self.mlp(self.norm_mlp(read_BMD))
