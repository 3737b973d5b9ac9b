"""The EMA against the sum written out, and that applying them leaves no trace."""

from __future__ import annotations

import torch

from scldm.parallel.engine import HardwareConfig, PlainEngine
from scldm.train.ema import EMA
from tests.scldm.train.small_runs import ALONE


def ema_of(module: torch.nn.Module, decay: float) -> EMA:
    optimizer = torch.optim.AdamW(module.parameters())
    return EMA(PlainEngine(module, lambda _: optimizer, HardwareConfig("plain"), 1.0, ALONE), decay)


def test_it_is_the_recursion_written_out() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    ema = ema_of(module, 0.6)
    expected = module.weight.detach().double().clone()
    for n in range(1, 13):
        with torch.no_grad():
            module.weight.normal_()
        ema.update()
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
    torch.testing.assert_close(ema.weights[0].view(2, 3).double(), expected, atol=1e-6, rtol=1e-6)


def test_within_applied_the_module_holds_the_ema_and_after_it_its_own() -> None:
    module = torch.nn.Linear(3, 2)
    ema = ema_of(module, 0.9)
    with torch.no_grad():
        module.weight += 1
    own = module.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(module.weight.detach(), own - 1)
    assert torch.equal(module.weight, own)
    module.weight.sum().backward()  # still the tensor that the optimizer holds
    assert module.weight.grad is not None
    ema.update()
    torch.testing.assert_close(ema.weights[0].view(2, 3), own - 1 + (1 - 2 / 11))
