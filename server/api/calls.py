"""One call as the log and the caller know it: its ids, its time, its one line of the log."""

import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2, status_pb2

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

logger = logging.getLogger("server.api.calls")


@dataclass(slots=True)
class Call:
    """A call in progress. `request_id` may be the caller's and need not be unique; `call_id` always is."""

    method: str
    request_id: str
    call_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.perf_counter)
    messages_sent: int = 0
    incident_id: str = ""

    def log(self, code: grpc.StatusCode, status: status_pb2.Status | None = None) -> None:
        """Write the call's line: what was called, how it ended, how long it took. Never what was in it."""
        fields: dict[str, object] = {
            "event": "rpc",
            "method": self.method,
            "code": code.name,
            "request_id": self.request_id,
            "call_id": self.call_id,
            "duration_seconds": round(time.perf_counter() - self.start, 6),
            "messages_sent": self.messages_sent,
        }
        if status is not None:
            fields["reason"] = find_reason(status)
        if self.incident_id:
            fields["incident_id"] = self.incident_id
        # The log's formatter writes `fields` beside the message, as JSON.
        logger.log(logging.ERROR if self.incident_id else logging.INFO, "%s %s", self.method, code.name, extra={"fields": fields})


# The call that the running task serves: for ids in other lines of the log, and for the engine.
CURRENT_CALL: ContextVar[Call] = ContextVar("current_call")


def begin_call(method: str, metadata: Mapping[str, str | bytes]) -> Call:
    """Begin a call under the caller's request id, if it has a sound one."""
    given = metadata.get(REQUEST_ID_HEADER)
    sound = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
    call = Call(method, str(given) if sound else uuid.uuid4().hex)
    CURRENT_CALL.set(call)
    return call


def find_reason(status: status_pb2.Status) -> str:
    """Read the stable reason out of a status."""
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")
