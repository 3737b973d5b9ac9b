"""Draws by address: Philox as published, and nothing but (seed, purpose, step, position) decides on a number."""

from __future__ import annotations

import zlib
from functools import partial

import pytest
import torch
from scipy import stats

from scldm import draws

POSITIONS = torch.tensor([0, 5, 2, 99, 2**40 + 3])


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_the_published_function(monkeypatch: pytest.MonkeyPatch, counter, key, expected) -> None:
    """Known answers of Random123's kat_vectors for philox4x32 with 10 rounds (Salmon et al. 2011)."""
    block, low, step, high = counter
    monkeypatch.setattr("scldm.draws.zlib.crc32", lambda purpose: 0)
    monkeypatch.setattr("scldm.draws.torch.arange", lambda n, device: torch.tensor([block]))
    words = draws.philox(key[0] | key[1] << 32, {"": 1}, step, torch.tensor([low | high << 32]))
    assert tuple(words.flatten().tolist()) == expected


@pytest.mark.parametrize("draw", [partial(draws.uniform, n=7), partial(draws.normal, shape=(3, 2))])
def test_a_row_is_the_same_in_any_batch(draw) -> None:
    whole = draw(1, "noise", 4, POSITIONS)
    order = torch.tensor([3, 0, 4])
    assert torch.equal(draw(1, "noise", 4, POSITIONS[order]), whole[order])


def philox_in_plain_python(seed: int, purpose: str, step: int, position: int, block: int) -> list[int]:
    """The specification, in numbers without a size. Source: Salmon et al. 2011, section 3.3."""
    low = 0xFFFFFFFF
    x = [block, position & low, step & low, (position >> 32 ^ step >> 32) & low]
    key = [seed & low, zlib.crc32(purpose.encode()) ^ (seed >> 32 & low)]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [b >> 32 ^ x[1] ^ key[0], b & low, a >> 32 ^ x[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return x


def test_several_purposes_at_once_are_each_by_itself() -> None:
    """Bit for bit the published function at every address: wide seeds, steps and positions, several blocks."""
    positions = torch.tensor([0, 5, 99, 2**31, 2**32 - 1, 2**40 + 3, 2**62 + 11])
    n_of = {"conditions": 3, "flow noise": 10, "flow time": 1}
    for seed, step in ((0, 0), (1, 7), (2**32 - 1, 2**31), (2**40 + 7, 2**33 + 1), (2**63 - 1, 2**32 - 1)):
        together = draws.uniforms(seed, n_of, step, positions)
        for purpose, n in n_of.items():
            assert torch.equal(together[purpose], draws.uniform(seed, purpose, step, positions, n))
            words = [
                [w for block in range((n + 3) // 4) for w in philox_in_plain_python(seed, purpose, step, at, block)]
                for at in positions.tolist()
            ]
            expected = ((torch.tensor(words) >> 9).float() + 0.5) * 2.0**-23
            assert torch.equal(together[purpose], expected[:, :n])


def test_more_numbers_begin_with_the_same() -> None:
    assert torch.equal(draws.uniform(1, "a", 0, POSITIONS, 3), draws.uniform(1, "a", 0, POSITIONS, 9)[:, :3])


def test_every_part_of_the_key_matters() -> None:
    """Wide seeds, steps and positions in their high halves too; else two cells of a long run share their noise."""
    keys = [(0, "a", 0), (1, "a", 0), (2**32, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 2**33)]
    rows = torch.cat([draws.uniform(*key, torch.tensor([0, 1, 2**32]), 8) for key in keys])
    assert len(rows.flatten().unique()) == rows.numel()


def test_uniform_and_normal_have_their_distributions() -> None:
    u = draws.uniform(3, "u", 7, torch.arange(2_000), 9)
    assert 0 < u.min()
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01
    z = draws.normal(3, "z", 7, torch.arange(2_000), (5, 3)).double()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    # 30,000 numbers: standard errors of mean and variance are 0.006 and 0.008, of a correlation over 2,000 rows 0.022
    assert abs(z.mean()) < 0.02
    assert abs(z.var() - 1) < 0.03
    correlation = torch.corrcoef(z.flatten(1).T)
    assert (correlation - torch.eye(15)).abs().max() < 0.1
    neighbours = torch.corrcoef(torch.stack((z[:-1].flatten(), z[1:].flatten())))
    assert abs(neighbours[0, 1]) < 0.03


def test_a_key_draws_what_splitmix64_draws_from_it() -> None:
    """Its first two numbers for the seed 1234567, as every implementation of it tests them, in 53 bits."""
    found = [float(draws.uniform_of(torch.tensor([1234567]), k)) for k in (0, 1)]
    assert found == pytest.approx([6457827717110365317 / 2**64, 3203168211198807973 / 2**64], abs=2**-52)
    for k in (0, 1, 1 << 20, (1 << 31) + 6):  # one number for all keys, or one each
        assert torch.equal(
            draws.bits_of(torch.tensor([5, -3]), k), draws.bits_of(torch.tensor([5, -3]), torch.tensor(k))
        )


def test_the_keys_of_cells_and_genes_draw_independently() -> None:
    cells, genes = torch.tensor([5, 0, 2**40 + 3, 7]), torch.arange(1, 5_001)
    whole = draws.keys(1, "counts", cells, genes)
    assert torch.equal(draws.keys(1, "counts", cells[[2, 0]], genes[[70, 3, 9]]), whole[[2, 0]][:, [70, 3, 9]])
    others = [(2**32 + 1, "counts"), (2, "counts"), (1, "other")]
    every = torch.cat([whole, *(draws.keys(*key, cells, genes) for key in others)])
    assert len(every.unique()) == every.numel()
    u = draws.uniform_of(every, 0)
    assert 0 < u.min()
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01
    # neighbours in genes, cells and draws, over 5,000 numbers: a standard error of 0.014
    next_draw = draws.uniform_of(whole, 1)
    pairs = [(u[0, 1:], u[0, :-1]), (u[0], u[1]), (u[0], u[4]), (u[0], next_draw[0])]
    for one, other in pairs:
        assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 0.05
