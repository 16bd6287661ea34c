"""The way to parse a document: in a child process of its own, whose limits, crashes and answers are made typed results here."""

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument
from server.services.codec import Codec

_logger = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[3]
_BYTES_PER_CHARACTER = 4
# Beside the text: title, headings, pages, warnings.
_ANSWER_OVERHEAD = 64 << 20
# The child has its processor time from its limits; on a busy machine the wall clock runs faster.
_WALL_FACTOR = 2


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the child says: a document, or a fault, a sentence, and what the log should have."""

    document: ParsedDocument | None = None
    fault: Fault | None = None
    message: str = ""
    detail: str = ""


_ANSWER = Codec[_Answer](_Answer)


def parse_document(path: Path, limits: Limits | None = None) -> ParsedDocument:
    """Parse a file, whatever its name, in a confined child process; blocks for `limits.seconds` (processor) or twice that at most.

    Raises DocumentInvalid with the cause, OSError where the file cannot be opened.
    """
    limits = limits or Limits()
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DocumentInvalid(Fault.UNSUPPORTED_FORMAT, "This is no file.")
        if status.st_size > limits.file_bytes:
            message = f"The file has {status.st_size:,} bytes; {limits.file_bytes:,} are read at most."
            raise DocumentInvalid(Fault.TOO_LARGE, message)
        exit_code, output = _run_child(file, limits)
    return _read_answer(exit_code, output, limits)


def _open_at_once(path: str, flags: int) -> int:
    """Open a pipe without waiting for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _run_child(file: IO[bytes], limits: Limits) -> tuple[int, bytes]:
    """Run the child on an open file; return its exit code (negative: the signal that ended it) and what it wrote."""
    command = [sys.executable, "-m", "server.rag.parsing.child", json.dumps(asdict(limits))]
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, cwd=_ROOT, env={}) as child:
        timer = threading.Timer(limits.seconds * _WALL_FACTOR, child.send_signal, [signal.SIGXCPU])
        timer.start()
        try:
            assert child.stdout is not None
            output = child.stdout.read(_most_bytes(limits) + 1)
            if len(output) > _most_bytes(limits):
                child.kill()
            return child.wait(), output
        finally:
            timer.cancel()
            child.kill()


def _most_bytes(limits: Limits) -> int:
    return limits.text_characters * _BYTES_PER_CHARACTER + _ANSWER_OVERHEAD


def _read_answer(exit_code: int, output: bytes, limits: Limits) -> ParsedDocument:
    if len(output) > _most_bytes(limits):
        raise DocumentInvalid(Fault.TOO_LONG, f"The document has more than {limits.text_characters:,} characters of text.")
    if exit_code == -signal.SIGXCPU:
        raise DocumentInvalid(Fault.TIMED_OUT, f"Reading the document takes longer than {limits.seconds} seconds.")
    if exit_code == -signal.SIGKILL:
        raise DocumentInvalid(Fault.OUT_OF_MEMORY, "The system ended the reading of the document, as it does when memory runs out.")
    if exit_code != 0:
        # A library of C ends the process where it gets no memory, or meets what its authors did not foresee.
        raise DocumentInvalid(Fault.DAMAGED, "The parser broke on this document: it is damaged, or takes too much memory.")
    answer = _ANSWER.decode(output)
    if answer.document is None:
        if answer.detail:
            _logger.warning("a document was refused as damaged: %s", answer.detail)
        raise DocumentInvalid(answer.fault or Fault.DAMAGED, answer.message)
    return answer.document
