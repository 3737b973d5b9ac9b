"""What float32 products in TF32 cost beside bf16, emulated: their operands are cut to 10 bits, as matrix units do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scldm.model.factorised import pooling, unpooling
from scldm.parallel.dist import World
from scldm.parallel.engine import HardwareConfig, PlainEngine
from scldm.tf32 import tf32_products
from tests.scldm.model.test_attention_paths import CASES, Case, outcome, trained_like, whole_errors

pytest.importorskip("triton", reason="needs the package triton, which the extra `test` brings on Linux")

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}


def cut(x: Any) -> Any:
    """float32 without the last 13 of its 23 bits; anything else as it is."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    return (x.contiguous().view(torch.int32) & -8192).view(torch.float32)


class TF32(TorchDispatchMode):
    """Products of float32 as a GPU makes them with TF32; `only_scoped`: where `tf32_products` asks for it."""

    def __init__(self, only_scoped: bool) -> None:
        super().__init__()
        self.only_scoped, self.n_cut = only_scoped, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and (torch.backends.cuda.matmul.allow_tf32 or not self.only_scoped):
            self.n_cut += any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in args)
            args = tuple(x if len(args) == 3 and k == 0 else cut(x) for k, x in enumerate(args))
        return func(*args, **(kwargs or {}))


def ratios(kind: Any, case: Case, only_scoped: bool) -> tuple[list[float], int]:
    """Errors of latents, log shares and the gradient in bf16 with TF32, over those of the formula in bf16; and how many
    products were cut."""
    vae, given = trained_like(case.shape, case.n_genes), case.batch()
    true = outcome(vae, "plain", given, torch.float64)
    plain = whole_errors(vae, "plain", given, true, bf16=True)
    with TF32(only_scoped) as mode:
        found = whole_errors(vae, kind, given, true, bf16=True)
    return [x / y for x, y in zip(found, plain)], mode.n_cut


def test_the_emulation_cuts_to_ten_bits():
    x = torch.tensor([[1 + 2**-10 + 2**-11]])
    with TF32(only_scoped=False):
        assert (x @ torch.ones(1, 1)).item() == 1 + 2**-10
        assert (x.double() @ torch.ones(1, 1).double()).item() == 1 + 2**-10 + 2**-11


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padding", "per cell"])
def test_the_unpooling_takes_its_weights_again_in_tf32(name):
    """By default, beside bf16: the gradient errs by at most twice the formula's, as without."""
    found, n_cut = ratios("fused", CASES[name], only_scoped=True)
    assert n_cut >= 6, "the products of t and U, of p and U, and their gradients"
    assert max(found) < 2, found


@pytest.mark.parametrize("name", ["shared, by latents", "shared, by gene", "per cell"])
def test_tables_are_in_tf32_beside_bf16(name, monkeypatch):
    """By default: 0.7 to 1.3 times the error without TF32, and at most twice the formula's in bf16."""
    case = CASES[name]
    case.choose(monkeypatch)
    found, n_cut = ratios("factorised", case, only_scoped=True)
    assert n_cut >= 5, "scores, values and spreads of a gene's table"
    assert max(found) < 2, found
    for half in (pooling, unpooling):
        monkeypatch.setattr(half, "tf32_products", lambda on: nullcontext())
    without, n_cut = ratios("factorised", case, only_scoped=True)
    assert n_cut == 0
    assert max(x / y for x, y in zip(found, without)) < 1.5, (found, without)


@pytest.mark.parametrize(("precision", "taken"), [("bf16", True), ("fp32", False)])
def test_an_engines_gradients_are_in_tf32_beside_bf16_alone(precision, taken):
    hardware, world = HardwareConfig(engine="plain", precision=precision), World(0, 1, torch.device("cpu"))
    engine = PlainEngine(torch.nn.Linear(3, 2), lambda of: torch.optim.AdamW(of.parameters()), hardware, 1.0, world)
    (weight, _) = engine.module.parameters()
    with TF32(only_scoped=True) as mode:
        loss = (torch.ones(5, 2) @ weight).sum()  # in float32, as the linear ways are
        assert mode.n_cut == 0
        engine.backward(loss)
    assert (mode.n_cut > 0) == taken


@pytest.mark.parametrize("kind", ["factorised", pytest.param("fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["padding", "per cell"])
def test_tf32_for_all_float32_products_holds_beside_bf16(kind, name):
    """On request, by torch.set_float32_matmul_precision("high")."""
    found, n_cut = ratios(kind, CASES[name], only_scoped=False)
    assert n_cut > 10
    assert max(found) < 2, found


def test_the_setting_is_left_as_it_was():
    assert not torch.backends.cuda.matmul.allow_tf32

    def fails() -> None:
        with tf32_products(True):
            assert torch.backends.cuda.matmul.allow_tf32
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not torch.backends.cuda.matmul.allow_tf32
    with tf32_products(False):
        assert not torch.backends.cuda.matmul.allow_tf32
