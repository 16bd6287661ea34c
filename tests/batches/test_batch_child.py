"""The child of a batch generation over real files and a real engine: order, resumption, pauses, bad records."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from server.batches import batch_child, results
from server.batches.batch_child import BatchParts, run_batch
from server.childprocess import Signals
from server.diskfiles import hash_file
from server.domain.errors import FailedPrecondition
from server.domain.events import BatchAdvanced, CheckpointSaved, ChildEvent, Finalizing, Paused, ResultReady, Started
from server.domain.generation import GenerationParameters
from server.domain.jobs import BATCH_RESULT_NAME, BatchCounters, FailureReason, JobFailure
from server.domain.orders import BatchOrder
from server.inference.engine import EmbeddedEngine
from server.services.generating import collect, generate_choices
from server.storage.artefacts import ArtefactStore
from server.storage.files import LocalFiles
from tests.batches.conftest import BASE, TroubledEngine
from tests.batches.test_prompts import DATASET, make_order
from tests.inference.asking import ask

GREEDY = GenerationParameters(temperature=0, max_tokens=4, seed=1)
SAMPLED = GenerationParameters(temperature=1, max_tokens=3, seed=5, n=2, logprobs=1)
RECORDS = [{"text": f"The keeper of house {number}"} for number in range(10)]


class Killed(Exception):
    """The child ends here and now."""


@dataclass
class Job:
    """One job's files and what its child says. `kill_after` and `pause_after` count committed parts."""

    storage: Path
    engine: TroubledEngine
    kill_after: int | None = None
    pause_after: int | None = None
    events: list[ChildEvent] = field(default_factory=list)

    async def run(self, order: BatchOrder, concurrency: int = 4) -> list[ChildEvent]:
        """Run the child; give its events."""
        self.events = []
        parts = BatchParts(ArtefactStore(self.storage), LocalFiles(self.storage).fetch, self.engine.port, concurrency)
        await run_batch(order, parts, self._take, Signals(lambda: False, lambda: self._has(self.pause_after)))
        return self.events

    def _take(self, event: ChildEvent) -> None:
        self.events.append(event)
        if self._has(self.kill_after):
            raise Killed

    def _has(self, count: int | None) -> bool:
        return count is not None and len(self.part_paths) >= count

    @property
    def part_paths(self) -> tuple[str, ...]:
        """The parts that the events tell of, as a worker would keep them."""
        return tuple(event.path for event in self.events if isinstance(event, CheckpointSaved))

    def order(self, records: Sequence[dict[str, Any] | bytes] = RECORDS, parameters: GenerationParameters = GREEDY) -> BatchOrder:
        """Write a dataset, and order its answers."""
        path = self.storage / "records.jsonl"
        self.storage.mkdir(exist_ok=True)
        path.write_bytes(b"\n".join(each if isinstance(each, bytes) else json.dumps(each).encode() for each in records))
        dataset = replace(DATASET, path="records.jsonl", sha256=hash_file(path), record_count=len(records))
        return replace(make_order(parameters), model=BASE, dataset=dataset)

    def read(self, events: Sequence[ChildEvent]) -> list[dict[str, Any]]:
        """Read the result."""
        ready = events[-1]
        assert isinstance(ready, ResultReady)
        artefact = ArtefactStore(self.storage).open(ready.artifact_path, ready.manifest_sha256)
        assert artefact.size_bytes == ready.size_bytes
        return [json.loads(line) for line in (artefact.directory / BATCH_RESULT_NAME).read_bytes().splitlines()]


@pytest.fixture
def job(engine: EmbeddedEngine, tmp_path: Path) -> Job:
    return Job(tmp_path / "storage", TroubledEngine(engine))


@pytest.fixture
def parts_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PART_RECORDS", 3)
    monkeypatch.setattr(batch_child, "SIGNAL_SECONDS", 0.0)  # or a tiny job is done before anybody looks


async def test_each_record_is_answered_as_it_would_be_alone(job: Job, engine: EmbeddedEngine) -> None:
    events = await job.run(job.order())
    lines = job.read(events)
    assert [(line["record"], line["line"], line["error"]) for line in lines] == [(number, number, None) for number in range(1, 11)]
    for line, record in zip(lines, RECORDS, strict=True):
        request = ask(record["text"], max_tokens=4)
        alone = await collect(BASE, generate_choices(engine, request))
        assert [choice["text"] for choice in line["choices"]] == [alone.choices[0].text]
        usage = alone.finished.usage
        assert line["usage"] == {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    assert job.engine.most_running == 4
    started = next(event for event in events if isinstance(event, Started))
    assert (started.total_steps, started.resumed_from_step) == (10, 0)
    assert [type(event) for event in events[-2:]] == [Finalizing, ResultReady]
    advanced = [event for event in events if isinstance(event, BatchAdvanced)][-1]
    assert (advanced.counters.answered_records, advanced.total_records) == (10, 10)
    assert advanced.counters.completion_tokens == sum(line["usage"]["completion_tokens"] for line in lines)


@pytest.mark.usefixtures("parts_of_three")
async def test_a_child_that_was_killed_goes_on_from_the_parts_that_were_committed(job: Job) -> None:
    """Each kill loses what its child had beyond the parts; nothing is answered twice or left out."""
    order = job.order(parameters=SAMPLED)
    whole = job.read(await job.run(order))
    assert job.engine.most_running == 4  # two answers to each of two records
    assert [path.split("/")[-1] for path in job.part_paths] == ["checkpoint-3-1", "checkpoint-6-1", "checkpoint-9-1", "checkpoint-10-1"]
    job.kill_after = 1
    with pytest.raises(Killed):
        await job.run(replace(order, lease_epoch=2))
    committed = job.part_paths
    assert committed == ("default/jobs/job_1/checkpoint-3-2",)
    job.engine.calls.clear()
    job.kill_after = None
    events = await job.run(replace(order, lease_epoch=3, part_paths=committed))
    assert [_read_texts(line) for line in job.read(events)] == [_read_texts(line) for line in whole]
    assert sorted(job.engine.calls) == sorted(["load", *(f"job_1.{number}.{choice}" for number in range(4, 11) for choice in (0, 1))])
    started = next(event for event in events if isinstance(event, Started))
    assert started.resumed_from_step == 3


def _read_texts(line: dict[str, Any]) -> tuple[int, list[tuple[str, int]]]:
    """Give what was sampled; log-probabilities differ in their last digits with who was in the batch."""
    return line["record"], [(choice["text"], choice["seed"]) for choice in line["choices"]]


@pytest.mark.usefixtures("parts_of_three")
async def test_a_pause_keeps_what_is_there(job: Job) -> None:
    order = job.order([*RECORDS, *RECORDS])
    job.pause_after = 2
    events = await job.run(order, concurrency=1)
    assert isinstance(events[-1], Paused)
    job.pause_after = None
    kept = job.part_paths
    lines = job.read(await job.run(replace(order, lease_epoch=2, part_paths=kept)))
    assert [line["record"] for line in lines] == list(range(1, 21))


async def test_bad_records_fail_alone_and_say_why(job: Job) -> None:
    records: list[dict[str, Any] | bytes] = [
        RECORDS[0],
        b"{broken",
        {"text": "keeper " * 600},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    lines = job.read(await job.run(job.order(records, SAMPLED)))
    assert [line["error"] and line["error"]["reason"] for line in lines] == [
        None, "BROKEN_JSON", "PROMPT_TOO_LONG", None, "WRONG_RECORD_KIND",
    ]  # fmt: skip
    assert [len(line["choices"]) for line in lines] == [2, 0, 0, 2, 0]
    assert [choice["seed"] for choice in lines[3]["choices"]] == [11, 12]
    first = lines[0]["choices"][0]["logprobs"][0]
    assert first["logprob"] <= 0
    assert [set(each) for each in first["alternatives"]] == [{"token", "logprob"}]
    done = [event for event in job.events if isinstance(event, BatchAdvanced)][-1]
    assert (done.counters.answered_records, done.counters.failed_records) == (2, 3)


async def test_where_nothing_can_be_answered_the_job_fails(job: Job) -> None:
    with pytest.raises(JobFailure, match=r"None of the 2 records could be answered\. The first: The line is not JSON") as failure:
        await job.run(job.order([b"{broken", b"{too"]))
    assert failure.value.reason is FailureReason.DATASET_INVALID


async def test_a_model_that_cannot_be_loaded_fails_the_job_before_any_record(job: Job) -> None:
    job.engine.trouble = lambda what: FailedPrecondition("The adapter is broken.", reason="ADAPTER_INVALID") if what == "load" else None
    with pytest.raises(JobFailure, match="adapter is broken") as failure:
        await job.run(job.order())
    assert failure.value.reason is FailureReason.BASE_MODEL_UNAVAILABLE
    assert job.engine.calls == ["load"]


async def test_other_bytes_than_the_uploaded_ones_are_not_read(job: Job) -> None:
    order = job.order()
    (job.storage / "records.jsonl").write_text("{}")
    with pytest.raises(JobFailure, match="not the one that was uploaded"):
        await job.run(order)
    (job.storage / "records.jsonl").unlink()
    with pytest.raises(JobFailure, match="is missing"):
        await job.run(order)


@pytest.mark.usefixtures("parts_of_three")
@pytest.mark.parametrize("damage", ["order", "bytes"])
async def test_parts_that_are_damaged_or_out_of_order_end_the_job(job: Job, damage: str) -> None:
    order = job.order()
    await job.run(order)
    paths = job.part_paths
    if damage == "order":
        paths = (paths[1], paths[0])
    else:
        (job.storage / paths[0] / "part.jsonl").write_text("{}")
    with pytest.raises(JobFailure) as failure:
        await job.run(replace(order, lease_epoch=2, part_paths=paths))
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID


async def test_a_long_answer_does_not_keep_others_waiting(job: Job) -> None:
    """The first record waits for the engine; those read ahead are answered meanwhile, and stand after it."""
    others = asyncio.Event()
    generate = job.engine.generate

    def hold(request: Any) -> Any:
        async def held() -> Any:
            if request.request_id == "job_1.1":
                await others.wait()
            async for event in generate(request):
                yield event
            if request.request_id == "job_1.8":
                others.set()

        return held()

    job.engine.generate = hold  # type: ignore[method-assign]
    lines = job.read(await job.run(job.order(), concurrency=2))
    assert [line["record"] for line in lines] == list(range(1, 11))
    assert BatchCounters(1, 2, 3, 4).tokens == 7
