"""The kernel of attention against the same computation in float32."""

import pytest
import torch

from server.inference.kernels.attention import RowAttention
from server.inference.kernels.team import Team, find_team

TOKENS = 300


@pytest.fixture
def team() -> Team:
    found = find_team()
    assert found is not None, "torch brings libgomp, or no kernel is ever used"
    return found


class Setup:
    """Rows of a filled cache, and a new token for each."""

    def __init__(self, rows: int, heads: int, key_heads: int, size: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.heads, self.key_heads, self.size, self.scaling = heads, key_heads, size, size**-0.5
        self.positions = torch.randint(0, TOKENS, (rows, 1), generator=generator)
        self.positions[0], self.positions[-1] = 0, TOKENS - 1
        self.cache = torch.randn(rows, 2 * key_heads, TOKENS, size, generator=generator).bfloat16()
        self.merged = torch.randn(rows, 1, heads + 2 * key_heads, size, generator=generator).bfloat16()
        self.rotary = torch.randn(2, rows, 1, 1, size, generator=generator).bfloat16()

    def attend(self, team: Team, rows: slice = slice(None), window: int | None = None) -> torch.Tensor:
        attention = RowAttention(team, self.heads, self.key_heads, self.size, self.scaling)
        rotary = (self.rotary[0, rows], self.rotary[1, rows])
        longest = int(self.positions[rows].max()) + 1
        return attention.attend(self.merged[rows], rotary, self.positions[rows], self.cache[rows], longest, window)

    def expect(self, window: int | None = None) -> torch.Tensor:
        turned = self.merged.roll(self.size // 2, dims=-1).float()
        rotated = self.merged.float() * self.rotary[0].float() + turned * self.rotary[1].float()
        outputs = []
        for row, position in enumerate(self.positions[:, 0].tolist()):
            start = 0 if window is None else max(0, position - window + 1)
            for head in range(self.heads):
                key_head = head // (self.heads // self.key_heads)
                new_key = rotated[row, 0, self.heads + key_head].bfloat16()
                keys = torch.cat((self.cache[row, key_head, start:position], new_key[None]))
                values = torch.cat(
                    (
                        self.cache[row, self.key_heads + key_head, start:position],
                        self.merged[row, 0, None, self.heads + self.key_heads + key_head],
                    )
                )
                weights = torch.softmax(keys.float() @ rotated[row, 0, head] * self.scaling, dim=-1)
                outputs.append(weights @ values.float())
        return torch.stack(outputs).view(len(self.positions), 1, self.heads * self.size)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("rows", "heads", "key_heads", "size"), [(5, 9, 3, 64), (1, 4, 4, 20), (1, 8, 2, 128), (33, 4, 1, 16)])
def test_rows_of_different_lengths_attend_as_in_float32(
    team: Team, rows: int, heads: int, key_heads: int, size: int, window: int | None
) -> None:
    setup = Setup(rows, heads, key_heads, size)
    expected = setup.expect(window)
    torch.testing.assert_close(setup.attend(team, window=window).float(), expected, atol=1e-2, rtol=1e-2)


def test_the_new_key_is_rotated_and_both_are_put_where_the_row_stands_and_nowhere_else(team: Team) -> None:
    setup = Setup(3, 6, 2, 32)
    before = setup.cache.clone()
    setup.attend(team)
    rotated = setup.merged.float() * setup.rotary[0].float() + setup.merged.roll(16, dims=-1).float() * setup.rotary[1].float()
    for row, position in enumerate(setup.positions[:, 0].tolist()):
        torch.testing.assert_close(setup.cache[row, :2, position].float(), rotated[row, 0, 6:8], atol=1e-2, rtol=1e-2)
        assert torch.equal(setup.cache[row, 2:, position], setup.merged[row, 0, 8:])
        setup.cache[row, :, position] = before[row, :, position]
    assert torch.equal(setup.cache, before)


def test_a_row_gets_the_same_bits_alone_and_beside_others(team: Team) -> None:
    setup = Setup(40, 4, 2, 64)
    together = setup.attend(team)
    for row in (0, 7, 39):
        assert torch.equal(setup.attend(team, slice(row, row + 1))[0], together[row])


def test_a_number_that_is_none_stays_in_its_row_and_is_seen_there(team: Team) -> None:
    setup = Setup(4, 4, 2, 64)
    setup.cache[3, 0, 5] = float("nan")
    output = setup.attend(team)
    assert torch.isfinite(output[:3]).all()
    assert output[3].isnan().any()


def test_a_row_beyond_the_cache_is_refused(team: Team) -> None:
    setup = Setup(2, 4, 2, 64)
    setup.positions[1] = TOKENS
    with pytest.raises(IndexError, match="up to 301 tokens in a cache of 2 of 300"):
        setup.attend(team)
