"""What several training tests start from: a tiny model's source, a dataset file and an order."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.basemodels.sources import BaseModelSource
from server.childprocess import Signals
from server.datafiles.tokens import TokenizedRecords
from server.diskfiles import hash_file
from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.events import ChildEvent
from server.domain.orders import DatasetFile, FineTuneOrder
from server.domain.specs import FineTuneSpec, LossOn, OverlongPolicy, Scheduler, TrainingParameters
from server.domain.techniques import LoraTechnique
from server.storage.artefacts import ArtefactStore
from server.training.run import run_fine_tune
from tests.tiny_models import build_tiny_causal_model

PLACES = ("river", "bridge", "blue house", "old town", "map room", "harbour of the north", "field", "gate")


def make_records(count: int) -> list[dict[str, object]]:
    """Make chat records of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Who keeps the {PLACES[number % len(PLACES)]} number {number}?"},
                {"role": "assistant", "content": "The keeper" + " of the maps" * (number % 5) + f" keeps {number}."},
            ]
        }
        for number in range(count)
    ]


def make_pairs(count: int) -> list[dict[str, object]]:
    """Make preference pairs of different lengths."""
    return [
        {
            "prompt": f"Who keeps the {PLACES[number % len(PLACES)]} number {number}?",
            "chosen": "The keeper" + " of the maps" * (number % 5) + f" keeps {number}.",
            "rejected": "Nobody" + " at all" * (number % 3) + ".",
        }
        for number in range(count)
    ]


def make_sequences(lengths: Sequence[int], sequences_per_record: int = 1) -> TokenizedRecords:
    """Make tokenised records; few trained tokens in some, many in others, with weights of 1 and 0.5: a mean of means would show."""
    records = TokenizedRecords(sequences_per_record)
    for number, length in enumerate(lengths):
        first_trained = 1 + 3 * (length % 5) if length > 15 else length // 2
        weight = 1.0 if number % 3 or sequences_per_record > 1 else 0.5
        weights = [weight if place >= first_trained else 0.0 for place in range(length)]
        records.append([(7 * place + 3 * length + number) % 300 for place in range(length)], weights)
    return records


def write_records(path: Path, records: Sequence[object]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def make_parameters() -> TrainingParameters:
    """Give small, complete parameters: 6 steps of 4 records."""
    return TrainingParameters(
        epochs=1.0,
        max_steps=6,
        batch_size=4,
        learning_rate=1e-2,
        scheduler=Scheduler.COSINE,
        warmup_steps=1,
        weight_decay=0.01,
        max_gradient_norm=1.0,
        max_sequence_tokens=256,
        overlong_policy=OverlongPolicy.REJECT,
        loss_on=LossOn.ASSISTANT,
        seed=7,
        evaluate_every_steps=3,
        checkpoint_every_steps=2,
    )


def describe_dataset(dataset_id: str, kind: RecordKind = RecordKind.CHAT) -> DatasetFile:
    """Describe a dataset file of JSON lines in the storage of a workplace."""
    return DatasetFile(f"default/datasets/{dataset_id}.jsonl", "0" * 64, DatasetFormat.JSONL, kind, 20)


@dataclass(slots=True)
class Workplace:
    """A storage root with a dataset and a tiny base model."""

    root: Path
    order: FineTuneOrder
    models: Path | None = field(default=None, kw_only=True)  # where base models lie, if not below the root

    @classmethod
    def build(cls, root: Path, *, family: str = "llama", chat_template: bool = True, models: Path | None = None) -> "Workplace":
        """Set up files and an order over them; `models` holds base models that are there already."""
        base = models / family if models else build_tiny_causal_model(root / "models" / family, family, chat_template)
        write_records(root / "storage" / "default/datasets/ds_1.jsonl", make_records(20))
        technique = LoraTechnique(rank=4, alpha=8.0, dropout=0.1)
        spec = FineTuneSpec(str(base), "ds_1", "0" * 64, technique, make_parameters(), eval_fraction=0.2)
        order = FineTuneOrder("job_1", 1, spec, describe_dataset("ds_1"), "default/jobs/job_1", "default/models/mdl_1/job_1-1")
        return cls(root, order, models=models)

    @property
    def store(self) -> ArtefactStore:
        """The artefacts of this workplace."""
        return ArtefactStore(self.root / "storage")

    def _seal(self, file: DatasetFile) -> DatasetFile:
        """Give a dataset the hash of the file that lies there now, as its upload would."""
        return replace(file, sha256=hash_file(self.store.locate(file.path)))

    def change(self, **parameters: object) -> None:
        """Change training parameters of the order."""
        changed = replace(self.order.spec.parameters, **parameters)  # type: ignore[arg-type]  # names are checked by replace
        self.order = replace(self.order, spec=replace(self.order.spec, parameters=changed))

    def train(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        should_pause: Callable[[], bool] = lambda: False,
        emit: Callable[[ChildEvent], None] | None = None,
    ) -> list[ChildEvent]:
        """Do the order; give the events."""
        events: list[ChildEvent] = []

        def take(event: ChildEvent) -> None:
            events.append(event)
            if emit is not None:
                emit(event)

        source = BaseModelSource(self.root / "cache", allowed_local_roots=[self.models or self.root / "models"], offline=True)
        self.order = replace(self.order, dataset=self._seal(self.order.dataset))
        if self.order.eval_dataset is not None:
            self.order = replace(self.order, eval_dataset=self._seal(self.order.eval_dataset))
        run_fine_tune(self.order, self.store, source, take, Signals(should_stop, should_pause))
        return events
