"""From the upload of 100,000 records to the first training step, through a running stack's REST: `python -m benchmarks.first_step`.

Says where the time goes, twice: the second job finds the records' tokens in the cache. The records are GSM8K's, repeated with a
number in front so that no two are the same, or made on the spot where that file is not at hand. Start the stack before (`make up`).
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

API = "http://127.0.0.1:8003/api/v1/model-training"
BASE_MODEL = "smollm2"
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 1800.0
PIECE_RECORDS = 1_000
MADE_UP = [
    {"question": f"What do {boxes} boxes of {boxes + 3} pens hold?", "answer": f"{boxes * (boxes + 3)} pens."} for boxes in range(500)
]


@dataclass(frozen=True)
class Phase:
    """A stretch of the way to the first step."""

    name: str
    seconds: float


def make_pieces(data: Path | None, count: int, on_end: list[float]) -> Iterator[bytes]:
    """Give chat records as JSON lines in pieces; notes in `on_end` when the last one was taken."""
    sources = [json.loads(line) for line in data.read_text().splitlines()] if data else MADE_UP
    numbered = enumerate(itertools.islice(itertools.cycle(sources), count))
    while piece := list(itertools.islice(numbered, PIECE_RECORDS)):
        yield "".join(_write(number, record) for number, record in piece).encode()
    on_end.append(time.perf_counter())


def _write(number: int, record: dict[str, str]) -> str:
    turns = [{"role": "user", "content": f"{number}. {record['question']}"}, {"role": "assistant", "content": record["answer"]}]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def upload(client: httpx.Client, data: Path | None, count: int) -> tuple[str, list[Phase]]:
    """Upload the records; give the dataset's id, and how long sending and checking took."""
    sent: list[float] = []
    began = time.perf_counter()
    answer = client.post("/datasets", params={"display_name": f"{count} records"}, content=make_pieces(data, count, sent))
    ended = time.perf_counter()
    dataset = answer.raise_for_status().json()
    assert dataset["record_count"] == count, dataset
    size = f"{dataset['size_bytes'] / 1e6:.0f} MB"
    return str(dataset["dataset_id"]), [Phase(f"upload ({size})", sent[0] - began), Phase("check", ended - sent[0])]


def train_one_step(client: httpx.Client, base_model: str, dataset_id: str) -> list[Phase]:
    """Create a job of one step; give how long each part took, by the times in its event log."""
    parameters = {"max_steps": 1, "batch_size": 8}
    body = {"display_name": "First step", "base_model": base_model, "dataset_id": dataset_id, "parameters": parameters}
    began = time.perf_counter()
    created = client.post("/models/fine-tune", json=body).raise_for_status().json()
    creating = Phase("create (checks and estimate)", time.perf_counter() - began)
    job_id = created["training_job"]["job_id"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (events := _read_events(client, job_id)) or events[-1]["kind"] != "step":
        job = client.get(f"/training-jobs/{job_id}").raise_for_status().json()
        assert job["state"] not in ("STATE_FAILED", "STATE_CANCELLED"), job
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(POLL_SECONDS)
    client.post(f"/training-jobs/{job_id}/cancel", json={})
    while not client.get(f"/training-jobs/{job_id}").raise_for_status().json().get("end_time"):
        time.sleep(POLL_SECONDS)  # the next job would wait for this one
    client.delete(f"/models/{created['model']['model_id']}").raise_for_status()
    return [creating, *measure_phases(events)]


def _read_events(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """Read the log up to the first step."""
    listed = client.get(f"/training-jobs/{job_id}/events", params={"page_size": 1000}).raise_for_status().json()["events"]
    events: list[dict[str, Any]] = []
    for event in listed:
        kind = next(name for name in event if name not in ("job_id", "sequence", "time", "attempt"))
        events.append({"kind": kind, "time": datetime.fromisoformat(event["time"]), "payload": event[kind]})
        if kind == "step":
            break
    return events


def measure_phases(events: Sequence[dict[str, Any]]) -> list[Phase]:
    """Cut a job's log, up to its first step, at the events that part its phases."""

    def at(kind: str, state: str = "") -> datetime:
        found: list[datetime] = [each["time"] for each in events if each["kind"] == kind and state in ("", each["payload"].get("to_state"))]
        return found[0]

    checked = next(event["payload"] for event in events if event["kind"] == "data_checked")
    tokens = f"records to {checked['tokens'] / 1e6:.1f} million tokens{' (cached)' if checked['cached'] else ''}"
    reading = at("preparing") if any(event["kind"] == "preparing" for event in events) else at("data_checked")
    marks = {
        "queue": (at("state_changed", "STATE_QUEUED"), at("state_changed", "STATE_STARTING")),
        "start of the process and its libraries": (at("state_changed", "STATE_STARTING"), reading),
        tokens: (reading, at("data_checked")),
        "the rest of the model's load, technique, the longest batch tried": (at("data_checked"), at("started")),
        "first step": (at("started"), at("step")),
    }
    return [Phase(name, (end - begin).total_seconds()) for name, (begin, end) in marks.items()]


def _print(title: str, phases: Sequence[Phase]) -> None:
    print(title)
    for phase in phases:
        print(f"  {phase.name:64}{phase.seconds:8.1f} s")
    print(f"  {'in all':64}{sum(phase.seconds for phase in phases):8.1f} s", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", default=API)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl (default: records made on the spot)")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--base-model", default=BASE_MODEL)
    options = parser.parse_args()
    with httpx.Client(base_url=options.api, timeout=PATIENCE_SECONDS) as client:
        dataset_id, sending = upload(client, options.data, options.records)
        _print("from upload to first step", [*sending, *train_one_step(client, options.base_model, dataset_id)])
        _print("the same records again, tokens from the cache", train_one_step(client, options.base_model, dataset_id))
        client.delete(f"/datasets/{dataset_id}")


if __name__ == "__main__":
    main()
