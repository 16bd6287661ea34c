"""A program: does a job with all memory, then again with shares of what that took, and prints what became of each as a line of JSON.

Arguments: a directory, then the shares.
"""

import json
import os
import re
import resource
import sys
import traceback
from pathlib import Path

from server.childprocess import explain_failure
from server.domain.events import ResultReady, StepDone, Warned
from tests.training.building import Workplace, write_records

RECORDS = 96
SENTENCE = "The keeper of the blue house keeps the maps near the old bridge. "


def main(root: Path, shares: list[float]) -> None:
    workplace = Workplace.build(root)
    answers = [SENTENCE * 20 + str(number) for number in range(RECORDS)]
    records = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]} for answer in answers]
    write_records(root / "storage" / workplace.order.dataset.path, records)
    # All records at once: about 30,000 tokens, most of a gigabyte.
    workplace.change(batch_size=RECORDS, max_steps=1, warmup_steps=0, max_sequence_tokens=512, micro_batch_tokens=30_000)
    whole = do_apart(workplace, None)
    print(json.dumps(whole), flush=True)
    for share in shares:
        print(json.dumps(do_apart(workplace, int(share * float(str(whole["taken_bytes"]))))), flush=True)


def do_apart(workplace: Workplace, room_bytes: int | None) -> dict[str, object]:
    """Do the job in a copy of this process, so that none has what another has left."""
    path = workplace.root / "outcome.json"
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            path.write_text(json.dumps(do(workplace, room_bytes)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return dict(json.loads(path.read_text()))


def do(workplace: Workplace, room_bytes: int | None) -> dict[str, object]:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before_bytes = read_status_bytes("VmRSS")
    if room_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (read_status_bytes("VmData") + room_bytes, hard))
    try:
        events = workplace.train()
    except Exception as error:
        failure = explain_failure(error)
        if failure is None:
            raise
        return {"reason": failure.reason, "message": failure.message, "suggestion": failure.suggestion}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return {
        "warnings": [event.message for event in events if isinstance(event, Warned) and event.code == "MEMORY_SHORT"],
        "losses": [event.loss for event in events if isinstance(event, StepDone)],
        "done": isinstance(events[-1], ResultReady),
        "taken_bytes": read_status_bytes("VmHWM") - before_bytes,
    }


def read_status_bytes(name: str) -> int:
    """Give what the kernel counts: VmData as RLIMIT_DATA does, VmHWM the most that was resident."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    main(Path(sys.argv[1]), [float(share) for share in sys.argv[2:]])
