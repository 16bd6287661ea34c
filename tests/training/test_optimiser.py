"""Weights in 16 bits are trained as their float32 masters would be, of which nothing is lost."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from server.training.optimiser import MasterAdamW, join_master, make_optimiser, read_master, split_master, write_master
from tests.training.building import make_parameters

SETTINGS = replace(make_parameters(), learning_rate=1e-3, weight_decay=0.1)
# Zero, halves of the last place of bfloat16 above an even and an odd one, the largest number, the smallest, infinity, and their like below.
ODD_BITS = (0x0, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x1, 0x7F800000)


def make_masters() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    odd = torch.tensor([*ODD_BITS, *(bits - (1 << 31) for bits in ODD_BITS)], dtype=torch.int32)
    some = torch.randint(-(1 << 31), 1 << 31, (100_000,), generator=generator).to(torch.int32)
    masters = torch.cat((odd, some)).view(torch.float32)
    return masters[~masters.isnan()]


def test_a_master_is_its_nearest_weight_and_a_rest() -> None:
    masters = make_masters()
    weights, rests = torch.empty_like(masters, dtype=torch.bfloat16), torch.empty_like(masters, dtype=torch.int16)
    split_master(masters.clone(), weights, rests)
    assert torch.equal(join_master(weights, rests).view(torch.int32), masters.view(torch.int32))
    nearest = masters.bfloat16()
    assert torch.equal((weights.double() - masters.double()).abs().nan_to_num(), (nearest.double() - masters.double()).abs().nan_to_num())
    assert (weights == nearest).float().mean() > 0.999


@pytest.mark.parametrize("shape", [(), (5,), (7, 3)])
def test_bfloat16_weights_move_as_float32_ones_whose_first_moment_is_rounded(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(shape, generator=generator).bfloat16()
    narrow, wide, still = nn.Parameter(start.clone()), nn.Parameter(start.float()), nn.Parameter(start.clone())
    narrow.grad_dtype = torch.float32
    optimiser, plain = make_optimiser([narrow, still], SETTINGS), make_optimiser([wide], SETTINGS)
    assert isinstance(optimiser, MasterAdamW)
    assert isinstance(plain, torch.optim.AdamW)
    for _ in range(20):
        gradient = torch.randn(shape, generator=generator)
        narrow.grad, wide.grad = gradient.clone(), gradient.clone()
        for each in (optimiser, plain):
            each.param_groups[0]["lr"] *= 0.9
            each.step()
        assert torch.equal(read_master(optimiser, narrow), wide)
        first = plain.state[wide]["exp_avg"]
        first.copy_(first.bfloat16())
    assert torch.equal(narrow, wide.detach().bfloat16())
    assert torch.equal(still, start)
    assert sum(tensor.nbytes for tensor in optimiser.state[narrow].values()) == (2 + 2 + 4) * narrow.numel() + 4


def test_a_float32_weight_beside_bfloat16_ones_is_its_own_master() -> None:
    wide, narrow = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimiser = make_optimiser([wide, narrow], SETTINGS)
    wide.grad = torch.ones(3)
    optimiser.step()
    assert torch.equal(read_master(optimiser, wide), wide)
    assert torch.equal(wide, torch.full((3,), 1 - 1e-3 * (1 + 0.1)))
    assert "rest" not in optimiser.state[wide]


def test_a_master_that_is_written_is_read_again() -> None:
    narrow = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimiser = make_optimiser([narrow], SETTINGS)
    assert torch.equal(read_master(optimiser, narrow), torch.ones(2))
    master = torch.tensor([0.123456789, -3.3333333])
    write_master(optimiser, narrow, master.clone())
    assert torch.equal(read_master(optimiser, narrow), master)
    assert torch.equal(narrow, master.bfloat16())
