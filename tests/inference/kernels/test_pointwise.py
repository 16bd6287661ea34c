"""Norm and gate against torch's in float32, for few rows (one thread) and many (a team)."""

import pytest
import torch
from torch.nn import functional

from server.inference.kernels.pointwise import Gate, Norm
from server.inference.kernels.team import Team, find_team


@pytest.fixture
def team() -> Team:
    found = find_team()
    assert found is not None
    return found


@pytest.mark.parametrize("rows", [1, 3, 400])
def test_the_norm_adds_and_normalises_as_in_float32(team: Team, rows: int) -> None:
    torch.manual_seed(rows)
    hidden, added, weight = torch.randn(rows, 1, 577).bfloat16(), torch.randn(rows, 1, 577).bfloat16(), torch.rand(577).bfloat16() + 1
    norm = Norm(team, weight, 1e-5)
    total, normalised = norm.normalize(hidden, added)
    assert torch.equal(total, hidden + added)
    torch.testing.assert_close(normalised.float(), functional.rms_norm(total.float(), (577,), weight.float(), 1e-5), atol=1e-5, rtol=5e-3)
    same, alone = norm.normalize(hidden)
    assert same is hidden
    torch.testing.assert_close(alone.float(), functional.rms_norm(hidden.float(), (577,), weight.float(), 1e-5), atol=1e-5, rtol=5e-3)


def test_the_norm_takes_rows_that_lie_apart(team: Team) -> None:
    wide = torch.randn(4, 3, 64).bfloat16()
    norm = Norm(team, torch.ones(64).bfloat16(), 1e-5)
    assert torch.equal(norm.normalize(wide[:, -1:])[1], norm.normalize(wide[:, -1:].clone())[1])


@pytest.mark.parametrize("rows", [1, 400])
def test_the_gate_is_silu_over_all_sizes_of_numbers(team: Team, rows: int) -> None:
    gate = torch.linspace(-120, 120, 481).expand(rows, 1, 481).bfloat16()
    up = torch.randn(rows, 1, 481).bfloat16()
    output = Gate(team).apply(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(output.float(), functional.silu(gate.float()) * up.float(), atol=1e-30, rtol=5e-3)


def test_the_gate_shows_what_is_not_a_number(team: Team) -> None:
    row = torch.ones(1, 1, 64).bfloat16()
    row[0, 0, 3], row[0, 0, 40] = float("nan"), float("inf")
    output = Gate(team).apply(row)[0, 0]
    assert output[3].isnan()
    assert output[8].isinf()
    assert torch.isfinite(output[[0, 1, 2, 4, 31]]).all()
