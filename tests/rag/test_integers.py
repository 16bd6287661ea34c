"""Linear layers of bytes: exact where bytes can be, near elsewhere, and each row by itself."""

import torch
from torch import nn

from server.rag.integers import ROWS_AT_ONCE, STATE_LEVELS, WEIGHT_LEVELS, IntegerLinear, quantize_linears

INPUTS, OUTPUTS = 96, 40


def make_layer(bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(INPUTS, OUTPUTS, bias=bias)


def make_states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_what_bytes_can_hold_is_exact_up_to_the_largest_sums() -> None:
    layer = make_layer()
    levels = torch.randint(-WEIGHT_LEVELS, WEIGHT_LEVELS + 1, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(2))
    levels[:, 0] = WEIGHT_LEVELS
    levels[0] = WEIGHT_LEVELS  # with a row of the highest level: any sum in 16 bits would overflow
    layer.weight.data = levels * 2.0**-8
    states = torch.randint(0, STATE_LEVELS + 1, (7, INPUTS), generator=torch.Generator().manual_seed(3)).float()
    states[:, 0], states[:, 1] = 0, STATE_LEVELS
    states[0, 1:] = STATE_LEVELS
    for offset in (0.0, -100.0):
        moved = states + offset
        exact = layer.double()(moved.double()).float()
        assert torch.allclose(IntegerLinear(layer.float())(moved), exact, rtol=1e-5, atol=1e-3)


@torch.inference_mode()
def test_other_numbers_are_near_with_and_without_a_bias_in_any_shape() -> None:
    for layer, states in ((make_layer(), make_states(3, 5)), (make_layer(bias=False), make_states(ROWS_AT_ONCE + 1))):
        exact, given = layer(states), IntegerLinear(layer)(states)
        assert given.shape == exact.shape
        assert 1e-6 < (given - exact).norm() / exact.norm() < 0.009  # cut off instead of rounded it would be 0.012


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others() -> None:
    layer, states = IntegerLinear(make_layer()), make_states(6)
    alone = torch.cat([layer(row[None]) for row in states])
    states[3] *= 1e6
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(layer(states)[kept], alone[kept])


@torch.inference_mode()
def test_rows_of_one_value_and_weights_of_nothing_are_no_harm_and_what_is_no_number_stays_none() -> None:
    layer = make_layer()
    layer.weight.data[0] = 0
    flat = torch.stack([torch.zeros(INPUTS), torch.full((INPUTS,), 3.0)])
    assert torch.allclose(IntegerLinear(layer)(flat), layer(flat), atol=0.05)
    assert IntegerLinear(layer)(torch.full((1, INPUTS), torch.nan)).isnan().all()


def test_all_plain_linear_layers_are_replaced_at_any_depth_and_nothing_else() -> None:
    model = nn.Sequential(make_layer(), nn.Sequential(nn.LayerNorm(OUTPUTS), nn.Linear(OUTPUTS, 8)), nn.Embedding(3, 8))
    assert quantize_linears(model) == 2
    assert [type(module) for module in model.modules()].count(IntegerLinear) == 2
    assert sum(weight.numel() for weight in model.parameters()) == 2 * OUTPUTS + 3 * 8
    assert quantize_linears(model) == 0
