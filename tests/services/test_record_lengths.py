"""Lengths of records: a sample by the model's own tokenizer tells more than bytes, and where there is none bytes tell something."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.basemodels.sources import BaseModelSource
from server.datafiles.previewing import Previewer
from server.domain.datasets import Dataset, DatasetFormat, RecordKind
from server.domain.estimates import Range
from server.domain.previews import MeasureOrder
from server.domain.specs import FineTuneSpec, Objective, ParametersRequest
from server.domain.techniques import LoraTechnique
from server.services.estimating import Estimator
from server.services.machine import Machine
from server.services.record_lengths import InlineRecords, LengthMeasurer, choose_evenly, guess_lengths, lengths_of_sample
from server.services.training_parameters import FineTuneDefaults, resolve_parameters
from tests.services.conftest import NoEngine
from tests.tiny_models import build_tiny_causal_model

MACHINE = Machine(memory_bytes=16 << 30, device_memory_bytes=0, cores=2)
TECHNIQUE = LoraTechnique()


class Meter:
    """The engine's own measuring, in this process; keeps what it was asked."""

    def __init__(self, source: BaseModelSource, storage: Path) -> None:
        self._previewer = Previewer(lambda name: source.resolve(name).directory, lambda path: storage / path)
        self.orders: list[MeasureOrder] = []

    async def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Measure."""
        self.orders.append(order)
        return await asyncio.to_thread(self._previewer.measure, order)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with a tokenizer."""
    return build_tiny_causal_model(tmp_path_factory.mktemp("models") / "llama")


def find_models(base: Path, tmp_path: Path) -> BaseModelSource:
    return BaseModelSource(tmp_path / "cache", allowed_local_roots=[base.parent], hub_endpoint="http://127.0.0.1:9")


def make_spec(base_model: str, asked: ParametersRequest | None = None) -> FineTuneSpec:
    settings = resolve_parameters(asked or ParametersRequest(), FineTuneDefaults(16, None), TECHNIQUE, 1_000)
    return FineTuneSpec(base_model, "ds_1", "0" * 64, TECHNIQUE, settings)


def write_dataset(storage: Path, records: Sequence[object], *, invalid: int = 0) -> Dataset:
    storage.mkdir(exist_ok=True)
    lines = ["no JSON"] * invalid + [json.dumps(record) for record in records]
    (storage / "ds.jsonl").write_text("\n".join(lines))
    size = (storage / "ds.jsonl").stat().st_size
    now = datetime.now(UTC)
    return Dataset("ds_1", "d", DatasetFormat.JSONL, RecordKind.MIXED, len(records), invalid, size, "0" * 64, "ds.jsonl", now)


def plain(words: int) -> dict[str, str]:
    return {"prompt": "river " * words, "completion": " bridge"}


async def test_a_dataset_is_measured_by_the_models_own_tokenizer(base: Path, tmp_path: Path) -> None:
    source = find_models(base, tmp_path)
    meter = Meter(source, tmp_path / "storage")
    dataset = write_dataset(tmp_path / "storage", [plain(5 + number % 9) for number in range(2_000)], invalid=7)
    exact = [await meter.measure(MeasureOrder(str(base), None, (), (json.dumps(plain(5 + each)),), False)) for each in range(9)]
    true_mean = sum(counts[0][0] for counts in exact) / 9
    found = await LengthMeasurer(source, meter).measure(make_spec(str(base)), dataset)
    assert found.total.low < 2_000 * true_mean < found.total.high
    assert found.total.expected == pytest.approx(2_000 * true_mean, rel=0.02)
    assert found.longest >= max(counts[0][0] for counts in exact)
    assert len(meter.orders[-1].records) == 256
    guessed = guess_lengths(dataset, 2_048)
    assert found.total.high - found.total.low < (guessed.total.high - guessed.total.low) / 5


async def test_few_records_are_counted_exactly_whether_stored_or_in_the_request(base: Path, tmp_path: Path) -> None:
    source = find_models(base, tmp_path)
    measurer = LengthMeasurer(source, Meter(source, tmp_path / "storage"))
    records = [plain(number) for number in range(1, 12)]
    stored = await measurer.measure(make_spec(str(base)), write_dataset(tmp_path / "storage", records))
    inline = await measurer.measure(make_spec(str(base)), InlineRecords([json.dumps(record).encode() for record in records]))
    assert stored == inline
    assert stored.total.low == stored.total.expected == stored.total.high > 11


async def test_a_pair_counts_with_both_its_answers(base: Path, tmp_path: Path) -> None:
    source = find_models(base, tmp_path)
    measurer = LengthMeasurer(source, Meter(source, tmp_path))
    pair = json.dumps({"prompt": "Who?", "chosen": " the bridge", "rejected": " the river"}).encode()
    one = json.dumps({"prompt": "Who?", "completion": " the bridge"}).encode()
    both = await measurer.measure(make_spec(str(base), ParametersRequest(objective=Objective.DPO)), InlineRecords([pair]))
    single = await measurer.measure(make_spec(str(base)), InlineRecords([one]))
    assert both.total.expected > 1.5 * single.total.expected
    assert both.longest < both.total.expected


async def test_bytes_are_what_there_is_without_an_engine_or_without_the_models_files(base: Path, tmp_path: Path) -> None:
    source = find_models(base, tmp_path)
    dataset = write_dataset(tmp_path / "storage", [plain(9)] * 50)
    guessed = guess_lengths(dataset, 2_048)
    assert await LengthMeasurer(source, NoEngine()).measure(make_spec(str(base)), dataset) == guessed
    meter = Meter(source, tmp_path / "storage")
    assert await LengthMeasurer(source, meter).measure(make_spec("meta-llama/Llama-3.1-8B"), dataset) == guessed
    assert not meter.orders, "nothing is downloaded for an estimate"
    gone = replace(dataset, path="gone.jsonl")
    assert await LengthMeasurer(source, meter).measure(make_spec(str(base)), gone) == guessed


async def test_held_out_records_are_not_trained_and_cost_no_tokens(base: Path, tmp_path: Path) -> None:
    source = find_models(base, tmp_path)
    estimator = Estimator(source, MACHINE, LengthMeasurer(source, NoEngine()))
    dataset = write_dataset(tmp_path / "storage", [plain(9)] * 100)
    spec = make_spec(str(base))
    whole = await estimator.estimate(spec, dataset, ())
    half = await estimator.estimate(replace(spec, eval_fraction=0.5), dataset, ())
    assert whole is not None
    assert half is not None
    assert whole.tokens is not None
    assert half.tokens is not None
    assert half.tokens.expected == pytest.approx(whole.tokens.expected / 2)


def test_a_sample_tells_more_than_the_size_of_the_file() -> None:
    guessed = guess_lengths(InlineRecords([b"x" * 800] * 1_000), max_tokens=2_048)
    assert guessed.total.low < 200_000 == guessed.total.expected < guessed.total.high
    sampled = lengths_of_sample([[150], [200], [250]] * 20, 1_000, max_tokens=2_048)
    assert sampled.total.expected == pytest.approx(200_000)
    assert sampled.total.high - sampled.total.low < guessed.total.high - guessed.total.low
    assert 250 <= sampled.longest <= 276
    assert lengths_of_sample([[150], [200]], 2, max_tokens=160).total == Range(310, 310, 310)


@pytest.mark.parametrize(("total", "most", "numbers"), [(3, 10, (1, 2, 3)), (10, 2, (1, 6)), (0, 5, ())])
def test_a_sample_comes_from_all_over_the_file(total: int, most: int, numbers: tuple[int, ...]) -> None:
    assert choose_evenly(total, most) == numbers
