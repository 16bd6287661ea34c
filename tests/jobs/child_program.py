"""A job's child that does no training: it follows the script that lies where the dataset would. Everything around the work is real.

`python -m tests.jobs.child_program STORAGE train|index --events-fd N`
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from server.childprocess import Emit, Signals, run_child
from server.domain.events import (
    BatchAdvanced,
    CheckpointSaved,
    DocumentIndexed,
    Evaluated,
    Finalizing,
    Paused,
    Preparing,
    ResultReady,
    SpaceFound,
    Started,
    StepDone,
)
from server.domain.ids import CHUNK, new_id
from server.domain.jobs import BatchCounters, FailureReason, JobFailure
from server.domain.orders import BatchOrder, ExportOrder, FineTuneOrder, IndexOrder, Order, StagedDocument
from server.domain.rag_indexes import EmbeddingSpace, MeasuredSpace
from server.domain.retrieval import Chunk
from server.services.codec import Codec

_DOCUMENT = Codec[StagedDocument](StagedDocument)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the child does. `crash_at_step` happens in the first `crashes` attempts only."""

    steps: int = 20
    step_seconds: float = 0.0
    start_seconds: float = 0.0
    finish_seconds: float = 0.0
    checkpoint_every: int = 5
    crash_at_step: int = 0
    crashes: int = 1
    failure: str = ""
    is_deaf: bool = False  # to SIGTERM
    ignores_pause: bool = False
    dies_of_pause: bool = False
    preparing_events: int = 0
    has_child: bool = False
    dimension: int = 8


class _Performance:
    def __init__(self, storage: Path, order: Order, emit: Emit, signals: Signals) -> None:
        self.storage = storage
        self.order = order
        self.emit = emit
        self.should_stop = signals.should_stop
        self.should_pause = signals.should_pause

    def train(self, order: FineTuneOrder, script: Script) -> None:
        directory = self.storage / order.job_path
        directory.mkdir(parents=True, exist_ok=True)
        self._begin(directory, script)
        for number in range(script.preparing_events):
            self.emit(Preparing(number, script.preparing_events, number * 10))
        first = int((self.storage / order.checkpoint_path / "step").read_text()) if order.checkpoint_path else 0
        self.emit(Started(script.steps, resumed_from_step=first))
        for step in range(first + 1, script.steps + 1):
            if self.should_stop():
                return
            if self.should_pause() and not script.ignores_pause:
                self._pause(order, script, step - 1)
                return
            self._crash(directory, script, step)
            time.sleep(script.step_seconds)
            self.emit(StepDone(step, script.steps, step / script.steps, 1 / step, 1e-4, 1.0, step * 10, step * 5, 100.0, 0.0, 1000))
            if step % script.checkpoint_every == 0:
                self.emit(Evaluated(step, 1 / step, 100))
                self._save(order, step)
        self.emit(Finalizing())
        self._sleep(script.finish_seconds)
        if script.failure:
            self._fail(script.failure)
        if not self.should_stop():
            self._finish(order)

    def index(self, order: IndexOrder, script: Script) -> None:
        lines = (self.storage / order.documents_path).read_bytes().splitlines()
        self.emit(SpaceFound(MeasuredSpace(EmbeddingSpace("e", "r", "MEAN", "", "", "NONE", 8, 8, "script"))))
        self.emit(Started(len(lines)))
        for number, line in enumerate(lines):
            document = _DOCUMENT.decode(line)
            chunk = Chunk(new_id(CHUNK), 0, document.text, 0, len(document.text), 3)
            # One of another dimension, where the script says so.
            dimension = script.dimension if number else 8
            vector = b"\x00\x3c" + b"\x00\x00" * (dimension - 1)
            self.emit(DocumentIndexed(document.document_id, [chunk], base64.b64encode(vector).decode(), dimension))
        self.emit(Finalizing())
        self.emit(ResultReady())

    def _begin(self, directory: Path, script: Script) -> None:
        if script.is_deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pids = [os.getpid()]
        if script.has_child:
            pids.append(subprocess.Popen(["/bin/sleep", "1000"]).pid)
        # Beside the job's own directory, which goes with the job.
        (self.storage / "pids").write_text(" ".join(map(str, pids)))
        print("the script begins")
        self._sleep(script.start_seconds)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.should_stop():
            time.sleep(0.01)

    def _crash(self, directory: Path, script: Script, step: int) -> None:
        marks = directory / "crashes"
        crashes = len(marks.read_text()) if marks.exists() else 0
        if step == script.crash_at_step and crashes < script.crashes:
            marks.write_text("x" * (crashes + 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def _pause(self, order: FineTuneOrder, script: Script, step: int) -> None:
        if script.dies_of_pause:
            os.kill(os.getpid(), signal.SIGKILL)
        self._save(order, step)
        self.emit(Paused())

    def export(self, order: ExportOrder, script: Script) -> None:
        self.emit(Started(0))
        self.emit(Finalizing())
        if script.failure:
            self._fail(script.failure)
        self._finish(order)

    def batch(self, order: BatchOrder, script: Script) -> None:
        """Save a part at every record; begin after those that the order names."""
        (self.storage / order.job_path).mkdir(parents=True, exist_ok=True)
        self.emit(Started(script.steps, resumed_from_step=len(order.part_paths)))
        for record in range(len(order.part_paths) + 1, script.steps + 1):
            self._crash(self.storage / order.job_path, script, record)
            self._save(order, record)
            self.emit(BatchAdvanced(BatchCounters(record, 0, record * 3, record * 2), script.steps))
        self.emit(Finalizing())
        if script.failure:
            self._fail(script.failure)
        self._finish(order)

    def _save(self, order: FineTuneOrder | BatchOrder, step: int) -> None:
        path = f"{order.job_path}/checkpoint-{step}-{order.lease_epoch}"
        (self.storage / path).mkdir()
        (self.storage / path / "step").write_text(str(step))
        self.emit(CheckpointSaved(step, path, 10))

    def _fail(self, failure: str) -> None:
        if failure == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        if failure == "unforeseen":
            raise KeyError("/a/secret/path")
        raise JobFailure(FailureReason(failure), "The loss is not a number.", "Lower the learning rate.")

    def _finish(self, order: FineTuneOrder | ExportOrder | BatchOrder) -> None:
        artifact = self.storage / order.artifact_path
        artifact.mkdir(parents=True)
        (artifact / "adapter_model.safetensors").write_bytes(b"weights")
        self.emit(ResultReady(order.artifact_path, "e" * 64, 7, "main", {"eval_loss": 0.1}, 1.0, 1000))


def main() -> int:
    storage = Path(sys.argv[1])

    def work(order: Order, emit: Emit, signals: Signals) -> None:
        performance = _Performance(storage, order, emit, signals)
        script = Script(**json.loads((storage / "script.json").read_text()))
        if isinstance(order, FineTuneOrder):
            performance.train(order, script)
        elif isinstance(order, ExportOrder):
            performance.export(order, script)
        elif isinstance(order, BatchOrder):
            performance.batch(order, script)
        else:
            performance.index(order, script)

    return run_child(work, int(sys.argv[4]))


if __name__ == "__main__":
    sys.exit(main())
