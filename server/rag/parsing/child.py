"""The child that reads one document: a file on standard input, one JSON answer on standard output. Started by isolation.py."""

import json
import os
import resource
import sys
import traceback
from dataclasses import asdict

from server.rag.parsing.document import DocumentInvalid, Fault, Limits
from server.rag.parsing.reading import read_document
from server.rag.parsing.sandbox import confine

_NEARLY_ALL = 0.8
_OUT_OF_MEMORY: dict[str, object] = {"fault": Fault.OUT_OF_MEMORY, "message": "Reading the document takes more memory than it may."}


def main(limits_json: str) -> None:
    """Read the document within the limits and answer: `{"document": …}` or `{"fault": …, "message": …}`."""
    limits = Limits(**json.loads(limits_json))
    answers = os.dup(sys.stdout.fileno())
    # What a library prints must not stand in the answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    confine(limits.memory_bytes, limits.seconds)
    with os.fdopen(answers, "wb") as pipe:
        pipe.write(json.dumps(_answer(limits), ensure_ascii=False).encode())


def _answer(limits: Limits) -> dict[str, object]:
    try:
        document = read_document(sys.stdin.buffer.read(limits.file_bytes + 1), limits)
    except MemoryError:
        return _OUT_OF_MEMORY
    except DocumentInvalid as error:
        if error.fault is not Fault.DAMAGED:
            return {"fault": error.fault, "message": error.message}
        # Libraries of C say "damaged" too when they get no memory; and this one fault may be a mistake of ours: the log tells.
        is_full = _measure_peak() > _NEARLY_ALL * limits.memory_bytes
        return _OUT_OF_MEMORY if is_full else {"fault": error.fault, "message": error.message, "detail": traceback.format_exc()}
    return {"document": asdict(document)}


def _measure_peak() -> int:
    """Give the bytes of address space (or of memory, where the kernel counts no other) that this process had at most."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    kibibytes = int(lines["VmPeak"].split()[0]) if "VmPeak" in lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024


if __name__ == "__main__":
    main(sys.argv[1])
