"""One call made twice: as a gRPC user and as a REST user would, from the contract's own annotations. Gives each one's error in one form."""

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import grpc
import httpx
from google.api import annotations_pb2
from google.protobuf import json_format, symbol_database
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from modeltraining.v1 import inference_service_pb2, model_service_pb2, training_service_pb2

SERVICES = {
    service.name: service
    for module in (model_service_pb2, training_service_pb2, inference_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
}
# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
HTTP_STATUS = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "ALREADY_EXISTS": 409, "UNIMPLEMENTED": 501}


@dataclass(frozen=True)
class Refusal:
    """An error as a client sees it; `raw` is all of its text, to be searched for what must not be there."""

    code: str
    reason: str
    message: str
    fields: frozenset[str]
    raw: str = field(compare=False)


def call_grpc(target: str, method: str, request: dict[str, Any]) -> Refusal | Any:
    """Call `Service/Method`; give its Refusal, or its answer (of a stream the first message)."""
    service, name = method.split("/")
    described = SERVICES[service].methods_by_name[name]
    database = symbol_database.Default()
    request_class, answer_class = (database.GetSymbol(each.full_name) for each in (described.input_type, described.output_type))
    with grpc.insecure_channel(target) as channel:
        make = channel.unary_stream if described.server_streaming else channel.unary_unary
        call = make(f"/{described.containing_service.full_name}/{name}", request_class.SerializeToString, answer_class.FromString)
        try:
            answer: Any = call(json_format.ParseDict(request, request_class()), timeout=60)
            return next(iter(answer)) if described.server_streaming else answer
        except grpc.RpcError as error:
            return _refusal_from_grpc(error)


def _refusal_from_grpc(error: Any) -> Refusal:
    status = rpc_status.from_call(error)
    assert status is not None, f"an error without details: {error}"
    reason, fields = "", set()
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            assert info.domain == "modeltraining"
            reason = info.reason
        elif detail.Unpack(bad):
            fields |= {violation.field for violation in bad.field_violations}
    return Refusal(error.code().name, reason, status.message, frozenset(fields), f"{error}{status}")


def call_rest(url: str, method: str, request: dict[str, Any]) -> Refusal | httpx.Response:
    """Call the same by its REST path; give its Refusal, or the response."""
    service, name = method.split("/")
    rule = SERVICES[service].methods_by_name[name].GetOptions().Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    rest = dict(request)
    path = re.sub(r"\{(\w+)(=\*\*)?\}", lambda match: quote(str(rest.pop(match[1])), safe="/" if match[2] else ""), getattr(rule, verb))
    sent = rest.get(rule.body, rest)
    body: dict[str, Any] = {"json": sent} if rule.body else {"params": rest}
    response = httpx.request(verb.upper(), url + path, **body, timeout=60)
    if response.is_success:
        return response
    return refusal_from_rest(response)


def refusal_from_rest(response: httpx.Response) -> Refusal:
    """Read a JSON error, and demand that its HTTP status fits."""
    assert response.headers["content-type"].startswith("application/json"), response.text
    status = response.json()
    code = next(code.name for code in grpc.StatusCode if code.value[0] == status["code"])
    assert response.status_code == HTTP_STATUS[code], response.text
    reason, fields = "", set()
    for detail in status.get("details", ()):
        reason = detail.get("reason", reason)
        fields |= {violation["field"] for violation in detail.get("field_violations", detail.get("fieldViolations", ()))}
    return Refusal(code, reason, status["message"], frozenset(fields), json.dumps(status) + str(response.headers))
