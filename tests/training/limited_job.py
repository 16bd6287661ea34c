"""A program: does jobs with little memory, one after the other, and prints what became of each as a line of JSON.

Arguments: a directory, then for each job the bytes it may hold beyond what the process has, and its parameters as JSON.
"""

import gc
import json
import re
import resource
import sys
from pathlib import Path

from server.domain.events import ResultReady, StepDone, Warned
from server.domain.jobs import JobFailure
from tests.training.building import Workplace, write_records

RECORDS = 32
SENTENCE = "The keeper of the blue house keeps the maps near the old bridge. "


def main(root: Path, jobs: list[tuple[int, dict[str, object]]]) -> None:
    workplace = Workplace.build(root)
    answers = [SENTENCE * 20 + str(number) for number in range(RECORDS)]
    records = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]} for answer in answers]
    write_records(root / "storage" / workplace.order.dataset.path, records)
    held_bytes = read_data_bytes()  # once: what a job frees may stay with the process
    for room_bytes, changes in jobs:
        workplace.change(batch_size=RECORDS, max_steps=1, warmup_steps=0, max_sequence_tokens=512, **changes)
        gc.collect()
        print(json.dumps(do(workplace, held_bytes + room_bytes)), flush=True)


def do(workplace: Workplace, limit_bytes: int) -> dict[str, object]:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
    try:
        events = workplace.train()
    except JobFailure as failure:
        return {"reason": failure.reason, "message": failure.message, "suggestion": failure.suggestion}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return {
        "warnings": [event.message for event in events if isinstance(event, Warned) and event.code == "MEMORY_SHORT"],
        "losses": [event.loss for event in events if isinstance(event, StepDone)],
        "data": read_data_bytes() - limit_bytes,
        "done": isinstance(events[-1], ResultReady),
    }


def read_data_bytes() -> int:
    """Give what RLIMIT_DATA counts."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    main(Path(sys.argv[1]), [(int(room), json.loads(changes)) for room, changes in zip(sys.argv[2::2], sys.argv[3::2], strict=True)])
