"""Adapter ranks laid out for the processor: when that happens, and that it computes what the pool itself does."""

import pytest
import torch
from torch import nn

from server.inference.lora import Adapter, AdapterPool
from server.inference.projections import Projection, is_packable
from server.inference.selection import PASSES_BEFORE_PACKING, AdapterSelection

CPU = torch.device("cpu")
WIDTH, OUTPUTS = 32, (48, 16)
pytestmark = pytest.mark.skipif(not is_packable(torch.bfloat16, CPU), reason="this processor has no bfloat16 products of its own")


class Setup:
    """A projection of two parts with a pool of ranks."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.parts = [nn.Linear(WIDTH, outputs, bias=outputs > WIDTH, dtype=torch.bfloat16) for outputs in OUTPUTS]
        self.selection = AdapterSelection()
        self.projection = Projection(self.parts, self.selection)
        places = {"first": (self.projection, 0), "second": (self.projection, 1)}
        self.pool = AdapterPool(places, self.selection, dtype=torch.bfloat16, device=CPU, max_ranks=16)
        self.adapters: dict[str, Adapter] = {}

    def put(self, name: str, rank: int, parts: tuple[int, ...] = (0, 1), scale: float = 0.3) -> None:
        matrices = {}
        for part in parts:
            down, up = torch.randn(rank, WIDTH) * scale, torch.randn(OUTPUTS[part], rank) * scale
            matrices[self.projection, part] = (down.bfloat16(), up.bfloat16())
        self.adapters[name] = Adapter(rank, matrices)
        assert self.pool.acquire(name, self.adapters[name])

    @torch.inference_mode()
    def decode(self, x: torch.Tensor, names: list[str | None], passes: int = 1) -> torch.Tensor:
        for _ in range(passes):
            self.pool.select(names, is_decoding=True)
            output: torch.Tensor = self.projection(x)
        return output

    @torch.inference_mode()
    def expect(self, x: torch.Tensor, names: list[str | None]) -> torch.Tensor:
        """Compute each row by itself in float32."""
        rows = []
        for row, name in zip(x.float(), names, strict=True):
            outputs = []
            for number, part in enumerate(self.parts):
                output = nn.functional.linear(row, part.weight.float(), None if part.bias is None else part.bias.float())
                pair = None if name is None else self.adapters[name].matrices.get((self.projection, number))
                outputs.append(output if pair is None else output + row @ pair[0].float().T @ pair[1].float().T)
            rows.append(torch.cat(outputs, dim=-1))
        return torch.stack(rows)

    @property
    def is_laid_out(self) -> bool:
        return self.projection._ranks is not None and self.projection._ranks.edition == self.selection.edition


def make_rows(rows: int) -> torch.Tensor:
    return torch.randn(rows, 1, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected, atol=5e-2, rtol=2e-2)


def test_a_layout_computes_what_each_row_computes_alone() -> None:
    setup = Setup()
    setup.put("wide", 6)
    setup.put("narrow", 2, parts=(1,))
    names: list[str | None] = ["wide", None, "narrow", "wide"]
    x = make_rows(4)
    before = setup.decode(x, names, PASSES_BEFORE_PACKING)
    assert not setup.is_laid_out
    after = setup.decode(x, names)
    assert setup.is_laid_out
    for output in (before, after):
        assert_near(output, setup.expect(x, names))
    assert (setup.expect(x, names) - setup.expect(x, [None] * 4)).abs().max() > 0.5, "the adapters must do something, or this shows nothing"
    alone = setup.decode(x[:1], ["wide"], 2 * PASSES_BEFORE_PACKING)
    torch.testing.assert_close(alone[0], after[0], atol=0, rtol=0)


def test_a_layout_is_kept_when_rows_leave_and_made_anew_when_an_adapter_comes_in_another_s_place() -> None:
    setup = Setup()
    setup.put("one", 8)
    setup.put("two", 8)
    x = make_rows(2)
    setup.decode(x, ["one", "two"], PASSES_BEFORE_PACKING + 1)
    assert_near(setup.decode(x[:1], ["two"]), setup.expect(x[:1], ["two"]))
    assert setup.is_laid_out
    setup.pool.release("one")
    setup.put("three", 8)
    assert set(setup.pool.names) == {"two", "three"}
    for _ in range(PASSES_BEFORE_PACKING + 2):
        assert_near(setup.decode(x, ["three", "two"]), setup.expect(x, ["three", "two"]))
    assert setup.is_laid_out


def test_an_overflow_in_one_adapter_stays_in_its_rows_of_a_layout() -> None:
    setup = Setup()
    setup.put("good", 4)
    setup.put("huge", 4, scale=1e38)
    x = make_rows(2)
    output = setup.decode(x, ["good", "huge"], PASSES_BEFORE_PACKING + 1)
    assert setup.is_laid_out
    assert_near(output[:1], setup.expect(x[:1], ["good"]))
    assert not torch.isfinite(output[1]).all()


def test_reading_a_prompt_neither_uses_a_layout_nor_ends_it() -> None:
    setup = Setup()
    setup.put("one", 4)
    x = make_rows(1)
    for _ in range(PASSES_BEFORE_PACKING + 1):
        setup.decode(x, ["one"])
        setup.pool.select([None])
        assert setup.selection.edition is None
    setup.decode(x, ["one"])
    assert setup.is_laid_out
