"""A whole fine-tuning of SmolLM2 in a process of its own, so that its peak memory is its own: prints expected and real peak as JSON."""

import json
import sys
import tempfile
from pathlib import Path

from server.basemodels.sources import BaseModelSource
from server.childprocess import Signals
from server.diskfiles import hash_file
from server.domain.catalogue import find_base_model
from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.events import ChildEvent, DataChecked, ResultReady
from server.domain.orders import DatasetFile, FineTuneOrder
from server.domain.specs import FineTuneSpec, ParametersRequest
from server.domain.techniques import Technique
from server.services.codec import Codec
from server.services.memory_model import estimate_memory
from server.services.training_parameters import FineTuneDefaults, resolve_parameters
from server.storage.artefacts import ArtefactStore
from server.training.run import run_fine_tune

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TECHNIQUE = Codec[Technique](Technique)
RECORDS, WORDS = 8, 45


def main(technique: Technique, cache: Path) -> None:
    """Train one step on records of some 150 tokens."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train.jsonl"
        answer = " ".join(f"ship{number}" for number in range(WORDS))
        path.write_text(
            "".join(json.dumps({"prompt": f"Ships of day {day}:", "completion": f" {answer}"}) + "\n" for day in range(RECORDS))
        )
        sha256 = hash_file(path)
        parameters = resolve_parameters(ParametersRequest(max_steps=1), FineTuneDefaults(RECORDS, None), technique, RECORDS)
        spec = FineTuneSpec(BASE_MODEL, "ds_1", sha256, technique, parameters)
        dataset = DatasetFile(path.name, sha256, DatasetFormat.JSONL, RecordKind.COMPLETION, RECORDS)
        events: list[ChildEvent] = []
        never = Signals(should_stop=lambda: False, should_pause=lambda: False)
        order = FineTuneOrder("job_1", 1, spec, dataset, "job", "result")
        run_fine_tune(order, ArtefactStore(Path(directory)), BaseModelSource(cache), events.append, never)
    checked = next(event for event in events if isinstance(event, DataChecked))
    result = next(event for event in events if isinstance(event, ResultReady))
    known = find_base_model(BASE_MODEL)
    assert known is not None
    expected = estimate_memory(known.shape, technique, parameters, checked.tokens // checked.train_sequences)
    print(json.dumps({"expected": expected.total, "peak": result.peak_memory_bytes}))


if __name__ == "__main__":
    main(TECHNIQUE.decode(sys.argv[1]), Path(sys.argv[2]))
