"""Adapters of many rows by the kernel: each row against the same products in float32."""

import pytest
import torch
from torch import nn

from server.inference.lora import Adapter, AdapterPool
from server.inference.projections import Projection
from server.inference.selection import AdapterSelection

CPU = torch.device("cpu")
WIDTH, OUTPUTS = 48, (80, 21)


class Setup:
    """A projection of two parts with a pool of ranks."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.parts = [nn.Linear(WIDTH, outputs, bias=outputs > WIDTH, dtype=torch.bfloat16) for outputs in OUTPUTS]
        self.selection = AdapterSelection()
        self.projection = Projection(self.parts, self.selection)
        places = {"first": (self.projection, 0), "second": (self.projection, 1)}
        self.pool = AdapterPool(places, self.selection, dtype=torch.bfloat16, device=CPU, max_ranks=64)
        self.adapters: dict[str, Adapter] = {}

    def put(self, name: str, rank: int, parts: tuple[int, ...] = (0, 1), scale: float = 0.3) -> None:
        matrices = {}
        for part in parts:
            down, up = torch.randn(rank, WIDTH) * scale, torch.randn(OUTPUTS[part], rank) * scale
            matrices[self.projection, part] = (down.bfloat16(), up.bfloat16())
        self.adapters[name] = Adapter(rank, matrices)
        assert self.pool.acquire(name, self.adapters[name])

    @torch.inference_mode()
    def project(self, x: torch.Tensor, names: list[str | None]) -> torch.Tensor:
        self.pool.select(names)
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


def make_rows(rows: int, tokens: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected, atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize(("rows", "tokens"), [(4, 1), (64, 1), (4, 33)])
def test_rows_of_different_adapters_and_the_base_compute_what_each_computes_alone(rows: int, tokens: int) -> None:
    setup = Setup()
    setup.put("wide", 23)
    setup.put("narrow", 2, parts=(1,))
    names: list[str | None] = ["wide", None, "narrow", "wide"] * (rows // 4)
    x = make_rows(rows, tokens)
    output = setup.project(x, names)
    assert_near(output, setup.expect(x, names))
    assert (setup.expect(x, names) - setup.expect(x, [None] * rows)).abs().max() > 0.5, (
        "the adapters must do something, or this shows nothing"
    )


def test_a_row_gets_the_same_bits_from_its_adapter_alone_and_beside_others() -> None:
    setup = Setup()
    setup.put("one", 8)
    setup.put("two", 9)
    x = make_rows(1).expand(40, 1, WIDTH).contiguous()
    base = torch.zeros(40, 1, sum(OUTPUTS), dtype=torch.bfloat16)
    alone = base[:1].clone()
    setup.pool.select(["two"])
    assert setup.projection._sum is not None
    setup.projection._sum.add(alone, x[:1], setup.selection.current.spans)
    setup.pool.select(["two", "one"] * 20)
    setup.projection._sum.add(base, x, setup.selection.current.spans)
    assert torch.equal(base[::2], alone.expand(20, 1, -1))
    assert not torch.equal(base[1], alone[0])


def test_an_adapter_in_another_s_place_is_the_one_that_counts() -> None:
    setup = Setup()
    setup.put("one", 32)
    setup.put("two", 32)
    x = make_rows(2)
    assert_near(setup.project(x, ["one", "two"]), setup.expect(x, ["one", "two"]))
    setup.pool.release("one")
    setup.put("three", 32, parts=(0,))
    assert set(setup.pool.names) == {"two", "three"}
    assert_near(setup.project(x, ["three", "two"]), setup.expect(x, ["three", "two"]))


def test_an_overflow_in_one_adapter_stays_in_its_rows() -> None:
    setup = Setup()
    setup.put("good", 4)
    setup.put("huge", 4, scale=1e38)
    x = make_rows(2)
    output = setup.project(x, ["good", "huge"])
    assert_near(output[:1], setup.expect(x[:1], ["good"]))
    assert not torch.isfinite(output[1]).all()


def test_a_shape_that_the_kernel_does_not_know_is_refused_and_nothing_written() -> None:
    setup = Setup()
    setup.put("one", 4)
    x = make_rows(2)
    for wrong, names in ((x[:, 0], ["one", "one"]), (x, ["one"]), (x.float(), ["one", "one"])):
        setup.pool.select(names)
        base = torch.zeros(*wrong.shape[:-1], sum(OUTPUTS), dtype=wrong.dtype)
        assert setup.projection._sum is not None
        with pytest.raises(ValueError, match="not computed here"):
            setup.projection._sum.add(base, wrong, setup.selection.current.spans)
        assert not base.any()
